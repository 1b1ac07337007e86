"""The queue for connections of the pool: bounded in length and in time, and fair to tenants."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import psycopg_pool

from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.timeouts import Timeout

Connection = psycopg.AsyncConnection[Any]

LEASE_TIMEOUT_SECONDS = 2
WAITING_CALLS_PER_CONNECTION = 4


class QueueFull(Exception):  # noqa: N818 - a signal to Database, never to a caller
    """Too many calls have or wait for a connection."""


class NoConnection(Exception):  # noqa: N818 - as above
    """The call waited LEASE_TIMEOUT_SECONDS for a connection, or the pool cannot connect."""


class TenantShare:
    """The part of the pool and of the queue that the calls of one tenant use."""

    def __init__(self, max_connections: int):
        self.connections = asyncio.Semaphore(max_connections)
        self.calls = 0


class ConnectionQueue:
    """Leases connections of a pool to calls.

    A tenant has at most half of the connections. So if its calls hang, or many come at once, only
    its own calls wait for them.
    """

    def __init__(self, pool: psycopg_pool.AsyncConnectionPool[Connection], *, pool_size: int):
        self._pool = pool
        # The calls that have or wait for a connection. The pool's own count of waiting calls
        # includes cancelled ones.
        self._calls = 0
        self._leased = 0
        self._max_calls = pool_size * (1 + WAITING_CALLS_PER_CONNECTION)
        self._max_tenant_connections = (pool_size + 1) // 2
        # Weak references, so that tenants without calls are forgotten.
        self._shares: weakref.WeakValueDictionary[str | None, TenantShare] = (
            weakref.WeakValueDictionary()
        )

    @property
    def waiting(self) -> int:
        """How many calls wait for a connection."""
        return self._calls - self._leased

    @contextlib.asynccontextmanager
    async def lease(self, tenant_id: str | None) -> AsyncIterator[Connection]:
        """A connection for a call of the tenant. Raises QueueFull or NoConnection."""
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
                    share.connections.release()

    async def _acquire(self, share: TenantShare) -> Connection:
        """Wait for the tenant's share, then for the pool; LEASE_TIMEOUT_SECONDS in all."""
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            with Timeout(LEASE_TIMEOUT_SECONDS):
                await share.connections.acquire()
        except TimeoutError as error:
            raise NoConnection from error
        try:
            remaining = started + LEASE_TIMEOUT_SECONDS - clock()
            connection = await self._pool.getconn(max(remaining, 0.001))
        except BaseException as error:
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
