"""The watchers of this process, and the reads that they share.

All watchers at the same position of a session need the same next page. It is read once for all of
them, when the session has changed and one of them waits. The page is kept until the last watcher
of that position has taken it and moved on.

A slow watcher delays no other: when it takes its next page, it finds the one kept at its own
position, or reads it.

A change wakes the watchers of its session: `notify_changed` for writes of this process,
`notifications` for those of others. A wake is only a hint. What watchers receive is always read
from the database, by position.

Watchers that follow drafts wait for the feed of their session too (see draft_feed.py).
"""

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Generic, Protocol, Self, cast
from weakref import WeakValueDictionary

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import WatchedCursor
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.timeouts import TimeoutQueue
from chat_ticket_svc.watch.change_feed import ChangeFeeds
from chat_ticket_svc.watch.cursor_group import CursorGroup, P, PageReader, Position, Take
from chat_ticket_svc.watch.draft_feed import DRAFTS_CHANGED, DraftFeed, DraftReader, DraftsChanged
from chat_ticket_svc.watch.notifications import Notifications, SessionKey


class DraftWriters(Protocol):
    """The writers of drafts in this process, whose drafts other processes may end or take over."""

    def check_drafts(self, key: SessionKey) -> None:
        """Another process has changed a draft of this session: look at the drafts written here."""

    def check_all_drafts(self) -> None:
        """Look at all drafts written here. Called at each poll, as notifications may be lost."""


class SessionHub(Generic[P]):
    """The watchers of one session, grouped by position."""

    def __init__(self, watch_hub: "WatchHub", key: SessionKey, read: PageReader[P]):
        self._watch_hub = watch_hub
        self._read = read
        self.key = key
        self.watcher_count = 0
        self.change_count = 0
        self.last_change_time = 0.0  # of the event loop's clock
        self.groups: dict[Position, CursorGroup[P]] = {}
        self.draft_feed: DraftFeed | None = None  # while a watcher follows drafts

    @property
    def cursor(self) -> WatchedCursor:
        """Where all watchers are. The revision is -1 when they are at several positions."""
        if len(self.groups) != 1:
            return WatchedCursor(*self.key, -1, "")
        [position] = self.groups
        return WatchedCursor(*self.key, position.revision, position.epoch)

    async def read_page(self, *arguments: int) -> P:
        """Read the page after a revision, within the limits on concurrent reads."""
        tenant_id, session_id = self.key
        async with self._watch_hub.read_slot(tenant_id):
            return await self._read(tenant_id, session_id, *arguments)

    def wake(self) -> None:
        """Read the next page for the waiting watchers: the session has changed, or may have."""
        self.change_count += 1
        self.last_change_time = time.monotonic()
        for group in self.groups.values():
            if group.waiters:
                self.start_read(group)
        # A message may have been a draft.
        self.wake_drafts()

    def wake_drafts(self) -> None:
        """Read the drafts for those who follow them: one has changed, or may have."""
        if self.draft_feed is not None:
            self.draft_feed.refresh()

    def start_read(self, group: CursorGroup[P]) -> None:
        """Read the page after a position, unless nothing has changed since the last read."""
        if group.read_task is None and group.covered_changes != self.change_count:
            group.read_task = asyncio.create_task(self._read_next_page(group))

    async def _read_next_page(self, group: CursorGroup[P]) -> None:
        try:
            while group.next_page is None and group.covered_changes != self.change_count:
                change_count, change_time = self.change_count, self.last_change_time
                page = await self.read_page(group.position.revision)
                group.covered_changes = change_count
                if page.position != group.position:
                    group.next_page = page
                    group.deliver(page)
                    if change_time:
                        metrics.WATCH_DELIVERY_SECONDS.observe(time.monotonic() - change_time)
        except Exception as error:
            group.fail(error)
        finally:
            group.read_task = None

    def drain(self) -> None:
        for group in self.groups.values():
            group.fail(errors.DrainingError())
        if self.draft_feed is not None:
            self.draft_feed.fail(errors.DrainingError())


