"""The connection pool, transactions, and the first of two hops: driver error → domain error.

Every statement runs in autocommit, prepared, with its results in binary, or inside `transaction`.
What is quick shares a connection (see lane.py), everything else takes one of its own.
What is retried here: serialization failures and deadlocks, and once, after the pool has been
checked, what a lost connection cut off and is safe to repeat.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, LiteralString, TypeVar

import psycopg
import psycopg_pool
from psycopg import errors as pg_errors

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store.connection import connection_string, is_lost
from chat_ticket_svc.store.driver_errors import ConnectionLost, translate
from chat_ticket_svc.store.pipelined_connection import PipelinedConnection
from chat_ticket_svc.store.transaction import Params, Transaction
from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.timeouts import Timeout

T = TypeVar("T")

CONTENTION_RETRIES = 3

# Reliability notes 10 and 15: bounded waits everywhere, and a dead peer noticed within seconds.
POOL_TIMEOUT_SECONDS = 2
POOL_MAX_LIFETIME_SECONDS = 1800
QUEUE_PLACES_PER_CONNECTION = 4
MAX_PIPELINED_CALLS = 1000
# Of what is read on a shared connection, so that nobody waits long behind it.
PIPELINED_MAX_ROWS = 32
PIPELINED_MAX_BYTES = 64 * 1024
# The connections that are shared come on top of the pool's size.
PIPELINED_CONNECTIONS = 2
# After which the pool tries again when it is asked, instead of backing off for minutes.
RECONNECT_SECONDS = 2


class _Attempt:
    """Whether what was sent so far may have been committed."""

    def __init__(self, *, outcome_unknown: bool = False):
        self.outcome_unknown = outcome_unknown


class _Share:
    """What the calls of one tenant have of the pool."""

    def __init__(self, connections: int):
        self.turns = asyncio.Semaphore(connections)
        self.busy = 0


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
        self._pool = psycopg_pool.AsyncConnectionPool(
            connection_string(
                url,
                statement_timeout=statement_timeout_ms,
                lock_timeout=lock_timeout_ms,
                idle_in_transaction_session_timeout="10s",
            ),
            kwargs={"autocommit": True, "prepare_threshold": 0 if prepare_statements else None},
            min_size=min(pool_size, 2),
            max_size=pool_size + PIPELINED_CONNECTIONS,
            reconnect_timeout=RECONNECT_SECONDS,
            timeout=POOL_TIMEOUT_SECONDS,
            max_lifetime=POOL_MAX_LIFETIME_SECONDS,
            open=False,
        )
        self._reads, self._writes = (
            PipelinedConnection(
                self._pool,
                prepare_statements=prepare_statements,
                lifetime_seconds=POOL_MAX_LIFETIME_SECONDS,
            )
            for _ in range(PIPELINED_CONNECTIONS)
        )
        self._checking: asyncio.Task[None] | None = None
        self._renewing: asyncio.Task[None] | None = None
        self._renewed_at = -math.inf
        # Counted here and not by the pool's max_waiting, which counts callers who have left.
        self._busy = 0
        self._leased_now = 0
        self._most_busy = pool_size * (1 + QUEUE_PLACES_PER_CONNECTION)
        # Half of the connections, so that a tenant whose calls hang, or come all at once, is waited
        # for by itself alone. Weak: who has nothing to do is forgotten.
        self._share = (pool_size + 1) // 2
        self._shares: weakref.WeakValueDictionary[str | None, _Share] = (
            weakref.WeakValueDictionary()
        )

    async def open(self) -> None:
        """Start connecting. Does not wait: a database that is down must not stop the server."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        if self._renewing is not None:
            await asyncio.gather(self._renewing, return_exceptions=True)
        await self._reads.close()
        await self._writes.close()
        await self._pool.close()

    def report(self) -> None:
        """Have the metrics of the pool tell of this one."""
        stats = self._pool.get_stats
        metrics.POOL_CONNECTIONS.set_function(lambda: stats()["pool_size"])
        metrics.POOL_IDLE.set_function(lambda: stats()["pool_available"])
        metrics.POOL_WAITING.set_function(lambda: self._busy - self._leased_now)

    async def check(self) -> None:
        """Raises UnavailableError unless the pool has a connection that works."""
        await self.fetch_all("SELECT 1", {}, int)

    async def fetch_all(
        self,
        sql: LiteralString,
        params: Params,
        make: Callable[..., T],
        *,
        prepare: bool | None = None,
    ) -> list[T]:
        """Read rows in one statement, `make(*columns)` each.

        `prepare=False` has it planned each time, for the very parameters: PostgreSQL may settle on
        one plan for what it has prepared, as for a tenant of average size.
        """

        async def work(transaction: Transaction, _: _Attempt) -> list[T]:
            return await transaction.fetch_all(sql, params, make, prepare=prepare)

        return await self._run(self._leased(work), idempotent=True)

    async def fetch_typed(
        self,
        sql: LiteralString,
        params: Params,
        types: Sequence[int],
    ) -> list[tuple[Any, ...]]:
        """As `rows`, but the columns are read as `types`."""

        async def work(transaction: Transaction, _: _Attempt) -> list[tuple[Any, ...]]:
            return await transaction.fetch_typed(sql, params, types)

        return await self._run(self._leased(work), idempotent=True)

    async def fetch_one(
        self, sql: LiteralString, params: Params, make: Callable[..., T]
    ) -> T | None:
        """Read one row, or None, by its key: it shares a connection with other such statements."""
        found = await self.fetch_pipelined(sql, params)
        return make(*found[0]) if found else None

    async def fetch_pipelined(
        self, sql: LiteralString, params: Params, types: Sequence[int] | None = None
    ) -> list[tuple[Any, ...]]:
        """As `rows` or `fetch_typed`, when the statement is nearly as quick as that of `row`.

        For reads of at most PIPELINED_MAX_ROWS rows and PIPELINED_MAX_BYTES that an index finds.
        """

        async def work(attempt: _Attempt) -> list[tuple[Any, ...]]:
            return await self._shared(self._reads, sql, params, attempt, types)

        return await self._run(work, idempotent=True)

    async def write(
        self,
        sql: LiteralString,
        params: Params,
        make: Callable[..., T],
        *,
        idempotent: bool,
        outcome_unknown: bool = False,
    ) -> list[T]:
        """Write in one statement that is its own transaction, and return its rows.

        `idempotent` says that running it again does no harm. `outcome_unknown` says that an earlier
        attempt may have committed it.
        """

        async def work(transaction: Transaction, attempt: _Attempt) -> list[T]:
            attempt.outcome_unknown = True
            return await transaction.fetch_all(sql, params, make)

        return await self._run(
            self._leased(work), idempotent=idempotent, outcome_unknown=outcome_unknown
        )

    async def write_pipelined(self, sql: LiteralString, params: Params) -> list[tuple[Any, ...]]:
        """Write in one statement that waits for no lock, on a connection for such statements.

        Nothing is repeated here: ConnectionLost says that it may have happened.
        """
        try:
            return await self._shared(self._writes, sql, params, _Attempt())
        except psycopg.Error as error:
            raise self._translated(error) from error

    async def transaction(
        self, body: Callable[[Transaction], Awaitable[T]], *, idempotent: bool
    ) -> T:
        """Run `body` in a READ COMMITTED transaction; it may be run again after a conflict.

        `idempotent` says that running it again after it was committed does no harm.
        """

        async def work(transaction: Transaction, attempt: _Attempt) -> T:
            await transaction.execute("BEGIN", {})
            try:
                result = await body(transaction)
            except BaseException:
                with contextlib.suppress(psycopg.Error):
                    await transaction.execute("ROLLBACK", {})
                raise
            attempt.outcome_unknown = True
            await transaction.execute("COMMIT", {})
            return result

        return await self._run(self._leased(work), idempotent=idempotent)

    def _leased(
        self, work: Callable[[Transaction, _Attempt], Awaitable[T]]
    ) -> Callable[[_Attempt], Awaitable[T]]:
        """`work` on a connection of its own."""

        async def leased(attempt: _Attempt) -> T:
            async with self._connection(attempt) as connection:
                try:
                    return await work(Transaction(connection), attempt)
                except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                    if is_lost(error, connection):
                        raise ConnectionLost from error
                    raise

        return leased

    async def _shared(
        self,
        lane: PipelinedConnection,
        sql: LiteralString,
        params: Params,
        attempt: _Attempt,
        types: Sequence[int] | None = None,
    ) -> list[tuple[Any, ...]]:
        if lane.busy >= MAX_PIPELINED_CALLS:
            raise self._queue_full(attempt)
        try:
            with tracing.statement(sql):
                return await lane.fetch(sql, params, types)
        except pg_errors.ConnectionFailure as error:
            raise ConnectionLost from error
        except psycopg_pool.PoolTimeout as error:
            raise self._lost(attempt) from error

    async def _run(
        self,
        work: Callable[[_Attempt], Awaitable[T]],
        *,
        idempotent: bool,
        outcome_unknown: bool = False,
    ) -> T:
        attempt = _Attempt(outcome_unknown=outcome_unknown)
        conflicts = 0
        retried = False
        outcome_was_unknown = (
            outcome_unknown  # a conflict undoes its own attempt, not one whose commit was lost
        )
        while True:
            try:
                return await work(attempt)
            except (pg_errors.SerializationFailure, pg_errors.DeadlockDetected) as error:
                attempt.outcome_unknown = outcome_was_unknown
                conflicts += 1
                if conflicts > CONTENTION_RETRIES:
                    lost = self._lost(attempt) if outcome_was_unknown else errors.ContentionError()
                    raise lost from error
            except ConnectionLost as error:
                if retried or (attempt.outcome_unknown and not idempotent):
                    raise self._lost(attempt) from error
                retried = True
                outcome_was_unknown = attempt.outcome_unknown
            except psycopg.Error as error:
                raise self._translated(error) from error
            if retried:
                await self._check_pool(attempt)
            else:
                await asyncio.sleep(random.uniform(0, 0.01 * 2**conflicts))  # noqa: S311 - jitter

    @contextlib.asynccontextmanager
    async def _connection(self, attempt: _Attempt) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """One of the tenant's share."""
        share = self._shares.setdefault(request_context.tenant_id_or_none(), _Share(self._share))
        with self._place(share, attempt):
            with tracing.pool_wait():
                connection = await self._take(share, attempt)
            self._leased_now += 1
            try:
                yield connection
            finally:
                self._leased_now -= 1
                try:
                    await self._pool.putconn(connection)
                finally:
                    share.turns.release()

    async def _take(self, share: _Share, attempt: _Attempt) -> psycopg.AsyncConnection[Any]:
        """A turn of the tenant's and a connection, within POOL_TIMEOUT_SECONDS for both."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            with Timeout(POOL_TIMEOUT_SECONDS):
                await share.turns.acquire()
        except TimeoutError as error:
            raise self._lost(attempt) from error
        try:
            left = began + POOL_TIMEOUT_SECONDS - clock()
            connection = await self._pool.getconn(max(left, 0.001))
        except BaseException as error:
            share.turns.release()
            if isinstance(error, psycopg.Error):
                raise self._lost(attempt) from error
            raise
        metrics.POOL_WAIT_SECONDS.observe(clock() - began)
        return connection

    @contextlib.contextmanager
    def _place(self, share: _Share, attempt: _Attempt) -> Iterator[None]:
        """One of those who have or wait for a connection, however many tenants they are of.

        When all places are taken, a tenant that has fewer than its part of them gets one more: so
        that those who come in crowds wait for one another, and not everybody for all of them.
        """
        part = max(1, self._most_busy // len(self._shares))
        if share.busy >= self._most_busy or (self._busy >= self._most_busy and share.busy >= part):
            raise self._queue_full(attempt)
        self._busy += 1
        share.busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            share.busy -= 1

    def _queue_full(self, attempt: _Attempt) -> errors.DomainError:
        if attempt.outcome_unknown:
            return self._lost(attempt)
        return errors.ResourceExhaustedError(
            "too many calls wait for a database connection", reason="POOL_QUEUE_FULL"
        )

    def _lost(self, attempt: _Attempt) -> errors.UnavailableError:
        if attempt.outcome_unknown:
            return errors.OutcomeUnknownError()
        return errors.UnavailableError(
            "the database cannot be reached, or not in time", reason="DATABASE_UNAVAILABLE"
        )

    def _translated(self, error: psycopg.Error) -> Exception:
        if isinstance(error, pg_errors.ReadOnlySqlTransaction):
            self._renew()
        return translate(error)

    def _renew(self) -> None:
        """Replace all connections: after a failover their server may be a primary no more.

        Until then writes would go on to fail, and reads to tell of the past. Where that server
        is all there is, and read-only for long, this comes once in RECONNECT_SECONDS.
        """
        now = asyncio.get_running_loop().time()
        if now < self._renewed_at + RECONNECT_SECONDS:
            return
        self._renewed_at = now
        self._renewing = asyncio.create_task(self._pool.drain())
        self._reads.let_go()
        self._writes.let_go()

    async def _check_pool(self, attempt: _Attempt) -> None:
        """Drop the dead connections, once for everybody who met one."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._pool.check())
        try:
            await asyncio.shield(self._checking)
        except psycopg.Error as error:
            raise self._lost(attempt) from error
