"""The end of the change feed of each tenant that is followed here.

Followers that have caught up need the same next page. It is read once for all of them, when the
tenant has changed. The last pages are kept: a follower that is a little slower finds the one that
it needs, and one that is too slow reads for itself, as those do that have not caught up yet.

A change wakes the feed, as it wakes the watchers of its session (see hub.py). A wake is only a
hint, and the poll wakes all feeds. What is told is read from the database, by position.

A change that is committed can be read only when the transactions that began before it have ended,
and nobody tells of their end. So after a wake the feed reads until it has come to where the newest
transaction was then. After a poll it reads once: otherwise one old transaction would let the feeds
of all tenants read all the time.
"""

import asyncio
import contextlib
import functools
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager

from chat_ticket_svc import errors
from chat_ticket_svc.limits import MIB
from chat_ticket_svc.store.change_feed import Page, Place
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.timeouts import TimeoutQueue

# Of a page: at most this many rows of each kind.
PAGE_ROWS = 500

# Reads of a busy tenant are so far apart at least, and take at most a third of the time. So the
# changes of a moment are read together.
MIN_PAUSE_SECONDS = 0.005
PAUSE_PER_READ = 2.0

# How long to wait for the end of other transactions before the next look. It doubles.
MIN_RETRY_SECONDS = 0.002
MAX_RETRY_SECONDS = 0.25

# What is kept for followers that are slower than others.
MAX_KEPT_PAGES = 64
MAX_KEPT_BYTES = 4 * MIB

ReadPage = Callable[[str, Place | None, int], Awaitable[Page]]
ReadSlot = Callable[[str], AbstractAsyncContextManager[None]]