class Watcher(Generic[P]):
    """One stream's cursor in its session. Enter it before reading."""

    def __init__(self, watch_hub: "WatchHub", session_hub: SessionHub[P]):
        self._loop = asyncio.get_running_loop()
        self._watch_hub = watch_hub
        self._session_hub = session_hub
        self._group: CursorGroup[P] | None = None

    def __enter__(self) -> Self:
        self._session_hub.watcher_count += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._leave_group()
        self._session_hub.watcher_count -= 1
        if not self._session_hub.watcher_count:
            self._watch_hub.remove(self._session_hub)

    async def read_page(self, after: int, limit: int) -> P:
        """Read the page after a revision, for this watcher alone.

        When nothing is left to read after it, the watcher moves to the page's position, and
        `next_page` continues from there.
        """
        self._watch_hub.raise_if_draining()
        change_count = self._session_hub.change_count
        page = await self._session_hub.read_page(after, limit)
        if not page.has_more:
            self._move_to(page.position, change_count)
        return page

    @contextlib.contextmanager
    def following_drafts(self) -> Iterator[DraftFeed]:
        """The feed of the session's drafts, which is kept up to date during the block."""
        session_hub = self._session_hub
        if session_hub.draft_feed is None:
            session_hub.draft_feed = DraftFeed(self._watch_hub.draft_reader, *session_hub.key)
        feed = session_hub.draft_feed
        feed.follower_count += 1
        try:
            yield feed
        finally:
            feed.follower_count -= 1
            if not feed.follower_count:
                session_hub.draft_feed = None

    async def read_drafts(self, feed: DraftFeed) -> None:
        """Wait for a read of the drafts that begins after now."""
        self._watch_hub.raise_if_draining()
        await feed.refreshed()

    async def next_page(self, take: Take[P]) -> P | None:
        """Wait for the next page, which all watchers at this position share, and move past it.

        Returns None when nothing has changed for a heartbeat interval.

        What comes is passed to `take` first. As long as that accepts it, the wait goes on: to
        resume a thousand tasks for a page takes more time than to send it a thousand times.
        """
        self._watch_hub.raise_if_draining()
        assert self._group is not None  # noqa: S101 - for the type checker
        group, page = self._group, self._group.next_page
        if page is None:
            self._session_hub.start_read(group)
            waiter: asyncio.Future[P | None] = self._loop.create_future()

            def take_and_move(page: P | None) -> bool:
                if not take(page):
                    return False
                if page is not None:
                    self._move_waiting(waiter, page)
                return True

            group.waiters[waiter] = take_and_move
            try:
                page = await waiter
            finally:
                self._group.waiters.pop(waiter, None)
        self._move_past(page)
        return page

    def _move_waiting(self, waiter: asyncio.Future[P | None], page: P) -> None:
        """Move past a page, and go on waiting there."""
        assert self._group is not None  # noqa: S101 - for the type checker
        take = self._group.waiters.pop(waiter)
        self._move_past(page)
        self._group.waiters[waiter] = take
        if self._group.next_page is not None:
            waiter.set_result(self._group.next_page)
        else:
            self._session_hub.start_read(self._group)

    async def next_page_or_drafts(
        self, feed: DraftFeed, seen_version: int
    ) -> P | DraftsChanged | None:
        """As `next_page`, but also return when the feed has another version than `seen_version`."""
        self._watch_hub.raise_if_draining()
        assert self._group is not None  # noqa: S101 - for the type checker
        group, page = self._group, self._group.next_page
        if page is None:
            self._session_hub.start_read(group)
            feed.start_read()
            if feed.version != seen_version:
                return DRAFTS_CHANGED
            # Whatever comes first: what comes then is found the next time.
            waiter: asyncio.Future[Any] = self._loop.create_future()
            group.waiters[waiter] = None
            feed.waiters.add(waiter)
            try:
                result = await waiter
            finally:
                del group.waiters[waiter]
                feed.waiters.discard(waiter)
            if isinstance(result, DraftsChanged):
                return result
            page = cast(P | None, result)
        self._move_past(page)
        return page

    def _move_past(self, page: P | None) -> None:
        if page is not None and self._group is not None:
            self._move_to(page.position, -1 if page.has_more else self._group.covered_changes)

    def _move_to(self, position: Position | None, covered_changes: int) -> None:
        self._leave_group()
        if position is None:
            return
        group = self._session_hub.groups.get(position)
        if group is None:
            group = self._session_hub.groups[position] = CursorGroup(position)
            self._watch_hub.heartbeats.start(group)
        group.watcher_count += 1
        if group.covered_changes < covered_changes:
            # The group's page was read before this one. After a restore it may belong to a
            # history that no longer exists.
            group.covered_changes, group.next_page = covered_changes, None
        self._group = group

    def _leave_group(self) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        group.watcher_count -= 1
        if not group.watcher_count:
            del self._session_hub.groups[group.position]
            self._watch_hub.heartbeats.stop(group)
            if group.read_task is not None:
                group.read_task.cancel()


