"""How the server processes tell one another that a session has changed.

A write is announced with NOTIFY after its commit, outside of its transaction: PostgreSQL takes a
global lock when a transaction that has notified commits. Each process listens for the
notifications of the others.

Notifications may get lost. As a fallback the revisions of all watched sessions are polled, in one
statement, every `watch_poll_interval_seconds` and whenever the listener has connected.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import psycopg
import structlog

from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.connection import connect, connection_string
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings
from chat_ticket_svc.timeouts import Timeout

log = structlog.get_logger()

SessionKey = tuple[str, str]  # (tenant id, session id)

CHANNEL = "chat_ticket_session_changed"
NOTIFY = "SELECT pg_notify(%s, %s)"
UUID_LENGTH = 36
RECONNECT_SECONDS = 1
# How often the listener looks for a closed connection: libuv may report the end of a socket only
# once, together with earlier data, and then never again.
CONNECTION_CHECK_SECONDS = 1

# A NOTIFY costs half as much as a write. Under load one NOTIFY announces several sessions, one per
# line of its payload. PostgreSQL limits the payload to less than 8,000 bytes; a line has at most
# 36 bytes of the session's id, 255 of the tenant's, and a newline.
NOTIFY_INTERVAL_SECONDS = 0.01
MAX_SESSIONS_PER_NOTIFY = 27

# Changes beyond this many unannounced sessions are not announced. Other processes find them when
# they poll.
MAX_PENDING_SESSIONS = 10_000


class WatchedSessions(Protocol):
    """The watched sessions of this process, which the notifications wake."""

    def wake(self, key: SessionKey) -> None:
        """Read the session's changes, if it is watched."""

    def wake_if_moved(self, key: SessionKey, revision: int | None) -> None:
        """Read the session's changes if a watcher is not at this revision. None: it is deleted."""

    def cursors(self) -> list[tuple[str, str, int]]:
        """Tenant id, session id and the watchers' revision of each watched session.

        The revision is -1 when the watchers of a session are at several.
        """


class Notifications:
    """Announces changes to other processes, and wakes the watched sessions that others change."""

    def __init__(
        self,
        db: Database,
        listen_url: str,
        watched: WatchedSessions,
        *,
        poll_interval_seconds: float,
    ):
        self._db = db
        self._conninfo = connection_string(listen_url)
        self._watched = watched
        self._poll_interval_seconds = poll_interval_seconds
        self._pending: set[SessionKey] = set()
        self._has_pending = asyncio.Event()
        self._poll_now = asyncio.Event()
        self._notifier_pid = 0
        self._warnings = RepeatedWarnings()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._run_connected("notifier", self._notify)),
            asyncio.create_task(self._run_connected("listener", self._listen)),
            asyncio.create_task(self._poll()),
        ]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def announce(self, key: SessionKey) -> None:
        """Tell other processes soon that a session has changed."""
        if len(self._pending) < MAX_PENDING_SESSIONS:
            self._pending.add(key)
            self._has_pending.set()

    async def _run_connected(
        self, name: str, run: Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]]
    ) -> None:
        """Run `run` on a connection of its own, and reconnect when it fails."""
        failures = 0
        while True:
            event = f"{name} cannot connect"
            try:
                async with await connect(self._conninfo) as connection:
                    if failures:
                        log.info(f"{name} is connected", failed_attempts=failures)
                    event, failures = f"{name} lost its connection", 0
                    await run(connection)
            except Exception as error:  # any error: the next connection may work
                self._warnings.warn(event, cause(error))
                failures += event.endswith("cannot connect")
            await asyncio.sleep(RECONNECT_SECONDS)

    async def _notify(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Send one NOTIFY at a time. Changes that arrive meanwhile are batched into the next."""
        self._notifier_pid = connection.info.backend_pid
        async with connection.cursor() as cursor:
            while True:
                await self._has_pending.wait()
                keys = set(itertools.islice(self._pending, MAX_SESSIONS_PER_NOTIFY))
                self._pending -= keys
                metrics.NOTIFY_BATCH_SESSIONS.observe(len(keys))
                if not self._pending:
                    self._has_pending.clear()
                payload = "\n".join(f"{session_id}{tenant_id}" for tenant_id, session_id in keys)
                await cursor.execute(NOTIFY, (CHANNEL, payload))
                if len(self._pending) < MAX_SESSIONS_PER_NOTIFY:
                    await asyncio.sleep(NOTIFY_INTERVAL_SECONDS)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Wake the sessions that other processes announce.

        Reads from libpq directly: psycopg's `notifies` takes several times as long for each.
        """
        await connection.execute(f"LISTEN {CHANNEL}")
        self._poll_now.set()  # notifications may have been lost while nothing listened
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        libpq = connection.pgconn
        socket = libpq.socket  # kept, because a lost connection no longer has it
        loop.add_reader(socket, readable.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError), Timeout(CONNECTION_CHECK_SECONDS):
                    await readable.wait()
                readable.clear()
                libpq.consume_input()
                while notification := libpq.notifies():
                    if notification.be_pid != self._notifier_pid:
                        for line in notification.extra.decode(errors="replace").split("\n"):
                            self._watched.wake((line[UUID_LENGTH:], line[:UUID_LENGTH]))
        finally:
            loop.remove_reader(socket)

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_seconds):
                    await self._poll_now.wait()
            self._poll_now.clear()
            cursors = self._watched.cursors()
            if not cursors:
                continue
            try:
                moved = await sessions.find_moved(self._db, cursors)
            except Exception as error:  # any error: a poll that ended could leave watchers stuck
                self._warnings.warn("could not poll the watched sessions", cause(error))
                continue
            for tenant_id, session_id, revision in moved:
                self._watched.wake_if_moved((tenant_id, session_id), revision)
