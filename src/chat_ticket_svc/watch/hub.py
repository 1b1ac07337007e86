"""How a write wakes those who follow its session, here and in other processes.

After a commit, `changed` wakes the watchers of this process and hands the session to the
notifier, which tells the other processes with NOTIFY, outside of any write's transaction: NOTIFY
takes a global lock at commit. The listener hears what other processes tell. Both are only hints:
what watchers are told is always read by revision, and as a fallback the revisions of all watched
sessions are read in one statement every `watch_poll_interval_seconds`, and at once when the
listener has reconnected.

What follows a position in a session is the same for everybody who stands there, so it is read
once for all of them: when something has changed and the first one waits for it. The page stays
until the last of them has taken it and moved on. Whoever is slow delays nobody: it finds the page
that leads on from its own place, one at most, or reads it when it comes.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar
from weakref import WeakValueDictionary

import psycopg
import structlog

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.connection import connection_string
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.timeouts import Timeout, TimeoutQueue

log = structlog.get_logger()

Key = tuple[str, str]  # (tenant id, session id)

CHANNEL = "chat_ticket_session_changed"
NOTIFY = "SELECT pg_notify(%s, %s)"
UUID_LENGTH = 36
RECONNECT_SECONDS = 1
# Whether the listener's connection is there still: its end may come without a word (see lane.py).
LOOK_SECONDS = 1

# A NOTIFY costs half of what a write does: while writes are many, one tells of several, in a line
# for each session. It may not have 8,000 bytes.
NOTIFY_SECONDS = 0.01
LINES = 27

# What has not been told when this many sessions wait is left to the others' polls.
MAX_PENDING = 10_000


class Position(NamedTuple):
    """Up to where a watcher has been told of a session.

    Another session of the same id, which must not be, has other positions.
    """

    created_at: int
    revision: int


class Page(Protocol):
    """What follows a position."""

    @property
    def position(self) -> Position | None:
        """Where it leads; None when the session is gone."""

    @property
    def more(self) -> bool:
        """Whether there was more behind it already."""


P = TypeVar("P", bound=Page)
P_co = TypeVar("P_co", bound=Page, covariant=True)


class Read(Protocol[P_co]):
    """Reads what follows a revision of a session: as much as `limit` says, or as is usual."""

    def __call__(
        self, tenant_id: str, session_id: str, after: int, limit: int | None = ...
    ) -> Awaitable[P_co]: ...


class CursorGroup(Generic[P]):
    """A position, and those who stand there or are on their way."""

    def __init__(self, position: Position):
        self.position = position
        self.watchers = 0
        self.waiting: set[asyncio.Future[P | None]] = set()
        self.page: P | None = None
        self.reading: asyncio.Task[None] | None = None
        # How many changes had been told when the last read, from here or up to here, began.
        self.seen = -1

    def tell(self, page: P | None) -> None:
        """What those who wait have waited for; None is silence."""
        for waiting in self.undecided():
            waiting.set_result(page)

    def fail(self, error: Exception) -> None:
        """End those who wait."""
        for waiting in self.undecided():
            waiting.set_exception(error)

    def undecided(self) -> list[asyncio.Future[P | None]]:
        return [waiting for waiting in self.waiting if not waiting.done()]


class SessionHub(Generic[P]):
    """What the watchers of a session share."""

    def __init__(self, follow: "WatchHub", key: Key, read: Read[P]):
        self._follow = follow
        self._read = read
        self.key = key
        self.watchers = 0
        self.changes = 0
        self.changed_at = 0.0  # in the loop's time, by the last of them
        self.places: dict[Position, CursorGroup[P]] = {}

    @property
    def revision(self) -> int:
        """Where its watchers stand, or none that a session has."""
        return next(iter(self.places)).revision if len(self.places) == 1 else -1

    async def read(self, *arguments: int) -> P:
        """The page after a revision, when it is its turn."""
        tenant_id, session_id = self.key
        async with self._follow.turn(tenant_id):
            return await self._read(tenant_id, session_id, *arguments)

    def wake(self) -> None:
        """Something has changed, or may have."""
        self.changes += 1
        self.changed_at = asyncio.get_running_loop().time()
        for place in self.places.values():
            if place.waiting:
                self.read_on(place)

    def read_on(self, place: CursorGroup[P]) -> None:
        """Read what follows a place, unless nothing has changed since the last time."""
        if place.reading is None and place.seen != self.changes:
            place.reading = asyncio.create_task(self._read_on(place))

    async def _read_on(self, place: CursorGroup[P]) -> None:
        try:
            while place.page is None and place.seen != self.changes:
                changes, changed_at = self.changes, self.changed_at
                page = await self.read(place.position.revision)
                place.seen = changes
                if page.position != place.position:
                    place.page = page
                    place.tell(page)
                    if changed_at:
                        metrics.WATCH_DELIVERY_SECONDS.observe(
                            asyncio.get_running_loop().time() - changed_at
                        )
        except Exception as error:
            place.fail(error)
        finally:
            place.reading = None

    def drain(self) -> None:
        for place in self.places.values():
            place.fail(_draining())


def _draining() -> errors.UnavailableError:
    return errors.UnavailableError("the server shuts down: resume", reason="DRAINING")


class Watcher(Generic[P]):
    """One stream's way through its session; to be entered before it is read from."""

    def __init__(self, follow: "WatchHub", feed: SessionHub[P]):
        self._follow = follow
        self._feed = feed
        self._place: CursorGroup[P] | None = None

    def __enter__(self) -> Self:
        self._feed.watchers += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()
        self._feed.watchers -= 1
        if not self._feed.watchers:
            self._follow.forget(self._feed)

    async def read(self, after: int, limit: int) -> P:
        """Read the page after a revision for this watcher alone.

        When there is no more behind it, the watcher stands where it leads, and `next` goes on.
        """
        self._follow.raise_if_draining()
        changes = self._feed.changes
        page = await self._feed.read(after, limit)
        if not page.more:
            self._stand(page.position, changes)
        return page

    async def next(self) -> P | None:
        """Move on by a page that is read for all who stand here; None after some silence."""
        self._follow.raise_if_draining()
        assert self._place is not None  # noqa: S101 - for the type checker
        place, page = self._place, self._place.page
        if page is None:
            self._feed.read_on(place)
            waiting: asyncio.Future[P | None] = asyncio.get_running_loop().create_future()
            place.waiting.add(waiting)
            try:
                page = await waiting
            finally:
                place.waiting.discard(waiting)
        if page is not None:
            self._stand(page.position, -1 if page.more else place.seen)
        return page

    def _stand(self, position: Position | None, seen: int) -> None:
        self._leave()
        if position is None:
            return
        place = self._feed.places.get(position)
        if place is None:
            place = self._feed.places[position] = CursorGroup(position)
            self._follow.silences.start(place)
        place.watchers += 1
        if place.seen < seen:
            # A page that was read before this is known may be of a history that is no more.
            place.seen, place.page = seen, None
        self._place = place

    def _leave(self) -> None:
        place, self._place = self._place, None
        if place is None:
            return
        place.watchers -= 1
        if not place.watchers:
            del self._feed.places[place.position]
            self._follow.silences.stop(place)
            if place.reading is not None:
                place.reading.cancel()


