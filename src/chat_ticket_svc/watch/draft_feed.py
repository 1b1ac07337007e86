"""The drafts that the watchers of this process follow, and the reads that they share.

Each session whose drafts are followed has one feed, with the content of its open drafts. A change
makes the feed stale. Feeds that get stale while a read is in flight are read together by the next
one, each from where it is. So the text of a draft is read once, however many follow it, and each
follower takes what follows the length that it has sent.

As everywhere in `watch`, a change is only a hint to read.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Any

from chat_ticket_svc.store import draft_following
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.draft_following import FollowedSession, KnownDraft, NewText, OpenDrafts
from chat_ticket_svc.store.drafts import Draft
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics

# Sessions of one read. They bound the time for which it keeps the pipelined connection.
MAX_SESSIONS_PER_READ = 64
MAX_SESSIONS_PER_LARGE_READ = 4


class FollowedDraft:
    """An open draft and its content, which only grows. Otherwise another object replaces it."""

    def __init__(self, new: NewText):
        self._row = new.draft._replace(content="")
        self._content = bytearray(new.draft.content.encode())
        self.fencing_token = new.fencing_token
        # Events for followers, by the length that they have, -1 for none: built once for all.
        self.events: dict[int, bytes] = {}

    @property
    def length(self) -> int:
        return len(self._content)

    @property
    def row(self) -> Draft:
        """The whole draft as it stands."""
        return self._row._replace(content=self._content.decode(), length=self.length)

    def text_after(self, length: int) -> str:
        return self._content[length:].decode()

    def append(self, new: NewText) -> None:
        """Add text that continues what is there."""
        content = new.draft.content.encode()
        if new.known_length is None:
            content = content[self.length :]
        self._row = self._row._replace(expires_at=new.draft.expires_at)
        self.fencing_token = new.fencing_token
        if content:
            self._content += content
            self.events.clear()

    def is_continued_by(self, new: NewText) -> bool:
        content = new.draft.content.encode()
        if new.known_length is None:
            # Another writer may have taken it over, and gone on from less after a failover.
            is_same = new.draft.created_at == self._row.created_at
            return is_same and content.startswith(self._content)
        return new.known_length == self.length and self.length + len(content) == new.draft.length


class DraftFeed:
    """The open drafts of one session, for all who follow them.

    `revision` is that of the session beside these drafts: None if it was deleted, -1 before the
    first read.
    """

    def __init__(self, reader: "DraftReader", tenant_id: str, session_id: str):
        self._reader = reader
        self._key = (tenant_id, session_id)
        self.follower_count = 0
        self.revision: int | None = -1
        self.drafts: dict[str, FollowedDraft] = {}
        # Grows with each change of the above.
        self.version = 0
        # Those of the followers who wait for a change, and of those who wait for a read.
        self.waiters: set[asyncio.Future[Any]] = set()
        self._refreshers: set[asyncio.Future[None]] = set()
        # As in CursorGroup.
        self.change_count = 0
        self.covered_changes = -1
        self.last_change_time = 0.0
        self.is_being_read = False

    @property
    def is_stale(self) -> bool:
        return self.covered_changes != self.change_count

    def refresh(self) -> None:
        """Read the drafts again: one of them has changed, or may have."""
        self.change_count += 1
        self.last_change_time = time.monotonic()
        self.start_read()

    def start_read(self) -> None:
        """Read the drafts, unless nothing has changed since the last read."""
        if self.is_stale and not self.is_being_read:
            self._reader.read(self)

    async def refreshed(self) -> None:
        """Wait for a read that begins after now."""
        self.refresh()
        change_count = self.change_count
        while self.covered_changes < change_count:
            refresher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._refreshers.add(refresher)
            try:
                await refresher
            finally:
                self._refreshers.discard(refresher)

    def fail(self, error: Exception) -> None:
        """End the streams of the waiting followers with an error."""
        for waiter in (*self.waiters, *self._refreshers):
            if not waiter.done():
                waiter.set_exception(error)

    def request(self) -> FollowedSession:
        """What to read for this feed."""
        known = {
            draft_id: KnownDraft(draft.fencing_token, draft.length)
            for draft_id, draft in self.drafts.items()
        }
        return FollowedSession(*self._key, known)

    def apply(self, found: OpenDrafts, change_count: int) -> None:
        """Take over what was read after so many changes, and wake the followers."""
        self.covered_changes = change_count
        has_changed = self._apply_drafts(found.drafts)
        if has_changed or found.revision != self.revision:
            self.revision = found.revision
            self.version += 1
            for waiter in self.waiters:
                if not waiter.done():
                    waiter.set_result(DRAFTS_CHANGED)
        for refresher in self._refreshers:
            if not refresher.done():
                refresher.set_result(None)

    def _apply_drafts(self, found: Sequence[NewText]) -> bool:
        """Take over the drafts that were found. Returns whether one of them has changed."""
        drafts: dict[str, FollowedDraft] = {}
        has_changed = False
        for new in found:
            draft_id = new.draft.id
            draft = self.drafts.get(draft_id)
            if draft is not None and draft.is_continued_by(new):
                length = draft.length
                draft.append(new)
                has_changed |= draft.length != length
            elif draft is None or new.known_length is None:
                draft = FollowedDraft(new)
                has_changed = True
            else:
                # It is not what it was, as after a failover: the next read is of the whole.
                draft.fencing_token = 0
                self.change_count += 1
            drafts[draft_id] = draft
        has_changed |= len(drafts) != len(self.drafts)
        self.drafts = drafts
        return has_changed


class DraftsChanged:
    """What a watcher receives instead of a page when a draft that it follows has changed."""


DRAFTS_CHANGED = DraftsChanged()


class DraftReader:
    """Reads the stale feeds of a process, many in one statement."""

    def __init__(self, db: Database):
        self._db = db
        self._small_reads = _ReadQueue(self._read, MAX_SESSIONS_PER_READ)
        # Apart, so that small reads do not wait behind them.
        self._large_reads = _ReadQueue(self._read_large, MAX_SESSIONS_PER_LARGE_READ)

    def read(self, feed: DraftFeed) -> None:
        feed.is_being_read = True
        self._small_reads.add(feed)

    async def stop(self) -> None:
        await self._small_reads.stop()
        await self._large_reads.stop()

    async def _read(self, feeds: Sequence[DraftFeed], *, is_large: bool = False) -> None:
        change_counts = [feed.change_count for feed in feeds]
        change_times = [feed.last_change_time for feed in feeds]
        try:
            requests = [feed.request() for feed in feeds]
            found = await draft_following.read(self._db, requests, is_large=is_large)
        except Exception as error:
            for feed in feeds:
                feed.is_being_read = False
                feed.fail(error)
            return
        now = time.monotonic()
        for feed, drafts, change_count, change_time in zip(
            feeds, found, change_counts, change_times, strict=True
        ):
            if drafts is None:
                self._large_reads.add(feed)
                continue
            feed.is_being_read = False
            version = feed.version
            feed.apply(drafts, change_count)
            if feed.version != version and change_time:
                metrics.WATCH_DELIVERY_SECONDS.observe(now - change_time)
            feed.start_read()

    async def _read_large(self, feeds: Sequence[DraftFeed]) -> None:
        await self._read(feeds, is_large=True)


class _ReadQueue:
    """Runs one read at a time. Feeds that are added meanwhile are read together by the next."""

    def __init__(self, read: Callable[[Sequence[DraftFeed]], Awaitable[None]], max_feeds: int):
        self._read = read
        self._max_feeds = max_feeds
        self._pending: deque[DraftFeed] = deque()
        self._reading: asyncio.Task[None] | None = None

    def add(self, feed: DraftFeed) -> None:
        self._pending.append(feed)
        if self._reading is None:
            # An empty context: the read belongs to no single caller, trace or tenant.
            self._reading = asyncio.create_task(self._run(), context=Context())

    async def stop(self) -> None:
        await cancel_and_wait(self._reading)

    async def _run(self) -> None:
        try:
            while self._pending:
                feeds: list[DraftFeed] = []
                while self._pending and len(feeds) < self._max_feeds:
                    feed = self._pending.popleft()
                    if feed.follower_count:
                        feeds.append(feed)
                    else:
                        feed.is_being_read = False
                if feeds:
                    await self._read(feeds)
        finally:
            self._reading = None
