"""The queue for connections of the pool: bounded in length and in time, and fair to tenants.

Before it, the calls that lock the same session or ticket take turns.
"""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import psycopg
import psycopg_pool

from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.timeouts import Timeout

Connection = psycopg.AsyncConnection[Any]

LEASE_TIMEOUT_SECONDS = 2
WAITING_CALLS_PER_CONNECTION = 4
# One has the row's lock and commits, the other waits for it: more would not be faster.
CALLS_PER_ROW = 2


class QueueFull(Exception):  # noqa: N818 - a signal to Database, never to a caller
    """Too many calls have or wait for a connection."""


class PoolBusy(Exception):  # noqa: N818 - as above
    """The call waited LEASE_TIMEOUT_SECONDS while other calls had the connections."""


class RowBusy(Exception):  # noqa: N818 - as above
    """The call waited for its turn to lock a row as long as it may wait for a lock."""


class NoConnection(Exception):  # noqa: N818 - as above
    """The pool cannot connect to the database."""


def tenant_connections(pool_size: int) -> int:
    """How many connections of the pool one tenant may use at once."""
    return (pool_size + 1) // 2


class TenantShare:
    """The part of the pool and of the queue that the calls of one tenant use."""

    def __init__(self, max_connections: int):
        self.connections = asyncio.Semaphore(max_connections)
        self.calls = 0


class ConnectionQueue:
    """Leases connections of a pool to calls.

    A tenant has at most half of the connections. So if its calls hang, or many come at once, only
    its own calls wait for them. Of the calls that lock one session or ticket, CALLS_PER_ROW at most
    have or wait for a connection. So when something holds its lock for long, the tenant's other
    calls still get connections.
    """

    def __init__(
        self,
        pool: psycopg_pool.AsyncConnectionPool[Connection],
        *,
        pool_size: int,
        lock_timeout_seconds: float,
    ):
        self._pool = pool
        self._lock_timeout_seconds = lock_timeout_seconds
        # The pool has more connections: those that are never leased. So a call that has this
        # semaphore and gets no connection knows that the pool cannot connect.
        self._connections = asyncio.Semaphore(pool_size)
        # The calls that have or wait for a connection.
        self._calls = 0
        self._leased = 0
        self._max_calls = pool_size * (1 + WAITING_CALLS_PER_CONNECTION)
        self._max_tenant_connections = tenant_connections(pool_size)
        # Leaves the tenant a connection for its other calls, if it has more than one.
        self._max_row_calls = min(CALLS_PER_ROW, max(1, self._max_tenant_connections - 1))
        # Weak references, so that tenants and rows without calls are forgotten.
        self._shares: weakref.WeakValueDictionary[str | None, TenantShare] = (
            weakref.WeakValueDictionary()
        )
        self._rows: weakref.WeakValueDictionary[tuple[str | None, str], asyncio.Semaphore] = (
            weakref.WeakValueDictionary()
        )

    @property
    def waiting(self) -> int:
        """How many calls wait for a connection."""
        return self._calls - self._leased

    @contextlib.asynccontextmanager
    async def lease(
        self, tenant_id: str | None, *, locks: Sequence[str] = ()
    ) -> AsyncIterator[Connection]:
        """A connection for a call of the tenant, which locks the sessions and tickets of these ids.

        A call that locks a session and a ticket names the session first. Raises RowBusy, QueueFull,
        PoolBusy or NoConnection.
        """
        async with contextlib.AsyncExitStack() as turns:
            for row_id in locks:
                await turns.enter_async_context(self._turn(tenant_id, row_id))
            share = self._shares.setdefault(tenant_id, TenantShare(self._max_tenant_connections))
            with self._counted(share):
                with tracing.pool_wait():
                    connection = await self._acquire(share)
                self._leased += 1
                try:
                    yield connection
                finally:
                    self._leased -= 1
                    try:
                        await self._pool.putconn(connection)
                    finally:
                        self._connections.release()
                        share.connections.release()

    @contextlib.asynccontextmanager
    async def _turn(self, tenant_id: str | None, row_id: str) -> AsyncIterator[None]:
        """Wait, without a connection, until few enough other calls lock this row."""
        row = self._rows.setdefault((tenant_id, row_id), asyncio.Semaphore(self._max_row_calls))
        try:
            with Timeout(self._lock_timeout_seconds):
                await row.acquire()
        except TimeoutError as error:
            raise RowBusy from error
        try:
            yield
        finally:
            row.release()

    async def _acquire(self, share: TenantShare) -> Connection:
        """Wait for the tenant's share, then for the pool; LEASE_TIMEOUT_SECONDS in all."""
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            with Timeout(LEASE_TIMEOUT_SECONDS):
                await share.connections.acquire()
                try:
                    await self._connections.acquire()
                except BaseException:
                    share.connections.release()
                    raise
        except TimeoutError as error:
            raise PoolBusy from error
        try:
            remaining = started + LEASE_TIMEOUT_SECONDS - clock()
            connection = await self._pool.getconn(max(remaining, 0.001))
        except BaseException as error:
            self._connections.release()
            share.connections.release()
            if isinstance(error, psycopg.Error):
                raise NoConnection from error
            raise
        metrics.POOL_WAIT_SECONDS.observe(clock() - started)
        return connection

    @contextlib.contextmanager
    def _counted(self, share: TenantShare) -> Iterator[None]:
        """Count the call while it has or waits for a connection. Raises QueueFull.

        When the queue is full, a tenant that uses less than its fair part of it may still enter. So
        a burst of one tenant does not keep the others out. These calls may exceed `_max_calls`.
        """
        fair_part = max(1, self._max_calls // len(self._shares))
        is_full = self._calls >= self._max_calls
        if share.calls >= self._max_calls or (is_full and share.calls >= fair_part):
            raise QueueFull
        self._calls += 1
        share.calls += 1
        try:
            yield
        finally:
            self._calls -= 1
            share.calls -= 1