class WatchHub:
    """The watchers of this process, and what wakes them."""

    def __init__(
        self,
        db: Database,
        listen_url: str,
        *,
        watch_poll_interval_seconds: float,
        watch_heartbeat_seconds: float,
        readers: int,
    ):
        self._db = db
        self._conninfo = connection_string(listen_url)
        self._poll_interval_seconds = watch_poll_interval_seconds
        self._feeds: dict[Key, SessionHub[Any]] = {}
        self.silences = TimeoutQueue[CursorGroup[Any]](watch_heartbeat_seconds, self._silent)
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
        for feed in self._feeds.values():
            feed.drain()

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

    def watch(self, tenant_id: str, session_id: str, read: Read[P]) -> Watcher[P]:
        """A watcher of a session; `read` is the same for all of them."""
        key = (tenant_id, session_id)
        feed = self._feeds.get(key)
        if feed is None:
            feed = self._feeds[key] = SessionHub(self, key, read)
        return Watcher(self, feed)

    @property
    def watchers(self) -> int:
        return sum(feed.watchers for feed in list(self._feeds.values()))

    def forget(self, feed: SessionHub[Any]) -> None:
        """Nobody follows the session any more."""
        del self._feeds[feed.key]

    def raise_if_draining(self) -> None:
        if self._draining:
            raise _draining()

    @contextlib.asynccontextmanager
    async def turn(self, tenant_id: str) -> AsyncIterator[None]:
        """Around a read."""
        share = self._shares.setdefault(tenant_id, asyncio.Semaphore(max(1, self._readers - 1)))
        async with share, self._reading:
            request_context.set_tenant(tenant_id)
            yield

    def _silent(self, place: CursorGroup[Any]) -> None:
        place.tell(None)
        self.silences.start(place)

    def _wake(self, key: Key) -> None:
        if feed := self._feeds.get(key):
            feed.wake()

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
        """One NOTIFY at a time; what gathers meanwhile, and a little longer, is the next."""
        self._notifier_pid = connection.info.backend_pid
        async with connection.cursor() as cursor:
            while True:
                await self._has_pending.wait()
                keys = set(itertools.islice(self._pending, LINES))
                self._pending -= keys
                metrics.NOTIFY_BATCH_SESSIONS.observe(len(keys))
                if not self._pending:
                    self._has_pending.clear()
                payload = "\n".join(f"{session_id}{tenant_id}" for tenant_id, session_id in keys)
                await cursor.execute(NOTIFY, (CHANNEL, payload))
                if len(self._pending) < LINES:
                    await asyncio.sleep(NOTIFY_SECONDS)

    async def _listen(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Without psycopg's `notifies`, which takes several times as long for each."""
        await connection.execute(f"LISTEN {CHANNEL}")
        self._poll_now.set()
        loop, readable = asyncio.get_running_loop(), asyncio.Event()
        libpq = connection.pgconn
        socket = libpq.socket  # its number is not to be had from a connection that is lost
        loop.add_reader(socket, readable.set)
        try:
            while True:
                with contextlib.suppress(TimeoutError), Timeout(LOOK_SECONDS):
                    await readable.wait()
                readable.clear()
                libpq.consume_input()
                while notification := libpq.notifies():
                    if notification.be_pid != self._notifier_pid:
                        for line in notification.extra.decode(errors="replace").split("\n"):
                            self._wake((line[UUID_LENGTH:], line[:UUID_LENGTH]))
        finally:
            loop.remove_reader(socket)

    async def _poll(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_seconds):
                    await self._poll_now.wait()
            self._poll_now.clear()
            if not self._feeds:
                continue
            try:
                known = [(*key, feed.revision) for key, feed in self._feeds.items()]
                moved = await sessions.revisions(self._db, known)
            except Exception as error:  # whatever it is: without the poll a watcher could be stuck
                log.warning("could not poll the watched sessions", error=type(error).__qualname__)
                continue
            for tenant_id, session_id, revision in moved:
                feed = self._feeds.get((tenant_id, session_id))
                if feed and any(at.revision != revision for at in feed.places):
                    feed.wake()
