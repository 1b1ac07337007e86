"""The streams of WatchChatSessions."""

import time
from collections.abc import AsyncIterator

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse as Response
from chat_ticket_svc import errors
from chat_ticket_svc.services import change_feed_events
from chat_ticket_svc.services.change_feed_cursor import Cursor, HistoryChanged
from chat_ticket_svc.services.change_feed_events import Event, RowKey, SessionFilter
from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.change_feed import Page, Place
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.change_feed import ChangeFeeds

# The place of a caller that knows nothing.
BEGINNING = Place(0)


async def watch(
    db: Database,
    feeds: ChangeFeeds,
    tenant_id: str,
    digest: str,
    session_filter: SessionFilter,
    start: Cursor | Place | None,
) -> AsyncIterator[bytes]:
    """The responses of a stream from `start`; None stands for now."""
    # Otherwise a restored database would stay in the old epoch until its first write.
    async with feeds.read_slot(tenant_id):
        await change_feed.ensure_epoch(db)
    cursor = start if isinstance(start, Cursor) else None
    place = start.place if isinstance(start, Cursor) else start
    is_caught_up = False
    # The position of the newest transaction when the stream began.
    caught_up_at: int | None = None
    told_early: frozenset[RowKey] = frozenset()
    sent_at = time.monotonic()
    with feeds.follower(tenant_id) as follower:
        while True:
            page = await follower.next_page(cursor.place if cursor else place)
            if page is not None:
                cursor = await _in_epoch_of(page, cursor, db, digest)
                if caught_up_at is None:
                    # A stream that begins now has nothing to catch up with.
                    caught_up_at = page.newest if place else 0
                made, cursor = change_feed_events.responses(
                    page, session_filter, tenant_id, digest, cursor, told_early
                )
                told_early = change_feed_events.told_early(page, session_filter)
                for response in made:
                    sent_at = time.monotonic()
                    yield response
            if cursor is None:
                continue
            if not is_caught_up and caught_up_at is not None and cursor.place.start >= caught_up_at:
                is_caught_up = True
                sent_at = time.monotonic()
                yield _response(cursor, digest, Event(caught_up=Response.CaughtUp()))
            elif time.monotonic() - sent_at >= feeds.quiet_seconds:
                sent_at = time.monotonic()
                yield _response(cursor, digest, Event(heartbeat=Response.Heartbeat()))
            # Many streams wait for a long time, and their local variables would keep memory.
            page, made, response = None, [], b""


async def _in_epoch_of(page: Page, cursor: Cursor | None, db: Database, digest: str) -> Cursor:
    """The cursor before a page, in the history that the page was read from."""
    if cursor is None:
        return Cursor(page.place, page.epoch_id, page.wal_position)
    if cursor.epoch_id == page.epoch_id:
        return cursor
    try:
        return cursor.in_current_epoch(await change_feed.list_epochs(db), page.wal_position)
    except HistoryChanged as change:
        raise errors.OutOfRangeError(
            "the database has another history: what was told may be no more",
            reason="HISTORY_CHANGED",
            metadata={"cursor": change.cursor.encode(digest)} if change.cursor else None,
        ) from change


def _response(cursor: Cursor, digest: str, event: Event) -> bytes:
    return Response(cursor=cursor.encode(digest), events=[event]).SerializeToString()