class ChangeFeed:
    """The end of the feed of one tenant."""

    def __init__(self, place: Place, read: Callable[[Place], Awaitable[Page]]):
        self._loop = asyncio.get_running_loop()
        self._read = read
        self._place = place
        self._pages: deque[Page] = deque()
        self._kept_bytes = 0
        self._first = 0  # the number of the first page that is kept
        self._waiters: set[asyncio.Future[None]] = set()
        self._is_due = asyncio.Event()
        self._waits_for_newest = False  # after the next read
        self._woken_at = 0.0  # by time.monotonic; 0: by no change that is known
        self._waiting_since = 0.0
        self._reading = asyncio.create_task(self._follow())
        self.follower_count = 0

    async def stop(self) -> None:
        await cancel_and_wait(self._reading)

    @property
    def start(self) -> int:
        """All changes before this position have been read."""
        return self._place.start

    @property
    def held_up_seconds(self) -> float:
        """How long changes have been waiting for the end of other transactions."""
        # The metrics thread calls this.
        waiting_since = self._waiting_since
        return time.monotonic() - waiting_since if waiting_since else 0.0

    def number_at(self, place: Place) -> int | None:
        """The number of the page that begins at `place`, or None if it is not kept."""
        if place == self._place:
            return self._first + len(self._pages)
        for number, page in enumerate(self._pages, start=self._first):
            if page.place == place:
                return number
        return None

    def page(self, number: int) -> Page | None:
        """The page, or None if it has not been read yet. Raises LookupError if it is gone."""
        if number < self._first:
            raise LookupError(number)
        index = number - self._first
        return self._pages[index] if index < len(self._pages) else None

    async def wait(self) -> None:
        """Wait for another page, at most for a third of the heartbeat interval."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    def wake(self, *, has_changed: bool) -> None:
        """Read on, to the newest transaction: the tenant has changed, or a follower has joined."""
        if has_changed and not self._woken_at:
            self._woken_at = time.monotonic()
        self._waits_for_newest = True
        self._is_due.set()

    def poll(self) -> None:
        """Read on as far as possible: the tenant may have changed. The next poll reads the rest."""
        self._is_due.set()

    def resume_waiters(self) -> None:
        """Let all waiting followers look for a page, and whether a heartbeat is due."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def fail(self, error: Exception) -> None:
        """End the streams of the waiting followers with an error."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)

    async def _follow(self) -> None:
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            woken_at, self._woken_at = self._woken_at, 0.0
            waits, self._waits_for_newest = self._waits_for_newest, False
            began = time.monotonic()
            try:
                await self._read_to_newest(woken_at, waits=waits)
            except Exception as error:
                # They resume, here or elsewhere, and the next wake reads again.
                self.fail(error)
            finally:
                self._waiting_since = 0.0
            duration = time.monotonic() - began
            await asyncio.sleep(max(MIN_PAUSE_SECONDS, PAUSE_PER_READ * duration))

    async def _read_to_newest(self, woken_at: float, *, waits: bool) -> None:
        """Read all that is committed now. With `waits`, also what other transactions hold up."""
        newest, retry_seconds = 0, MIN_RETRY_SECONDS
        while True:
            page = await self._read(self._place)
            newest = newest or page.newest
            if page.next != self._place:
                self._append(page)
                if page.rows and woken_at:
                    metrics.FEED_DELIVERY_SECONDS.observe(time.monotonic() - woken_at)
            if page.next.end is not None:
                continue
            if page.horizon >= newest or not waits:
                return
            self._waiting_since = self._waiting_since or time.monotonic()
            await asyncio.sleep(retry_seconds)
            retry_seconds = min(2 * retry_seconds, MAX_RETRY_SECONDS)

    def _append(self, page: Page) -> None:
        self._place = page.next
        self._pages.append(page)
        self._kept_bytes += page.size
        while len(self._pages) > 1 and (
            len(self._pages) > MAX_KEPT_PAGES or self._kept_bytes > MAX_KEPT_BYTES
        ):
            self._kept_bytes -= self._pages.popleft().size
            self._first += 1
        self.resume_waiters()


class ChangeFeeds:
    """The feeds of this process: one for each tenant that is followed."""

    def __init__(self, read: ReadPage, read_slot: ReadSlot, *, heartbeat_seconds: float):
        self._read = read
        self.read_slot = read_slot
        self._feeds: dict[str, ChangeFeed] = {}
        self._stopping: set[asyncio.Task[None]] = set()
        # The followers look three times an interval, so that none waits for longer than one.
        self._looks = TimeoutQueue[ChangeFeed](heartbeat_seconds / 3, self._let_look)
        self.quiet_seconds = heartbeat_seconds * 2 / 3
        self._is_draining = False
        self.follower_count = 0

    @contextlib.contextmanager
    def follower(self, tenant_id: str) -> Iterator["Follower"]:
        """A follower of a tenant's feed, until the block ends."""
        follower = Follower(self, tenant_id)
        self.follower_count += 1
        try:
            yield follower
        finally:
            self.follower_count -= 1
            follower.leave()

    def join(self, tenant_id: str, place: Place) -> ChangeFeed:
        """The tenant's feed, with one more follower. It begins at `place` if it is not followed."""
        feed = self._feeds.get(tenant_id)
        if feed is None:
            feed = ChangeFeed(place, functools.partial(self.read, tenant_id))
            self._feeds[tenant_id] = feed
            self._looks.start(feed)
        feed.follower_count += 1
        feed.wake(has_changed=False)
        return feed

    def leave(self, tenant_id: str, feed: ChangeFeed) -> None:
        feed.follower_count -= 1
        if not feed.follower_count:
            del self._feeds[tenant_id]
            self._looks.stop(feed)
            stopping = asyncio.create_task(feed.stop())
            self._stopping.add(stopping)
            stopping.add_done_callback(self._stopping.discard)

    async def read(self, tenant_id: str, place: Place | None) -> Page:
        """The page after a place, within the limits on concurrent reads."""
        async with self.read_slot(tenant_id):
            page = await self._read(tenant_id, place, PAGE_ROWS)
        metrics.FEED_CHANGES.inc(len(page.rows))
        return page

    def wake(self, tenant_id: str) -> None:
        """Something of the tenant has changed."""
        if feed := self._feeds.get(tenant_id):
            feed.wake(has_changed=True)

    def wake_all(self) -> None:
        """Something may have changed: notifications may be lost."""
        for feed in self._feeds.values():
            feed.poll()

    def drain(self) -> None:
        """End all streams, present and future, with UNAVAILABLE: the clients resume elsewhere."""
        self._is_draining = True
        for feed in self._feeds.values():
            feed.fail(errors.DrainingError())

    def raise_if_draining(self) -> None:
        if self._is_draining:
            raise errors.DrainingError()

    async def stop(self) -> None:
        feeds = list(self._feeds.values())
        await asyncio.gather(*(feed.stop() for feed in feeds), *self._stopping)

    @property
    def held_up_seconds(self) -> float:
        """How long changes of any followed tenant have been waiting for other transactions."""
        # Copied: the metrics thread calls this while the event loop may change the dictionary.
        return max((feed.held_up_seconds for feed in list(self._feeds.values())), default=0.0)

    def _let_look(self, feed: ChangeFeed) -> None:
        feed.resume_waiters()
        self._looks.start(feed)


class Follower:
    """One stream in the feed of its tenant. It reads for itself until it has caught up."""

    def __init__(self, feeds: ChangeFeeds, tenant_id: str):
        self._feeds = feeds
        self._tenant_id = tenant_id
        self._feed: ChangeFeed | None = None
        self._number: int | None = None  # of the next page in the feed

    def leave(self) -> None:
        feed, self._feed = self._feed, None
        if feed is not None:
            self._feeds.leave(self._tenant_id, feed)

    async def next_page(self, place: Place | None) -> Page | None:
        """The page after `place`. None when there is none yet: ask again.

        It waits for one, at most for a third of the heartbeat interval.
        """
        self._feeds.raise_if_draining()
        if self._number is not None and self._feed is not None:
            try:
                page = self._feed.page(self._number)
            except LookupError:  # too slow
                self._number = None
            else:
                if page is None:
                    await self._feed.wait()
                else:
                    self._number += 1
                return page
        if place is not None and place.end is None and self._feed is not None:
            self._number = self._feed.number_at(place)
            if self._number is not None:
                return None
            if self._feed.start <= place.start:
                # It has not come so far, or is in the middle of the pass that begins here.
                await self._feed.wait()
                return None
            # The feed has gone on: read up to where it is, and look again.
            place = Place(place.start, self._feed.start)
        page = await self._feeds.read(self._tenant_id, place)
        # Only one that has read all there is may begin the feed for others.
        if self._feed is None and page.next == Place(page.horizon):
            self._feed = self._feeds.join(self._tenant_id, page.next)
        return page