class WatchHub:
    """All watchers of this process."""

    def __init__(
        self,
        db: Database,
        listen_url: str,
        *,
        watch_poll_interval_seconds: float,
        watch_heartbeat_seconds: float,
        max_concurrent_reads: int,
    ):
        self._db = db
        self._session_hubs: dict[SessionKey, SessionHub[Any]] = {}
        self._notifications = Notifications(
            db, listen_url, self, poll_interval_seconds=watch_poll_interval_seconds
        )
        self.heartbeats = TimeoutQueue[CursorGroup[Any]](
            watch_heartbeat_seconds, self._send_heartbeat
        )
        # A thousand watchers that wake together must not fill the pool's queue, and the watchers
        # of one tenant must not keep out another's. The semaphore of a tenant lives as long as one
        # of its reads.
        self._read_slots = asyncio.Semaphore(max_concurrent_reads)
        self._max_tenant_reads = max(1, max_concurrent_reads - 1)
        self._tenant_read_slots = WeakValueDictionary[str, asyncio.Semaphore]()
        self.draft_reader = DraftReader(db)
        self.change_feeds = ChangeFeeds(
            functools.partial(change_feed.page, db),
            self.read_slot,
            heartbeat_seconds=watch_heartbeat_seconds,
        )
        self._draft_writers: DraftWriters | None = None
        self._is_draining = False

    def start(self) -> None:
        self._notifications.start()

    def drain(self) -> None:
        """End all watches, present and future, with UNAVAILABLE: the clients resume elsewhere."""
        self._is_draining = True
        for session_hub in self._session_hubs.values():
            session_hub.drain()
        self.change_feeds.drain()

    async def stop(self) -> None:
        await self._notifications.stop()
        await self.draft_reader.stop()
        await self.change_feeds.stop()

    def notify_changed(self, tenant_id: str, session_id: str) -> None:
        """Wake the watchers of a session, and the followers of the tenant's feed.

        Here and in other processes. Call after the commit. For a ticket, only the feed matters: its
        id stands for that of a session.
        """
        key = (tenant_id, session_id)
        self.wake(key)
        self._notifications.announce(key)

    def notify_draft(self, tenant_id: str, session_id: str) -> None:
        """Wake those who follow the drafts of a session. Call after the commit of a change to one.

        It wakes no one who follows messages only. Where a draft became a message, or was dropped
        with its session, call `notify_changed` too.
        """
        key = (tenant_id, session_id)
        if session_hub := self._session_hubs.get(key):
            session_hub.wake_drafts()
        self._notifications.announce_drafts(key)

    def set_draft_writers(self, writers: DraftWriters) -> None:
        """Tell these writers of what other processes do to drafts. Call before `start`."""
        self._draft_writers = writers

    def watch(self, tenant_id: str, session_id: str, read: PageReader[P]) -> Watcher[P]:
        """A watcher of a session. All watchers of a session must pass an equivalent `read`."""
        key = (tenant_id, session_id)
        session_hub = self._session_hubs.get(key)
        if session_hub is None:
            session_hub = self._session_hubs[key] = SessionHub(self, key, read)
        return Watcher(self, session_hub)

    @property
    def watcher_count(self) -> int:
        # Copied: the metrics thread calls this while the event loop may change the dictionary.
        return sum(hub.watcher_count for hub in list(self._session_hubs.values()))

    def remove(self, session_hub: SessionHub[Any]) -> None:
        """Forget a session whose last watcher has left."""
        del self._session_hubs[session_hub.key]

    def raise_if_draining(self) -> None:
        if self._is_draining:
            raise errors.DrainingError()

    @contextlib.asynccontextmanager
    async def read_slot(self, tenant_id: str) -> AsyncIterator[None]:
        """Wait until a read for this tenant may run; held while it runs."""
        tenant_slots = self._tenant_read_slots.setdefault(
            tenant_id, asyncio.Semaphore(self._max_tenant_reads)
        )
        async with tenant_slots, self._read_slots:
            request_context.set_tenant(tenant_id)
            yield

    # What the notifications call.

    def wake(self, key: SessionKey) -> None:
        if session_hub := self._session_hubs.get(key):
            session_hub.wake()
        self.change_feeds.wake(key[0])

    async def wake_all_feeds(self) -> None:
        try:
            # After a promotion nobody may write for long. The followers are to learn of it soon.
            if self.change_feeds.follower_count:
                await change_feed.ensure_epoch(self._db)
        finally:
            self.change_feeds.wake_all()

    def wake_if_moved(self, key: SessionKey, revision: int | None, epoch: str | None) -> None:
        session_hub = self._session_hubs.get(key)
        if session_hub and any(
            (at.revision, at.epoch) != (revision, epoch) for at in session_hub.groups
        ):
            session_hub.wake()

    def wake_drafts(self, key: SessionKey) -> None:
        if session_hub := self._session_hubs.get(key):
            session_hub.wake_drafts()
        if self._draft_writers is not None:
            self._draft_writers.check_drafts(key)

    def wake_all_drafts(self) -> None:
        for session_hub in self._session_hubs.values():
            session_hub.wake_drafts()
        if self._draft_writers is not None:
            self._draft_writers.check_all_drafts()

    def cursors(self) -> list[WatchedCursor]:
        return [session_hub.cursor for session_hub in self._session_hubs.values()]

    def _send_heartbeat(self, group: CursorGroup[Any]) -> None:
        group.deliver(None)
        self.heartbeats.start(group)
