"""Connections to the database that are lost after a commit, before its answer."""

from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg_errors

from chat_ticket_svc.store.pipelined_connection import PipelinedConnection
from chat_ticket_svc.store.transaction import Transaction


def lose_first_answer(
    monkeypatch: pytest.MonkeyPatch,
    statement: str,
    *,
    after: str = "",
    then: Callable[[], Awaitable[object]] | None = None,
) -> list[str]:
    """Lose the connection behind the first `statement` of the servers in this process.

    With `after`, the first one behind this statement in a transaction. `then` runs before the
    server notices. Returns a list of the lost statements: it is empty until one is lost.
    """
    lost: list[str] = []
    begun: set[Transaction] = set()

    async def lose() -> None:
        lost.append(statement)
        if then is not None:
            await then()

    def losing(run: Any) -> Any:
        async def wrapper(self: Transaction, sql: str, *args: Any, **options: Any) -> Any:
            result = await run(self, sql, *args, **options)
            if sql == after:
                begun.add(self)
            if sql == statement and not lost and (not after or self in begun):
                await lose()
                await self._connection.close()
                raise psycopg.OperationalError("lost by the test")
            return result

        return wrapper

    fetch = PipelinedConnection.fetch

    async def losing_fetch(self: PipelinedConnection, sql: str, *args: Any) -> Any:
        rows = await fetch(self, sql, *args)
        if sql == statement and not lost:
            await lose()
            raise pg_errors.ConnectionFailure("lost by the test")
        return rows

    monkeypatch.setattr(PipelinedConnection, "fetch", losing_fetch)
    monkeypatch.setattr(Transaction, "fetch_all", losing(Transaction.fetch_all))
    monkeypatch.setattr(Transaction, "execute", losing(Transaction.execute))
    return lost
