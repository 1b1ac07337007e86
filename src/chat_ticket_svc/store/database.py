"""Statements and transactions on PostgreSQL, with retries, on a pool of connections.

A statement runs in autocommit mode, prepared, with binary results, or in a `transaction`. Short
statements share a connection (see pipelined_connection.py). All others lease one (see
connection_queue.py). Driver errors become domain errors here (see driver_errors.py).

Serialization failures and deadlocks are retried, and bodies that raise StartAgain. If a connection
is lost, the pool is checked, and idempotent work is retried once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
import psycopg_pool
from psycopg import errors as pg_errors

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store.connection import (
    PoolConnection,
    connection_string,
    is_lost,
    prepare_session,
)
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.connection_queue import (
    LEASE_TIMEOUT_SECONDS,
    ConnectionQueue,
    NoConnection,
    PoolBusy,
    QueueFull,
    RowBusy,
)
from chat_ticket_svc.store.driver_errors import CancellationDetector, ConnectionLost, translate
from chat_ticket_svc.store.pipelined_connection import PipelinedConnection
from chat_ticket_svc.store.transaction import Params, StartAgain, Transaction
from chat_ticket_svc.telemetry import metrics, tracing

T = TypeVar("T")

CONTENTION_RETRIES = 3

POOL_MAX_LIFETIME_SECONDS = 1800
# The pool gives up connecting after this time, and tries again when a connection is requested,
# instead of backing off for minutes. Also the least time between two replacements of all
# connections.
RECONNECT_SECONDS = 2

MAX_PIPELINED_CALLS = 1000
# Limits for a read on a pipelined connection, so that no call waits long behind another.
PIPELINED_MAX_ROWS = 32
PIPELINED_MAX_BYTES = 64 * 1024
# One for reads and one for writes, in addition to the pool size.
PIPELINED_CONNECTIONS = 2


# Until the transaction ends. A snapshot holds no locks, and its reader may write to a slow pipe.
SNAPSHOT_IDLE_TIMEOUT = "SELECT set_config('idle_in_transaction_session_timeout', '60s', true)"

# After these errors callers take it that nothing was written.
_NOTHING_WRITTEN = (
    errors.ContentionError,
    errors.EtagMismatchError,
    errors.ResourceExhaustedError,
    errors.UnavailableError,
    errors.UnsupportedError,
)


class _Outcome:
    """What is known of the outcome of an operation, over all its attempts.

    `is_unknown` says that the statements sent so far may have been committed.
    """

    def __init__(self, *, is_unknown: bool = False):
        self.is_unknown = is_unknown

    def or_unknown(self, error: Exception) -> Exception:
        """`error`, unless it tells the caller that nothing was written, which is not known."""
        if self.is_unknown and isinstance(error, _NOTHING_WRITTEN):
            return errors.OutcomeUnknownError()
        return error


def _name_cause(record: logging.LogRecord) -> bool:
    """A logging filter that puts the cause into the pool's line about a failed connection.

    The text of the error may quote the URL, so the log would show only its type.
    """
    if record.msg == "error connecting in %r: %s" and isinstance(record.args, tuple):
        error = record.args[1]
        if isinstance(error, Exception):
            record.msg, record.args = f"error connecting in the pool: {cause(error)}", ()
    return True


class Database:
    """A pool of connections to one PostgreSQL database."""

    def __init__(
        self,
        url: str,
        *,
        pool_size: int,
        prepare_statements: bool,
        statement_timeout_ms: int,
        lock_timeout_ms: int,
    ):
        logging.getLogger("psycopg.pool").addFilter(_name_cause)  # once, however often it is added
        self._pool: psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]
        self._pool = psycopg_pool.AsyncConnectionPool(
            connection_string(
                url,
                statement_timeout=statement_timeout_ms,
                lock_timeout=lock_timeout_ms,
            ),
            connection_class=PoolConnection,
            configure=prepare_session,
            kwargs={"autocommit": True, "prepare_threshold": 0 if prepare_statements else None},
            min_size=min(pool_size, 2),
            max_size=pool_size + PIPELINED_CONNECTIONS,
            reconnect_timeout=RECONNECT_SECONDS,
            timeout=LEASE_TIMEOUT_SECONDS,
            max_lifetime=POOL_MAX_LIFETIME_SECONDS,
            open=False,
        )
        self._statement_timeout_seconds = statement_timeout_ms / 1000
        self._queue = ConnectionQueue(
            self._pool, pool_size=pool_size, lock_timeout_seconds=lock_timeout_ms / 1000
        )
        self._reads, self._writes = (
            PipelinedConnection(
                self._pool,
                prepare_statements=prepare_statements,
                lifetime_seconds=POOL_MAX_LIFETIME_SECONDS,
                reads_only=reads_only,
            )
            for reads_only in (True, False)
        )
        self._pool_check: asyncio.Task[None] | None = None
        self._replacement: asyncio.Task[None] | None = None
        self._replaced_at = -math.inf

    async def open(self) -> None:
        """Start to connect, without waiting. The server starts even if the database is down."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        if self._replacement is not None:
            await asyncio.gather(self._replacement, return_exceptions=True)
        await self._reads.close()
        await self._writes.close()
        await self._pool.close()

    def register_metrics(self) -> None:
        """Make the pool metrics report this pool."""
        stats = self._pool.get_stats
        metrics.POOL_CONNECTIONS.set_function(lambda: stats()["pool_size"])
        metrics.POOL_IDLE.set_function(lambda: stats()["pool_available"])
        metrics.POOL_WAITING.set_function(lambda: self._queue.waiting)

    async def check(self) -> None:
        """Raise UnavailableError unless the pool has a working connection."""
        await self.fetch_all("SELECT 1", {}, int)

    async def fetch_all(
        self,
        sql: LiteralString,
        params: Params,
        make_row: Callable[..., T],
        *,
        prepare: bool | None = None,
        outcome_unknown: bool = False,
    ) -> list[T]:
        """Read rows in one statement, and return `make_row(*columns)` for each.

        With `prepare=False`, PostgreSQL plans the statement for its parameters each time. For a
        prepared statement it may use one generic plan, which fits a tenant of average size.
        `outcome_unknown` says that this looks for what an earlier statement of the call may have
        committed.
        """

        async def work(transaction: Transaction, _: _Outcome) -> list[T]:
            return await transaction.fetch_all(sql, params, make_row, prepare=prepare)

        return await self._run_with_retries(
            self._with_lease(work), idempotent=True, outcome_unknown=outcome_unknown
        )

    async def fetch_typed(
        self,
        sql: LiteralString,
        params: Params,
        types: Sequence[int],
    ) -> list[tuple[Any, ...]]:
        """As `fetch_all`, but return tuples, with the columns decoded as `types`."""

        async def work(transaction: Transaction, _: _Outcome) -> list[tuple[Any, ...]]:
            return await transaction.fetch_typed(sql, params, types)

        return await self._run_with_retries(self._with_lease(work), idempotent=True)

    async def fetch_by_key(
        self,
        sql: LiteralString,
        params: Params,
        make_row: Callable[..., T],
        *,
        outcome_unknown: bool = False,
    ) -> T | None:
        """Read one row by its key, or None, on the pipelined connection.

        `outcome_unknown` is that of `fetch_all`.
        """
        rows = await self.fetch_pipelined(sql, params, outcome_unknown=outcome_unknown)
        return make_row(*rows[0]) if rows else None

    async def fetch_pipelined(
        self,
        sql: LiteralString,
        params: Params,
        types: Sequence[int] | None = None,
        *,
        outcome_unknown: bool = False,
    ) -> list[tuple[Any, ...]]:
        """As `fetch_all` or `fetch_typed`, on the pipelined connection.

        Only for reads that use an index and return at most PIPELINED_MAX_ROWS rows and
        PIPELINED_MAX_BYTES, as the calls behind them wait.
        """
        # Nearly all succeed at once. What a retry needs is made for those that do not.
        try:
            return await self._run_pipelined(
                self._reads, sql, params, types, outcome_unknown=outcome_unknown
            )
        except (psycopg.Error, ConnectionLost) as error:
            failed: list[Exception] = [error]

        async def work(outcome: _Outcome) -> list[tuple[Any, ...]]:
            if failed:
                raise failed.pop()
            return await self._run_pipelined(
                self._reads, sql, params, types, outcome_unknown=outcome.is_unknown
            )

        return await self._run_with_retries(work, idempotent=True, outcome_unknown=outcome_unknown)

    async def write(
        self,
        sql: LiteralString,
        params: Params,
        make_row: Callable[..., T],
        *,
        idempotent: bool,
        outcome_unknown: bool = False,
        locks: Sequence[str] = (),
    ) -> list[T]:
        """Write in one statement, which is a transaction of its own, and return its rows.

        `locks` has the ids of the session and of the ticket that it locks, if any. `idempotent`
        says that the statement can be repeated safely. `outcome_unknown` says that an earlier
        attempt may have committed it.
        """

        async def work(transaction: Transaction, outcome: _Outcome) -> list[T]:
            outcome.is_unknown = True
            return await transaction.fetch_all(sql, params, make_row)

        return await self._run_with_retries(
            self._with_lease(work, locks=locks),
            idempotent=idempotent,
            outcome_unknown=outcome_unknown,
        )

    async def write_pipelined(self, sql: LiteralString, params: Params) -> list[tuple[Any, ...]]:
        """Write in one statement that waits for no lock, on the pipelined connection for writes.

        It is not retried. After ConnectionLost it may have been committed.
        """
        try:
            return await self._run_pipelined(self._writes, sql, params)
        except psycopg.Error as error:
            raise self._translated(error) from error

    async def transaction(
        self,
        body: Callable[[Transaction], Awaitable[T]],
        *,
        idempotent: bool,
        locks: Sequence[str] = (),
    ) -> T:
        """Run `body` in a READ COMMITTED transaction, again after a conflict.

        `locks` has the ids of the session and of the ticket that it locks first, if any.
        `idempotent` says that `body` can be repeated safely after it was committed.
        """

        async def work(transaction: Transaction, outcome: _Outcome) -> T:
            await transaction.execute("BEGIN ISOLATION LEVEL READ COMMITTED", {})
            try:
                result = await body(transaction)
            except BaseException:
                with contextlib.suppress(psycopg.Error):
                    await transaction.execute("ROLLBACK", {})
                raise
            outcome.is_unknown = True
            await transaction.execute("COMMIT", {})
            return result

        return await self._run_with_retries(
            self._with_lease(work, locks=locks), idempotent=idempotent
        )

    @contextlib.asynccontextmanager
    async def snapshot(self) -> AsyncIterator[Transaction]:
        """A read-only transaction whose statements all see the database as at the first of them.

        Nothing is retried, because the caller may have used what was read.
        """
        try:
            async with self._queue.lease(request_context.tenant_id_or_none()) as connection:
                transaction = Transaction(
                    connection, statement_timeout_seconds=self._statement_timeout_seconds
                )
                await transaction.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", {})
                await transaction.execute(SNAPSHOT_IDLE_TIMEOUT, {})
                try:
                    yield transaction
                finally:
                    with contextlib.suppress(psycopg.Error):
                        await transaction.execute("ROLLBACK", {})
        except QueueFull:
            raise self._queue_full(_Outcome()) from None
        except PoolBusy:
            raise errors.ResourceExhaustedError(
                "no database connection became free in time", reason="POOL_TIMEOUT"
            ) from None
        except NoConnection as error:
            raise self._unavailable(_Outcome()) from error
        except (psycopg.OperationalError, psycopg.InterfaceError) as error:
            if is_lost(error, connection):
                raise self._unavailable(_Outcome()) from error
            raise self._translated(error) from error
        except psycopg.Error as error:
            raise self._translated(error) from error

    def _with_lease(
        self,
        work: Callable[[Transaction, _Outcome], Awaitable[T]],
        *,
        locks: Sequence[str] = (),
    ) -> Callable[[_Outcome], Awaitable[T]]:
        """`work`, run on a leased connection."""

        async def leased(outcome: _Outcome) -> T:
            try:
                async with self._queue.lease(
                    request_context.tenant_id_or_none(), locks=locks
                ) as connection:
                    try:
                        transaction = Transaction(
                            connection, statement_timeout_seconds=self._statement_timeout_seconds
                        )
                        return await work(transaction, outcome)
                    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                        if is_lost(error, connection):
                            raise ConnectionLost from error
                        raise
            except RowBusy:
                raise outcome.or_unknown(errors.ContentionError()) from None
            except QueueFull:
                raise self._queue_full(outcome) from None
            except PoolBusy:
                raise outcome.or_unknown(
                    errors.ResourceExhaustedError(
                        "no database connection became free in time", reason="POOL_TIMEOUT"
                    )
                ) from None
            except NoConnection as error:
                raise self._unavailable(outcome) from error

        return leased

    async def _run_pipelined(
        self,
        connection: PipelinedConnection,
        sql: LiteralString,
        params: Params,
        types: Sequence[int] | None = None,
        *,
        outcome_unknown: bool = False,
    ) -> list[tuple[Any, ...]]:
        if connection.pending >= MAX_PIPELINED_CALLS:
            raise self._queue_full(_Outcome(is_unknown=outcome_unknown))
        try:
            with tracing.statement(sql), CancellationDetector(self._statement_timeout_seconds):
                return await connection.fetch(sql, params, types)
        except pg_errors.ConnectionFailure as error:
            raise ConnectionLost from error
        except psycopg_pool.PoolTimeout as error:
            raise self._unavailable(_Outcome(is_unknown=outcome_unknown)) from error

    async def _run_with_retries(
        self,
        work: Callable[[_Outcome], Awaitable[T]],
        *,
        idempotent: bool,
        outcome_unknown: bool = False,
    ) -> T:
        outcome = _Outcome(is_unknown=outcome_unknown)
        conflicts = 0
        retried = False
        # An error of the database undoes this attempt. An earlier one, whose connection was lost,
        # may still have committed.
        earlier_outcome_unknown = outcome_unknown
        while True:
            try:
                return await work(outcome)
            except (
                pg_errors.SerializationFailure,
                pg_errors.DeadlockDetected,
                StartAgain,
            ) as error:
                outcome.is_unknown = earlier_outcome_unknown
                conflicts += 1
                if conflicts > CONTENTION_RETRIES:
                    raise outcome.or_unknown(errors.ContentionError()) from error
            except ConnectionLost as error:
                if retried or (outcome.is_unknown and not idempotent):
                    raise self._unavailable(outcome) from error
                retried = True
                earlier_outcome_unknown = outcome.is_unknown
            except errors.EtagMismatchError as error:
                # Perhaps an earlier attempt has made its change, and another call one behind it.
                raise outcome.or_unknown(error) from None
            except psycopg.Error as error:
                outcome.is_unknown = earlier_outcome_unknown
                raise outcome.or_unknown(self._translated(error)) from error
            if retried:
                await self._check_pool(outcome)
            else:
                await asyncio.sleep(random.uniform(0, 0.01 * 2**conflicts))  # noqa: S311 - jitter

    def _queue_full(self, outcome: _Outcome) -> Exception:
        return outcome.or_unknown(
            errors.ResourceExhaustedError(
                "too many calls wait for a database connection", reason="POOL_QUEUE_FULL"
            )
        )

    def _unavailable(self, outcome: _Outcome) -> Exception:
        return outcome.or_unknown(
            errors.UnavailableError("the database cannot be reached", reason="DATABASE_UNAVAILABLE")
        )

    def _translated(self, error: psycopg.Error) -> Exception:
        if isinstance(error, pg_errors.ReadOnlySqlTransaction):
            self._replace_connections()
        return translate(error)

    def _replace_connections(self) -> None:
        """Replace all connections, as after a failover their server may be a standby.

        On a standby, writes keep failing, and reads return old data. If the only server stays
        read-only, this happens every RECONNECT_SECONDS at most.
        """
        now = asyncio.get_running_loop().time()
        if now < self._replaced_at + RECONNECT_SECONDS:
            return
        self._replaced_at = now
        self._replacement = asyncio.create_task(self._pool.drain())
        self._reads.release_connection()
        self._writes.release_connection()

    async def _check_pool(self, outcome: _Outcome) -> None:
        """Drop broken connections; concurrent calls share one check."""
        if self._pool_check is None or self._pool_check.done():
            self._pool_check = asyncio.create_task(self._pool.check())
        try:
            await asyncio.shield(self._pool_check)
        except psycopg.Error as error:
            raise self._unavailable(outcome) from error
