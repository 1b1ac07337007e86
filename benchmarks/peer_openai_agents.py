"""agents.extensions.memory.SQLAlchemySession. Runs in .venv-bench.

Used as its documentation says (openai.github.io/openai-agents-python, "SQLAlchemy Sessions"). One
engine over asyncpg serves all. Each conversation has one session object, which is kept.
create_tables creates the tables, add_items and get_items add and read. The engine's pool has as
many connections as there are callers. By default it keeps five and opens more temporarily
(docs.sqlalchemy.org, create_async_engine, pool_size).
"""

import uuid
from collections.abc import Sequence

from agents.extensions.memory import SQLAlchemySession
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from benchmarks.peers_worker import CALLERS, Utterance, run


class OpenAIAgents:
    async def open(self, address: str) -> None:
        # asyncpg does not accept libpq's parameter sslmode.
        url = make_url(address).difference_update_query(["sslmode"])
        url = url.set(drivername="postgresql+asyncpg")
        self._engine = create_async_engine(url, pool_size=CALLERS)
        self._sessions: dict[str, SQLAlchemySession] = {}
        first = SQLAlchemySession("", engine=self._engine, create_tables=True)
        await first.get_items()

    async def begin(self, conversation: str) -> None:
        self._sessions[conversation] = SQLAlchemySession(conversation, engine=self._engine)

    async def add(self, conversation: str, utterances: Sequence[Utterance]) -> None:
        items = [{"role": role, "content": text} for role, text in utterances]
        await self._sessions[conversation].add_items(items)

    async def add_twice(self, conversation: str, utterance: Utterance) -> None:
        role, text = utterance
        item = {"role": role, "content": text, "id": str(uuid.uuid4())}
        for _ in range(2):
            await self._sessions[conversation].add_items([item])

    async def read(self, conversation: str) -> list[Utterance]:
        items = await self._sessions[conversation].get_items()
        return [(item["role"], item["content"]) for item in items]


if __name__ == "__main__":
    run(OpenAIAgents())
