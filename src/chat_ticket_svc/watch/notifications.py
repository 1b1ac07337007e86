"""How the server processes tell one another that a session, or one of its drafts, has changed.

A write is announced with NOTIFY after its commit, outside of its transaction: PostgreSQL takes a
global lock when a transaction that has notified commits. Each process listens for the
notifications of the others.

Drafts change much more often than sessions, and a draft that grows concerns only those who follow
drafts. So they have a channel of their own, to which servers without drafts do not listen.

Notifications may get lost. As a fallback the positions of all watched sessions are polled, in one
statement, every `watch_poll_interval_seconds` and whenever the listener has connected. Drafts are
looked at again at the same times.
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
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings
from chat_ticket_svc.timeouts import Timeout

log = structlog.get_logger()

SessionKey = tuple[str, str]  # (tenant id, session id)

CHANNEL = "chat_ticket_session_changed"
DRAFT_CHANNEL = "chat_ticket_draft_changed"
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

# Changes beyond this many unannounced sessions of a channel are not announced. Other processes find
# them when they poll.
MAX_PENDING_SESSIONS = 10_000


class WatchedSessions(Protocol):
    """The watched sessions of this process, which the notifications wake."""

    def wake(self, key: SessionKey) -> None:
        """Read the session's changes, if it is watched."""

    def wake_if_moved(self, key: SessionKey, revision: int | None, epoch: str | None) -> None:
        """Read the session's changes if a watcher is elsewhere. None: the session is deleted."""

    async def wake_all_feeds(self) -> None:
        """Read the feeds of all tenants that are followed here: notifications may be lost.

        Begins an epoch before if the database is another one.
        """

    def wake_drafts(self, key: SessionKey) -> None:
        """Look at the session's drafts, if they are followed or written here."""

    def wake_all_drafts(self) -> None:
        """Look at all drafts that are followed or written here: notifications may be lost."""

    def cursors(self) -> list[sessions.WatchedCursor]:
        """Where the watchers of each watched session are.

        The revision is -1 when they are at several positions.
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
        # The sessions to announce on each channel. Drafts do not crowd out the others.
        self._pending: dict[str, set[SessionKey]] = {CHANNEL: set(), DRAFT_CHANNEL: set()}
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
        await cancel_and_wait(*self._tasks)

    def announce(self, key: SessionKey) -> None:
        """Tell other processes soon that a session has changed."""
        self._announce(CHANNEL, key)

    def announce_drafts(self, key: SessionKey) -> None:
        """Tell other processes soon that a draft of a session has changed."""
        self._announce(DRAFT_CHANNEL, key)

    def _announce(self, channel: str, key: SessionKey) -> None:
        pending = self._pending[channel]
        if len(pending) < MAX_PENDING_SESSIONS:
            pending.add(key)
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
                self._has_pending.clear()
                for channel, pending in self._pending.items():
                    if pending:
                        await cursor.execute(NOTIFY, (channel, _take_payload(pending)))
                largest = max(map(len, self._pending.values()))
                if largest:
                    self._has_pending.set()
                if largest < MAX_SESSIONS_PER_NOTIFY:
                    await asyncio.sleep(NOTIFY_INTERVAL_SECONDS)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Wake the sessions that other processes announce.

        Reads from libpq directly: psycopg's `notifies` takes several times as long for each.
        """
        await connection.execute(f"LISTEN {CHANNEL}; LISTEN {DRAFT_CHANNEL}")
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
                        is_draft = notification.relname == DRAFT_CHANNEL.encode()
                        wake = self._watched.wake_drafts if is_draft else self._watched.wake
                        for line in notification.extra.decode(errors="replace").split("\n"):
                            wake((line[UUID_LENGTH:], line[:UUID_LENGTH]))
        finally:
            loop.remove_reader(socket)

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_seconds):
                    await self._poll_now.wait()
            self._poll_now.clear()
            self._watched.wake_all_drafts()
            try:
                await self._watched.wake_all_feeds()
            except Exception as error:  # any error: see below
                self._warnings.warn("could not see whether an epoch begins", cause(error))
            cursors = self._watched.cursors()
            if not cursors:
                continue
            try:
                moved = await sessions.find_moved(self._db, cursors)
            except Exception as error:  # any error: a poll that ended could leave watchers stuck
                self._warnings.warn("could not poll the watched sessions", cause(error))
                continue
            for tenant_id, session_id, revision, epoch in moved:
                self._watched.wake_if_moved((tenant_id, session_id), revision, epoch)


def _take_payload(pending: set[SessionKey]) -> str:
    """Take as many sessions as one NOTIFY may announce, and return its payload."""
    keys = set(itertools.islice(pending, MAX_SESSIONS_PER_NOTIFY))
    pending -= keys
    metrics.NOTIFY_BATCH_SESSIONS.observe(len(keys))
    return "\n".join(f"{session_id}{tenant_id}" for tenant_id, session_id in keys)
