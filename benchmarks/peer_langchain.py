"""langchain_postgres.PostgresChatMessageHistory. Runs in .venv-bench.

Used as its reference says (reference.langchain.com, langchain-postgres,
PostgresChatMessageHistory). acreate_tables creates the table. Each use creates an instance, which
is cheap, on a connection that outlives it. aadd_messages and aget_messages add and read. The
library has no pool, and a connection serves one call at a time. So psycopg's pool
(www.psycopg.org, "Connection pools") has as many connections as there are callers.
"""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from langchain_core.messages import AIMessage, HumanMessage
from langchain_postgres import PostgresChatMessageHistory
from psycopg_pool import AsyncConnectionPool

from benchmarks.peers_worker import CALLERS, Utterance, run

TABLE = "chat_history"
MESSAGE = {"user": HumanMessage, "assistant": AIMessage}
ROLE = {"human": "user", "ai": "assistant"}


class LangChain:
    async def open(self, address: str) -> None:
        self._pool = AsyncConnectionPool(address, min_size=CALLERS, max_size=CALLERS, open=False)
        await self._pool.open(wait=True)
        async with self._pool.connection() as connection:
            await PostgresChatMessageHistory.acreate_tables(connection, TABLE)

    @asynccontextmanager
    async def _history(self, conversation: str) -> AsyncIterator[PostgresChatMessageHistory]:
        async with self._pool.connection() as connection:
            yield PostgresChatMessageHistory(TABLE, conversation, async_connection=connection)

    async def begin(self, conversation: str) -> None:
        pass

    async def add(self, conversation: str, utterances: Sequence[Utterance]) -> None:
        async with self._history(conversation) as history:
            await history.aadd_messages([MESSAGE[role](content=text) for role, text in utterances])

    async def add_twice(self, conversation: str, utterance: Utterance) -> None:
        role, text = utterance
        message = MESSAGE[role](content=text, id=str(uuid.uuid4()))
        for _ in range(2):
            async with self._history(conversation) as history:
                await history.aadd_messages([message])

    async def read(self, conversation: str) -> list[Utterance]:
        async with self._history(conversation) as history:
            messages = await history.aget_messages()
        return [(ROLE[message.type], message.content) for message in messages]


if __name__ == "__main__":
    run(LangChain())
