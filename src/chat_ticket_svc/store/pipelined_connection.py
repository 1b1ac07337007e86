"""A connection that many callers share, in the pipeline mode of libpq.

A connection of the pool runs one statement at a time. To wait for it, take it and return it costs
several times what PostgreSQL needs to look up a row by its key. In pipeline mode, statements are
sent without waiting for the results of those before.

A write has a sync point of its own, so it is a transaction of its own: it fails alone, and is
committed when its result arrives. Reads that callers make in one turn of the event loop share a
sync point. That saves a system call for each, which is a third of their cost, and PostgreSQL does
the same. A read that fails takes those behind it along, up to the sync point. These are sent again,
each alone, so that every caller gets what is due to its own read.

PostgreSQL runs the statements one after the other. So only fast statements that wait for no lock
may be sent here.

If the connection breaks, all statements sent on it fail with ConnectionFailure, and the next
statement takes another connection. If a caller is cancelled, its statement runs all the same once
it was sent.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import psycopg
import psycopg_pool
from psycopg import errors as pg_errors
from psycopg import pq
from psycopg.adapt import Transformer

from chat_ticket_svc.tasks import cancel_and_wait

Row = tuple[Any, ...]
Connection = psycopg.AsyncConnection[Any]

# Enough to keep the connection busy. Statements beyond these are sent later, so they can still be
# dropped if their callers are cancelled.
MAX_IN_FLIGHT = 16

# libuv reports a socket error once, together with the data before it, and not again. So while
# statements are in flight, the socket is also read at this interval, as psycopg does.
RECHECK_SECONDS = 0.1

_PLACEHOLDER = re.compile(r"%\((\w+)\)s")


class _Statement(NamedTuple):
    """A statement with numbered parameters, as PostgreSQL expects, and their names in order."""

    sql: bytes
    parameter_names: tuple[str, ...]


@functools.cache
def _parse(sql: str) -> _Statement:
    numbers: dict[str, int] = {}
    numbered = _PLACEHOLDER.sub(
        lambda match: f"${numbers.setdefault(match[1], len(numbers) + 1)}", sql
    )
    return _Statement(numbered.encode(), tuple(numbers))


def _encode(value: Any) -> bytes | None:
    """A parameter in text format. PostgreSQL infers its type."""
    match value:
        case None:
            return None
        case str():
            return value.encode()
        case int():
            return b"%d" % value
    raise TypeError(type(value))


class _PendingStatement:
    """A statement that waits to be sent, or for its result."""

    __slots__ = (
        "has_own_sync",
        "is_preparing",
        "parameters",
        "result",
        "rows",
        "statement",
        "types",
    )

    def __init__(
        self,
        statement: _Statement,
        parameters: Sequence[bytes | None],
        types: Sequence[int] | None,
        *,
        has_own_sync: bool,
    ):
        self.statement = statement
        self.parameters = parameters
        self.types = types
        self.has_own_sync = has_own_sync
        self.rows: asyncio.Future[list[Row]]  # from when it waits in a session
        # Whether the next result is that of preparing it.
        self.is_preparing = False
        self.result: pq.abc.PGresult | None = None


class PipelinedConnection:
    """A connection of a pool for statements of many callers.

    It is taken from the pool for the first statement, and again after it broke. It is returned to
    the pool when it reaches its lifetime, when it breaks, and at the end.
    """

    def __init__(
        self,
        pool: psycopg_pool.AsyncConnectionPool[Connection],
        *,
        prepare_statements: bool,
        lifetime_seconds: float,
        reads_only: bool,
    ):
        self._pool = pool
        self._reads_only = reads_only
        self._prepare_statements = prepare_statements
        self._lifetime = lifetime_seconds
        self._session: _PipelineSession | None = None
        self._opening: asyncio.Task[None] | None = None
        self._returning: set[asyncio.Task[None]] = set()
        self._pending = 0

    @property
    def pending(self) -> int:
        """How many statements wait to be sent, or for their results."""
        return self._pending

    async def fetch(
        self, sql: str, params: Mapping[str, Any], types: Sequence[int] | None = None
    ) -> list[Row]:
        """The rows of a statement. With `types`, its columns are decoded as these.

        Also raises PoolTimeout and ConnectionFailure.
        """
        statement = _parse(sql)
        pending = _PendingStatement(
            statement,
            [_encode(params[name]) for name in statement.parameter_names],
            types,
            has_own_sync=not self._reads_only,
        )
        self._pending += 1
        try:
            # A new session may break before the callers that wait for it resume, hence the loop.
            while (session := self._session) is None or session.is_ended:
                await self._open()
            session.send(pending)
            return await pending.rows
        finally:
            self._pending -= 1

    def release_connection(self) -> None:
        """Return the connection when its statements have results. Later ones take another."""
        if self._session is not None:
            self._session.end()

    async def close(self) -> None:
        await cancel_and_wait(self._opening)
        self.release_connection()
        await asyncio.gather(*self._returning, return_exceptions=True)

    async def _open(self) -> None:
        """Take a connection from the pool, once for all callers that wait for one."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._start_session())
        await asyncio.shield(self._opening)

    async def _start_session(self) -> None:
        try:
            connection = await self._pool.getconn()
            try:
                self._session = _PipelineSession(
                    connection, self._return, self._prepare_statements, self._lifetime
                )
            except psycopg.OperationalError as error:  # the connection was lost while it was idle
                self._return(connection)
                raise pg_errors.ConnectionFailure("the connection was lost") from error
        finally:
            self._opening = None

    def _return(self, connection: Connection) -> None:
        task = asyncio.create_task(self._pool.putconn(connection))
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)


