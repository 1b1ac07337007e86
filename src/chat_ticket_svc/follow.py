"""How a write wakes those who follow its session, here and in other processes.

After a commit, `changed` wakes the watchers of this process and hands the session to the
notifier, which tells the other processes with NOTIFY, outside of any write's transaction: NOTIFY
takes a global lock at commit. The listener hears what other processes tell. Both are only hints:
a watcher always reads by revision, and as a fallback the revisions of all watched sessions are
asked for in one statement every `poll_seconds`, and at once when the listener has reconnected.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import psycopg
import structlog

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database, connection_string

log = structlog.get_logger()

T = TypeVar("T")
Key = tuple[str, str]  # (tenant id, session id)

CHANNEL = "chat_ticket_session_changed"
NOTIFY = "SELECT pg_notify(%s, payload) FROM unnest(%s::text[]) AS payload"
UUID_LENGTH = 36
RECONNECT_SECONDS = 1

# What has not been told when this many sessions wait is left to the others' polls.
MAX_PENDING = 10_000


class Watcher:
    """One stream's wait for changes to its session."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()
        self._draining = False
        # The revision up to which the stream has read; None until it has.
        self.revision: int | None = None

    def wake(self) -> None:
        self._changed.set()

    def drain(self) -> None:
        self._draining = True
        self._changed.set()

    def about_to_read(self) -> None:
        """Forget the changes so far: what the read that follows misses will wake it again."""
        self._changed.clear()
        self._raise_if_draining()

    async def changed(self, timeout: float) -> bool:
        """Wait for a change, or for `timeout` seconds; says whether there was one."""
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._raise_if_draining()
        return True

    def _raise_if_draining(self) -> None:
        if self._draining:
            raise errors.UnavailableError("the server shuts down: resume", reason="DRAINING")


class Follow:
    """The watchers of this process, and what wakes them."""

    def __init__(self, db: Database, listen_url: str, *, poll_seconds: float, readers: int):
        self._db = db
        self._conninfo = connection_string(listen_url)
        self._poll_seconds = poll_seconds
        self._watchers: dict[Key, set[Watcher]] = defaultdict(set)
        # A thousand watchers that wake together must not fill the queue for connections, nor one
        # tenant's keep out another's. Weak: who reads nothing is forgotten.
        self._readers = readers
        self._reading = asyncio.Semaphore(readers)
        self._shares = WeakValueDictionary[str, asyncio.Semaphore]()
        self._pending: set[Key] = set()
        self._has_pending = asyncio.Event()
        self._poll_now = asyncio.Event()
        self._notifier_pid = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._draining = False

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._connected("notifier", self._notify)),
            asyncio.create_task(self._connected("listener", self._listen)),
            asyncio.create_task(self._poll()),
        ]

    def drain(self) -> None:
        """End every watch, now and from now on, with UNAVAILABLE: the clients resume elsewhere."""
        self._draining = True
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.drain()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def changed(self, tenant_id: str, session_id: str) -> None:
        """Tell everybody who follows the session; to be called after the commit."""
        key = (tenant_id, session_id)
        self._wake(key)
        if len(self._pending) < MAX_PENDING:
            self._pending.add(key)
            self._has_pending.set()

    @contextlib.contextmanager
    def watch(self, tenant_id: str, session_id: str) -> Iterator[Watcher]:
        """Register a watcher; to be entered before the first read, so that no change is missed."""
        key = (tenant_id, session_id)
        watcher = Watcher()
        if self._draining:
            watcher.drain()
        self._watchers[key].add(watcher)
        try:
            yield watcher
        finally:
            self._watchers[key].discard(watcher)
            if not self._watchers[key]:
                del self._watchers[key]

    async def read(self, tenant_id: str, page: Coroutine[Any, Any, T]) -> T:
        """Run a watcher's read when it is its turn."""
        share = self._shares.setdefault(tenant_id, asyncio.Semaphore(max(1, self._readers - 1)))
        try:
            async with share, self._reading:
                return await page
        finally:
            page.close()

    def _wake(self, key: Key) -> None:
        for watcher in self._watchers.get(key, ()):
            watcher.wake()

    async def _connected(
        self, name: str, run: Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]]
    ) -> None:
        """Keep `run` going on a connection of its own."""
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._conninfo, autocommit=True
                ) as connection:
                    await run(connection)
            except Exception as error:  # whatever it is, the next connection may do
                log.warning(f"{name} lost its connection", error=type(error).__qualname__)
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _notify(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """One NOTIFY in flight; what gathers meanwhile is the next."""
        self._notifier_pid = connection.info.backend_pid
        while True:
            await self._has_pending.wait()
            self._has_pending.clear()
            keys, self._pending = self._pending, set()
            payloads = [f"{session_id}{tenant_id}" for tenant_id, session_id in keys]
            await connection.execute(NOTIFY, (CHANNEL, payloads))

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        await connection.execute(f"LISTEN {CHANNEL}")
        self._poll_now.set()
        async for notification in connection.notifies():
            if notification.pid != self._notifier_pid:
                payload = notification.payload
                self._wake((payload[UUID_LENGTH:], payload[:UUID_LENGTH]))

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_seconds):
                    await self._poll_now.wait()
            self._poll_now.clear()
            if not self._watchers:
                continue
            try:
                found = await sessions.revisions(self._db, list(self._watchers))
            except Exception as error:  # whatever it is: without the poll a watcher could be stuck
                log.warning("could not poll the watched sessions", error=type(error).__qualname__)
                continue
            for key, revision in found.items():
                for watcher in self._watchers.get(key, ()):
                    if watcher.revision != revision:
                        watcher.wake()
