"""What WatchChatSessions tells of a page of the feed, for the filters of a stream."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse as Response
from chat_ticket_svc.services import convert
from chat_ticket_svc.services.change_feed_cursor import Cursor
from chat_ticket_svc.store.change_feed import (
    DELETED_SESSION,
    SESSION,
    TICKET,
    Page,
    Row,
)

MAX_EVENTS = 500
MAX_RESPONSE_BYTES = 1024 * 1024

# Of the responses for a page, as many bytes as its rows have, or so many, are kept for others.
MIN_KEPT_BYTES = 64 * 1024

Event = Response.Event

# The section, position and id of a row: the row has not changed while they are the same.
RowKey = tuple[int, int, str]


class SessionFilter(NamedTuple):
    """Which sessions to tell. None does not filter. A session must have all of `labels`."""

    statuses: frozenset[str] | None
    has_ticket: bool | None
    user_id: str | None
    labels: Mapping[str, str]

    def matches(self, row: Row) -> bool:
        return self.is_of_user(row) and self.matches_state(
            row.status, row.has_ticket, self.labels_of(row)
        )

    def is_of_user(self, row: Row) -> bool:
        return self.user_id is None or row.user_id == self.user_id

    def labels_of(self, row: Row) -> Mapping[str, str]:
        """Those of a session. Empty if the filter has none."""
        labels: Mapping[str, str] = json.loads(row.labels) if row.labels and self.labels else {}
        return labels

    def matches_state(self, status: str, has_ticket: bool, labels: Mapping[str, str]) -> bool:
        """What of the filter can stop to match: the user of a session never changes."""
        return (
            (self.statuses is None or status in self.statuses)
            and (self.has_ticket is None or has_ticket == self.has_ticket)
            and self.labels.items() <= labels.items()
        )


def responses(
    page: Page,
    session_filter: SessionFilter,
    tenant_id: str,
    digest: str,
    cursor: Cursor,
    told: frozenset[RowKey],
) -> tuple[list[bytes], Cursor]:
    """The responses for a page after `cursor`, serialised, and the cursor after them.

    `told` are the rows that the stream has told already. The responses are made once for all
    streams at this cursor with the same filters, unless there are many such filters.
    """
    key = (digest, cursor, told)
    made = page.cache.get(key)
    if made is None:
        rows = [row for row in page.rows if row[:3] not in told] if told else page.rows
        made = _responses(page, rows, session_filter, tenant_id, digest, cursor)
        all_made = [*page.cache.values(), made]
        size = sum(len(response) for made_once, _ in all_made for response in made_once)
        if size <= max(page.size, MIN_KEPT_BYTES):
            page.cache[key] = made
    result: tuple[list[bytes], Cursor] = made
    return result


def told_early(page: Page, session_filter: SessionFilter) -> frozenset[RowKey]:
    """The rows of a page that need not be told again, if the next pass has them unchanged."""
    again = page.rows_again()
    is_whole_pass = page.place.end is None and page.next.end is None
    if not page.place.start and not is_whole_pass:
        # An earlier page may have told the session before it left the filter. Whether it has left
        # is not judged before the next pass.
        again = [row for row in again if row.section != SESSION or session_filter.matches(row)]
    return frozenset(row[:3] for row in again)


def _responses(
    page: Page,
    rows: Sequence[Row],
    session_filter: SessionFilter,
    tenant_id: str,
    digest: str,
    cursor: Cursor,
) -> tuple[list[bytes], Cursor]:
    # Not moved by a page without events, so that it stays as low as possible.
    told = cursor._replace(wal_position=page.wal_position)
    tenant = convert.tenant_field(tenant_id)
    made: list[bytes] = []
    events: list[bytes] = []
    size, last = 0, None
    for row in rows:
        event = _event(row, session_filter, tenant_id, tenant, page.place.start)
        if event is None:
            continue
        size += len(event) + 8
        if last and (len(events) == MAX_EVENTS or size > MAX_RESPONSE_BYTES):
            last_cursor = told._replace(place=page.place_after(last)).encode(digest)
            made.append(_response(last_cursor, events))
            events, size = [], len(event) + 8
        events.append(event)
        last = row
    if last is None:
        return [], cursor._replace(place=page.next)
    told = told._replace(place=page.next)
    made.append(_response(told.encode(digest), events))
    return made, told


def _response(cursor: str, events: Iterable[bytes]) -> bytes:
    """A response in the wire format: a follower may be told every session of its tenant."""
    parts = [Response(cursor=cursor).SerializeToString()]
    for event in events:
        parts += (b"\x12", convert.varint(len(event)), event)
    return b"".join(parts)


def _event(
    row: Row, session_filter: SessionFilter, tenant_id: str, tenant: bytes, start: int
) -> bytes | None:
    """What to tell of a row that has changed at or after `start`, if anything, as an Event."""
    if row.section == SESSION:
        if session_filter.matches(row):
            return convert.session_field(tenant, row)
        if not _may_have_matched(row, session_filter, start):
            return None
        event = Event(left=Response.ChatSessionLeft(session_id=row.id))
    elif row.section == DELETED_SESSION:
        event = Event(session_deleted=Response.ChatSessionDeleted(session_id=row.id))
    elif row.section == TICKET:
        event = Event(ticket=convert.ticket(row.ticket(tenant_id)))
    else:
        event = Event(ticket_deleted=Response.TicketDeleted(ticket_id=row.id))
    return event.SerializeToString()


def _may_have_matched(row: Row, session_filter: SessionFilter, start: int) -> bool:
    """Whether a session that does not match now may have been told as one that matches."""
    if not session_filter.is_of_user(row):
        return False
    if start == 0 or row.filter_position < start or row.filter_before is None:
        return False
    before: dict[str, Any] = json.loads(row.filter_before)
    # Of several changes since then, only what was before the last one is known.
    return before["position"] >= start or session_filter.matches_state(
        before.get("status", row.status),
        before.get("has_ticket", row.has_ticket),
        before.get("labels", session_filter.labels_of(row)),
    )