class _PipelineSession:
    """The use of one connection in pipeline mode, from the pool and back."""

    def __init__(
        self,
        connection: Connection,
        return_connection: Callable[[Connection], None],
        prepare_statements: bool,
        lifetime: float,
    ):
        self._connection = connection
        self._libpq = connection.pgconn
        self._return_connection = return_connection
        self._prepare_statements = prepare_statements
        # The names of the prepared statements. If preparing fails, the next attempt uses another
        # name: PgBouncer regards the first one as used, and closes a connection that reuses it.
        self._prepared_names: dict[bytes, bytes] = {}
        self._name_numbers = itertools.count()
        self._transformer = Transformer(connection)
        self._unsent: deque[_PendingStatement] = deque()
        # Without a result so far, and with one whose sync point is still to come.
        self._in_flight: deque[_PendingStatement] = deque()
        self._answered: list[_PendingStatement] = []
        self._is_sending_soon = False
        self._loop = asyncio.get_running_loop()
        # No new statements are accepted. Those already accepted are completed.
        self.is_ended = False
        self._is_returned = False
        self._socket = self._libpq.socket
        self._libpq.enter_pipeline_mode()
        self._loop.add_reader(self._socket, self._receive)
        self._expiry = self._loop.call_later(lifetime, self.end)
        self._recheck_timer: asyncio.TimerHandle | None = None

    def send(self, pending: _PendingStatement) -> None:
        pending.rows = self._loop.create_future()
        self._unsent.append(pending)
        if not self._is_sending_soon:  # with the others of this turn of the loop
            self._is_sending_soon = True
            self._loop.call_soon(self._send_soon)
        if self._recheck_timer is None:
            self._recheck_timer = self._loop.call_later(RECHECK_SECONDS, self._recheck)

    def _send_soon(self) -> None:
        self._is_sending_soon = False
        self._send_unsent()
        self._return_if_done()

    @property
    def _is_waiting(self) -> bool:
        """Whether results or a sync point are to come."""
        return bool(self._in_flight or self._answered)

    def _recheck(self) -> None:
        self._recheck_timer = None
        if self._is_waiting:
            self._receive()
        if self._is_waiting:
            self._recheck_timer = self._loop.call_later(RECHECK_SECONDS, self._recheck)

    def end(self) -> None:
        """Accept no more statements, and return the connection when the pending ones are done."""
        self.is_ended = True
        self._expiry.cancel()
        self._return_if_done()

    def _return_if_done(self) -> None:
        if self.is_ended and not self._is_waiting and not self._unsent:
            self._return()

    def _return(self) -> None:
        if self._is_returned:  # another connection may have the socket's number now
            return
        self._is_returned = True
        if self._recheck_timer is not None:
            self._recheck_timer.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        if self._libpq.status != pq.ConnStatus.BAD:
            self._libpq.exit_pipeline_mode()
        self._return_connection(self._connection)

    def _send_unsent(self) -> None:
        if not self._unsent:
            return
        try:
            is_synced = True
            while self._unsent and len(self._in_flight) + len(self._answered) < MAX_IN_FLIGHT:
                pending = self._unsent.popleft()
                if pending.rows.done():  # its caller was cancelled
                    continue
                if pending.has_own_sync and not is_synced:
                    self._libpq.pipeline_sync()
                self._in_flight.append(pending)
                self._send(pending)
                is_synced = pending.has_own_sync
                if is_synced:
                    self._libpq.pipeline_sync()
            if not is_synced:
                self._libpq.pipeline_sync()
            self._flush()
        except psycopg.OperationalError as error:
            self._fail_all(error)

    def _send(self, pending: _PendingStatement) -> None:
        sql = pending.statement.sql
        if not self._prepare_statements:
            self._libpq.send_query_params(sql, pending.parameters, result_format=pq.Format.BINARY)
        else:
            name = self._prepared_names.get(sql)
            if name is None:
                pending.is_preparing = True
                name = self._prepared_names[sql] = b"pipelined_%d" % next(self._name_numbers)
                self._libpq.send_prepare(name, sql)
            self._libpq.send_query_prepared(
                name, pending.parameters, result_format=pq.Format.BINARY
            )

    def _flush(self) -> None:
        if self._libpq.flush():  # the socket's buffer is full
            self._loop.add_writer(self._socket, self._flush_more)

    def _flush_more(self) -> None:
        try:
            self._loop.remove_writer(self._socket)
            self._flush()
        except psycopg.OperationalError as error:
            self._fail_all(error)

    def _receive(self) -> None:
        try:
            self._libpq.consume_input()
            # libpq returns NULL after each result of a statement, and twice when there are no more.
            is_after_null = False
            while self._is_waiting and not self._libpq.is_busy():
                result = self._libpq.get_result()
                if result is not None:
                    self._process(result)
                elif is_after_null:
                    break
                is_after_null = result is None
        except psycopg.OperationalError as error:
            self._fail_all(error)
            return
        if self._libpq.status == pq.ConnStatus.BAD:
            self._fail_all(None)
            return
        self._send_unsent()
        self._return_if_done()

    def _process(self, result: pq.abc.PGresult) -> None:
        """Process the next result of the oldest statement in flight, or the next sync point."""
        if result.status == pq.ExecStatus.PIPELINE_SYNC:
            answered, self._answered = self._answered, []
            for pending in answered:
                self._complete(pending)
            return
        if not self._in_flight:  # the transaction failed at its end
            for pending in self._answered:
                pending.result = result
            return
        pending = self._in_flight[0]
        if pending.is_preparing:
            pending.is_preparing = False
            if result.status != pq.ExecStatus.COMMAND_OK:
                self._prepared_names.pop(pending.statement.sql, None)
                pending.result = result
            return
        if pending.result is None:
            pending.result = result
        self._answered.append(self._in_flight.popleft())

    def _complete(self, pending: _PendingStatement) -> None:
        result = pending.result
        if pending.rows.done():  # its caller was cancelled
            return
        if result is None or result.status not in (
            pq.ExecStatus.TUPLES_OK,
            pq.ExecStatus.COMMAND_OK,
        ):
            error = _error(result)
            if isinstance(error, pg_errors.InvalidSqlStatementName):
                self._forget_name(pending.statement)
            elif result is None or result.status != pq.ExecStatus.PIPELINE_ABORTED:
                pending.rows.set_exception(error)
                return
            pending.has_own_sync = True
            pending.result = None
            self._unsent.appendleft(pending)
            return
        try:
            rows = self._load(result, pending.types)
        except Exception as error:  # of a value that Python cannot hold, such as `infinity`
            pending.rows.set_exception(error)
        else:
            pending.rows.set_result(rows)

    def _load(self, result: pq.abc.PGresult, types: Sequence[int] | None) -> list[Row]:
        self._transformer.set_pgresult(result, set_loaders=types is None, format=pq.Format.BINARY)
        if types is not None:
            self._transformer.set_loader_types(types, pq.Format.BINARY)
        return self._transformer.load_rows(0, result.ntuples, tuple)

    def _forget_name(self, statement: _Statement) -> None:
        """Prepare a statement again, as an earlier one that was to prepare it has failed."""
        is_being_prepared = any(
            other.is_preparing for other in self._in_flight if other.statement is statement
        )
        if not is_being_prepared:
            self._prepared_names.pop(statement.sql, None)

    def _fail_all(self, error: psycopg.Error | None) -> None:
        """The connection is lost. The outcome of the statements in flight is unknown."""
        self.is_ended = True
        self._expiry.cancel()
        for pending in (*self._answered, *self._in_flight, *self._unsent):
            if not pending.rows.done():
                failure = pg_errors.ConnectionFailure("the connection was lost")
                failure.__cause__ = error
                pending.rows.set_exception(failure)
        self._answered.clear()
        self._in_flight.clear()
        self._unsent.clear()
        self._return()


def _error(result: pq.abc.PGresult | None) -> psycopg.Error:
    if result is None:
        return psycopg.InternalError("the statement has no result")
    return pg_errors.error_from_result(result)
