"""A transaction on one connection: it runs statements and decodes their rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import pq
from psycopg.adapt import Transformer

from chat_ticket_svc.store.driver_errors import CancellationDetector
from chat_ticket_svc.telemetry import tracing

T = TypeVar("T")
Params = Mapping[str, Any]


class StartAgain(Exception):  # noqa: N818 - a signal to Database, never to a caller
    """The body of a transaction has met a concurrent change, and is to run again from its start."""


class Transaction:
    """Runs the statements of one transaction, each in a span of its own."""

    def __init__(
        self, connection: psycopg.AsyncConnection[Any], *, statement_timeout_seconds: float
    ):
        self._connection = connection
        self._statement_timeout_seconds = statement_timeout_seconds

    async def fetch_all(
        self,
        sql: LiteralString,
        params: Params,
        make_row: Callable[..., T],
        *,
        prepare: bool | None = None,
    ) -> list[T]:
        with tracing.statement(sql), CancellationDetector(self._statement_timeout_seconds):
            async with self._connection.cursor(binary=True) as cursor:
                await cursor.execute(sql, params, prepare=prepare)
                return [make_row(*row) for row in await cursor.fetchall()]

    async def fetch_one(
        self, sql: LiteralString, params: Params, make_row: Callable[..., T]
    ) -> T | None:
        rows = await self.fetch_all(sql, params, make_row)
        return rows[0] if rows else None

    async def fetch_typed(
        self,
        sql: LiteralString,
        params: Params,
        types: Sequence[int],
    ) -> list[tuple[Any, ...]]:
        """The rows, with each column decoded as the type of this id, whatever its own type is."""
        async with self._connection.cursor(binary=True) as cursor:
            with tracing.statement(sql), CancellationDetector(self._statement_timeout_seconds):
                await cursor.execute(sql, params)
            result = cursor.pgresult
            transformer = Transformer(self._connection)
            transformer.set_pgresult(result, set_loaders=False)
            transformer.set_loader_types(types, pq.Format.BINARY)
            return transformer.load_rows(0, cursor.rowcount, tuple)

    async def execute(self, sql: LiteralString, params: Params) -> None:
        with tracing.statement(sql), CancellationDetector(self._statement_timeout_seconds):
            await self._connection.execute(sql, params)
