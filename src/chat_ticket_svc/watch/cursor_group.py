"""Watchers that have received equally much of a session, and the page that they need next."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, Protocol, TypeVar


class Position(NamedTuple):
    """How much of a session a watcher has received.

    Includes the creation time. If an id were used again, against the rules, the positions of the
    two sessions would still differ. Includes the epoch. If the database goes back, to a standby or
    a backup, the same revision can be another change.
    """

    created_at: int
    revision: int
    epoch: str  # of the session: see store/epochs.py


class WatchPage(Protocol):
    """The changes after a position."""

    @property
    def position(self) -> Position | None:
        """The position after this page. None when the session is deleted."""

    @property
    def has_more(self) -> bool:
        """Whether the session already had further changes when the page was read."""


P = TypeVar("P", bound=WatchPage)
P_co = TypeVar("P_co", bound=WatchPage, covariant=True)


class PageReader(Protocol[P_co]):
    """Reads the page after a revision of a session; without `limit`, one of the usual size."""

    def __call__(
        self, tenant_id: str, session_id: str, after: int, limit: int | None = ...
    ) -> Awaitable[P_co]: ...


# Sends a page, or a heartbeat for None. Returns False if it could not be sent at once.
Take = Callable[[P | None], bool]


class CursorGroup(Generic[P]):
    """The watchers at one position of a session, and the page that they need next."""

    def __init__(self, position: Position):
        self.position = position
        self.watcher_count = 0
        # Each with what may take a page in its place, see `deliver`.
        self.waiters: dict[asyncio.Future[P | None], Take[P] | None] = {}
        self.next_page: P | None = None
        self.read_task: asyncio.Task[None] | None = None
        # The changes already read for this position: the session's `change_count` when the read
        # that ended here, or started here, began. -1: none, so a read is due.
        self.covered_changes = -1

    def deliver(self, page: P | None) -> None:
        """Resume the waiting watchers with a page, or with None for a heartbeat.

        A watcher whose `take` accepts it is not resumed.
        """
        for waiter, take in list(self.waiters.items()):
            if not waiter.done() and (take is None or not take(page)):
                waiter.set_result(page)

    def fail(self, error: Exception) -> None:
        """End the streams of the waiting watchers with an error."""
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)
