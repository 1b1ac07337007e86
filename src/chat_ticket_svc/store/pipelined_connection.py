"""Statements of many callers on one connection, sent without waiting for one another's results.

A connection of the pool serves one statement at a time, and what it costs to come by it, to wait
for it and to give it back is several times what PostgreSQL takes to look a row up by its key. Here
such statements share a connection in libpq's pipeline mode. Each has a sync point of its own, so
that it is its own transaction: it fails alone, and is committed when its result is here.

PostgreSQL runs them in turn, so only what is quick and waits for no lock belongs here.

When the connection breaks, all that were sent fail with ConnectionFailure, and the next statement
takes another one. A caller that leaves is not waited for: what was sent is run all the same.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
from psycopg import errors as pg_errors
from psycopg import pq
from psycopg.adapt import Transformer

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Any]

# More than a connection can be kept busy with. What waits behind these has not been sent, and is
# not, when its caller leaves.
WINDOW = 16

# libuv tells of an error on a socket once, together with what is to be read before it, and never
# again: who has read that looks whether there is more, as psycopg does.
LOOK_SECONDS = 0.1

_PLACEHOLDER = re.compile(r"%\((\w+)\)s")


class _Statement(NamedTuple):
    """What PostgreSQL is sent: the parameters by number."""

    sql: bytes
    parameters: tuple[str, ...]


@functools.cache
def _statement(sql: str) -> _Statement:
    numbers: dict[str, int] = {}
    numbered = _PLACEHOLDER.sub(
        lambda match: f"${numbers.setdefault(match[1], len(numbers) + 1)}", sql
    )
    return _Statement(numbered.encode(), tuple(numbers))


def _dumped(value: Any) -> bytes | None:
    """In text, of a type that PostgreSQL infers."""
    match value:
        case None:
            return None
        case str():
            return value.encode()
        case int():
            return b"%d" % value
    raise TypeError(type(value))


class _Call:
    """A statement on its way."""

    __slots__ = ("future", "preparing", "result", "statement", "types", "values")

    def __init__(
        self,
        statement: _Statement,
        values: Sequence[bytes | None],
        types: Sequence[int] | None,
    ):
        self.statement = statement
        self.values = values
        self.types = types
        self.future: asyncio.Future[list[Row]] = asyncio.get_running_loop().create_future()
        self.preparing = False
        self.result: pq.abc.PGresult | None = None


class PipelinedConnection:
    """One connection of a pool, taken when it is first needed and again when it broke.

    It is given back when the pool would let go of it, for its age or at the end.
    """

    def __init__(
        self,
        pool: psycopg_pool.AsyncConnectionPool[Connection],
        *,
        prepare_statements: bool,
        lifetime_seconds: float,
    ):
        self._pool = pool
        self._prepares = prepare_statements
        self._lifetime = lifetime_seconds
        self._pipeline: _Pipeline | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._waiting = 0

    @property
    def busy(self) -> int:
        """How many statements are on their way."""
        return self._waiting

    async def fetch(
        self, sql: str, params: Mapping[str, Any], types: Sequence[int] | None = None
    ) -> list[Row]:
        """The rows of a statement, its columns read as `types` where these are given.

        Also raises PoolTimeout and ConnectionFailure.
        """
        statement = _statement(sql)
        call = _Call(statement, [_dumped(params[name]) for name in statement.parameters], types)
        self._waiting += 1
        try:
            # It may have broken again before those who waited for it have their turn.
            while (pipeline := self._pipeline) is None or pipeline.ended:
                await self._open()
            pipeline.send(call)
            return await call.future
        finally:
            self._waiting -= 1

    def let_go(self) -> None:
        """Of the connection, when what was sent on it is answered; what comes takes another."""
        if self._pipeline is not None:
            self._pipeline.end()

    async def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        self.let_go()
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def _open(self) -> None:
        """Take the connection that all who need one at this time will share."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._take())
        await asyncio.shield(self._opening)

    async def _take(self) -> None:
        try:
            connection = await self._pool.getconn()
            try:
                self._pipeline = _Pipeline(
                    connection, self._give_back, self._prepares, self._lifetime
                )
            except psycopg.OperationalError as error:  # it was lost while it was idle
                self._give_back(connection)
                raise pg_errors.ConnectionFailure("the connection was lost") from error
        finally:
            self._opening = None

    def _give_back(self, connection: Connection) -> None:
        task = asyncio.create_task(self._pool.putconn(connection))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Pipeline:
    """The time of one connection in pipeline mode."""

    def __init__(
        self,
        connection: Connection,
        give_back: Any,
        prepares: bool,
        lifetime: float,
    ):
        self._connection = connection
        self._libpq = connection.pgconn
        self._give_back = give_back
        self._prepares = prepares
        # The name that each has. What could not be prepared gets another the next time: PgBouncer
        # takes a name for used, and ends the connection of who uses it again.
        self._prepared: dict[bytes, bytes] = {}
        self._names = itertools.count()
        self._transformer = Transformer(connection)
        self._unsent: deque[_Call] = deque()
        self._sent: deque[_Call] = deque()
        self._loop = asyncio.get_running_loop()
        # For those who come later; who is here is served.
        self.ended = False
        self._let_go_of = False
        self._socket = self._libpq.socket
        self._libpq.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._receive)
        self._expiry = self._loop.call_later(lifetime, self.end)
        self._looking: asyncio.TimerHandle | None = None

    def send(self, call: _Call) -> None:
        self._unsent.append(call)
        self._send_waiting()
        if self._looking is None:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def _look(self) -> None:
        self._looking = None
        if self._sent:
            self._receive()
        if self._sent:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look)

    def end(self) -> None:
        """Take no more statements, and let go of the connection when those here are answered."""
        self.ended = True
        self._expiry.cancel()
        if not self._sent and not self._unsent:
            self._let_go()

    def _let_go(self) -> None:
        if self._let_go_of:  # since when the socket's number may be another connection's
            return
        self._let_go_of = True
        if self._looking is not None:
            self._looking.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        if self._libpq.status != pq.ConnStatus.BAD:
            self._libpq.exit_pipeline_mode()
        self._give_back(self._connection)

    def _send_waiting(self) -> None:
        try:
            while self._unsent and len(self._sent) < WINDOW:
                call = self._unsent.popleft()
                if not call.future.done():  # or its caller has left
                    self._sent.append(call)
                    self._send(call)
            self._flush()
        except psycopg.OperationalError as error:
            self._break(error)

    def _send(self, call: _Call) -> None:
        sql = call.statement.sql
        if not self._prepares:
            self._libpq.send_query_params(sql, call.values, result_format=pq.Format.BINARY)
        else:
            name = self._prepared.get(sql)
            if name is None:
                call.preparing = True
                name = self._prepared[sql] = b"lane_%d" % next(self._names)
                self._libpq.send_prepare(name, sql)
            self._libpq.send_query_prepared(name, call.values, result_format=pq.Format.BINARY)
        self._libpq.pipeline_sync()

    def _flush(self) -> None:
        if self._libpq.flush():  # the socket takes no more for now
            self._loop.add_writer(self._socket, self._flush_more)

    def _flush_more(self) -> None:
        try:
            self._loop.remove_writer(self._socket)
            self._flush()
        except psycopg.OperationalError as error:
            self._break(error)

    def _receive(self) -> None:
        try:
            self._libpq.consume_input()
            # Within a statement NULL stands behind each result; at the end of them it stays.
            after_null = False
            while self._sent and not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is not None:
                    self._take(result)
                elif after_null:
                    break
                after_null = result is None
        except psycopg.OperationalError as error:
            self._break(error)
            return
        if self._libpq.status == pq.ConnStatus.BAD:
            self._break(None)
            return
        self._send_waiting()
        if self.ended and not self._sent and not self._unsent:
            self._let_go()

    def _take(self, result: pq.abc.PGresult) -> None:
        call = self._sent[0]
        if result.status == pq.ExecStatus.PIPELINE_SYNC:
            self._sent.popleft()
            self._answer(call)
        elif call.preparing:
            call.preparing = False
            if result.status != pq.ExecStatus.COMMAND_OK:
                self._prepared.pop(call.statement.sql, None)
                call.result = result
        elif call.result is None:
            call.result = result

    def _answer(self, call: _Call) -> None:
        result = call.result
        if call.future.done():  # its caller has left
            return
        if result is None or result.status not in (
            pq.ExecStatus.TUPLES_OK,
            pq.ExecStatus.COMMAND_OK,
        ):
            error = _error(result)
            if isinstance(error, pg_errors.InvalidSqlStatementName):
                self._send_again(call)
            else:
                call.future.set_exception(error)
            return
        self._transformer.set_pgresult(
            result, set_loaders=call.types is None, format=pq.Format.BINARY
        )
        if call.types is not None:
            self._transformer.set_loader_types(call.types, pq.Format.BINARY)
        call.future.set_result(self._transformer.load_rows(0, result.ntuples, tuple))

    def _send_again(self, call: _Call) -> None:
        """What was to be prepared by a call before it, which failed at that."""
        if not any(sent.preparing for sent in self._sent if sent.statement is call.statement):
            self._prepared.pop(call.statement.sql, None)
        call.result = None
        self._unsent.appendleft(call)

    def _break(self, error: psycopg.Error | None) -> None:
        """The connection is lost, and with it what becomes of the statements sent."""
        self.ended = True
        self._expiry.cancel()
        for call in (*self._sent, *self._unsent):
            if not call.future.done():
                failure = pg_errors.ConnectionFailure("the connection was lost")
                failure.__cause__ = error
                call.future.set_exception(failure)
        self._sent.clear()
        self._unsent.clear()
        self._let_go()


def _error(result: pq.abc.PGresult | None) -> psycopg.Error:
    if result is None:
        return psycopg.InternalError("a statement ended without a result")
    return pg_errors.error_from_result(result)
