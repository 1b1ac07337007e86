"""agents.extensions.memory.SQLAlchemySession. Runs in .venv-bench.

As its documentation says (openai.github.io/openai-agents-python, "SQLAlchemy Sessions"): one engine
over asyncpg; a session for each conversation, which we keep; tables by create_tables; add_items
and get_items. The engine holds as many connections as there are callers, where five would be held
and more be opened for a while (docs.sqlalchemy.org, create_async_engine, pool_size).
"""

import uuid
from collections.abc import Sequence

from agents.extensions.memory import SQLAlchemySession
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.peers_worker import CALLERS, Said, run


class OpenAIAgents:
    async def open(self, address: str) -> None:
        # sslmode is libpq's, and asyncpg knows no such parameter.
        url = make_url(address).difference_update_query(["sslmode"])
        url = url.set(drivername="postgresql+asyncpg")
        self._engine = create_async_engine(url, pool_size=CALLERS)
        self._sessions: dict[str, SQLAlchemySession] = {}
        first = SQLAlchemySession("", engine=self._engine, create_tables=True)
        await first.get_items()

    async def begin(self, conversation: str) -> None:
        self._sessions[conversation] = SQLAlchemySession(conversation, engine=self._engine)

    async def add(self, conversation: str, said: Sequence[Said]) -> None:
        items = [{"role": role, "content": text} for role, text in said]
        await self._sessions[conversation].add_items(items)

    async def add_twice(self, conversation: str, said: Said) -> None:
        role, text = said
        item = {"role": role, "content": text, "id": str(uuid.uuid4())}
        for _ in range(2):
            await self._sessions[conversation].add_items([item])

    async def read(self, conversation: str) -> list[Said]:
        items = await self._sessions[conversation].get_items()
        return [(item["role"], item["content"]) for item in items]


if __name__ == "__main__":
    run(OpenAIAgents())
