"""A page of the changes of a session, as the events that all streams at its position send."""

import functools
from collections.abc import Iterator
from typing import Any

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from chat_ticket.v1.resources_pb2 import ChatTicket
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.store import session_changes, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.watch.cursor_group import Position

# What the event of a session tells: it is sent again when this changes.
SessionState = tuple[str, bool, str | None, str | None]
# What differs whenever the event of a ticket does. A ticket changes with its time, also when its
# database goes on from an older copy.
TicketState = tuple[str, str, int]


async def read_page(
    db: Database, tenant_id: str, session_id: str, after: int, limit: int | None = None
) -> "SerializedPage":
    """Read the changes after a revision: `limit` of them, or as many as a page may hold.

    Without a limit it reads a small page first, because there are rarely more changes.
    """
    read = functools.partial(session_changes.page, db, tenant_id, session_id, after=after)
    page = await read(limit=limit or paging.MIN_STREAM_PAGE)
    if limit is None and page is not None and page.more:
        page = await read(limit=paging.MAX_STREAM_PAGE)
    return SerializedPage(after, page)


class SerializedPage:
    """The changes after a revision, serialised once for all streams that send them."""

    position: Position | None = None  # None when the session does not exist; nothing else is set
    has_more = False

    def __init__(self, after: int, page: session_changes.ChangePage | None):
        if page is None:
            return
        self.position = Position(page.session.created_at, page.revision, page.session.epoch)
        self.has_more = page.more
        self.after = after
        self.session = page.session
        self.session_state = _state(page.session)
        self.chat_ticket = page.chat_ticket
        self.ticket_state: TicketState | None = page.chat_ticket and (
            page.chat_ticket.id,
            page.chat_ticket.ticket.id,
            page.chat_ticket.ticket.updated_at,
        )
        self.changes = [event.SerializeToString() for event in _events(page)]

    @functools.cached_property
    def advances(self) -> dict[Any, tuple[Any, list[bytes]]]:
        """The states of streams before this page, each with the one after it and the events."""
        return {}

    @functools.cached_property
    def _state_events(self) -> dict[tuple[bool, bool], list[bytes]]:
        return {}

    def state_events(self, *, session: bool, ticket: bool) -> list[bytes]:
        """The events of a changed session and of a changed ticket, or of one linked no more.

        They are sent first, as their place among the changes is unknown. Only the last event of the
        page moves the position.
        """
        events = self._state_events.get((session, ticket))
        if events is None:
            after, last = self.after, self.after if self.changes else self.session.revision
            epoch = self.session.epoch
            events = self._state_events[session, ticket] = []
            if session:
                revision = after if ticket else last
                events.append(serialize(revision, epoch, session=convert.session(self.session)))
            if ticket:
                events.append(serialize(last, epoch, ticket=_ticket(self.chat_ticket)))
        return events

    @functools.cached_property
    def message_ids(self) -> frozenset[str]:
        """The messages that the page creates or deletes."""
        events = [Event.FromString(change) for change in self.changes]
        deleted = {event.message_deleted.message_id for event in events}
        return frozenset(deleted.union(*map(_created_ids, events)))

    @functools.cached_property
    def _changes_ending(self) -> dict[frozenset[str], list[bytes]]:
        return {}

    def changes_ending(self, draft_ids: frozenset[str]) -> list[bytes]:
        """The changes, with the end of each of these drafts just before its message.

        An event of several messages is split, so that such a message is the first of its event.
        """
        changes = self._changes_ending.get(draft_ids)
        if changes is None:
            changes = self._changes_ending[draft_ids] = list(self._end_drafts(draft_ids))
        return changes

    def _end_drafts(self, draft_ids: frozenset[str]) -> Iterator[bytes]:
        revision, epoch = self.after, self.session.epoch
        for change in self.changes:
            event = Event.FromString(change)
            if event.message_deleted.message_id in draft_ids:
                yield draft_ended(revision, epoch, event.message_deleted.message_id)
            if draft_ids.isdisjoint(_created_ids(event)):
                yield change
            else:
                part = Event(epoch=epoch)
                for message in event.messages_created.messages:
                    if message.id in draft_ids:
                        if part.messages_created.messages:
                            revision = part.revision
                            yield part.SerializeToString()
                            part = Event(epoch=epoch)
                        yield draft_ended(revision, epoch, message.id)
                    part.revision = message.sequence
                    part.messages_created.messages.append(message)
                part.revision = event.revision
                yield part.SerializeToString()
            revision = event.revision


def _state(session: Session) -> SessionState:
    return session.status, session.has_ticket, session.title, session.labels


def serialize(revision: int, epoch: str, **event: Any) -> bytes:
    """A response of WatchChatSession."""
    return Event(revision=revision, epoch=epoch, **event).SerializeToString()


def first_events(revision: int, page: SerializedPage) -> list[bytes]:
    """What every stream begins with, at its position: the session, and its ticket if it has one."""
    epoch = page.session.epoch
    events = [serialize(revision, epoch, session=convert.session(page.session))]
    if page.chat_ticket is not None:
        events.append(serialize(revision, epoch, ticket=_ticket(page.chat_ticket)))
    return events


def draft_ended(revision: int, epoch: str, draft_id: str) -> bytes:
    return serialize(revision, epoch, draft_ended=Event.ChatDraftEnded(draft_id=draft_id))


def _ticket(row: tickets.ChatTicket | None) -> ChatTicket:
    return ChatTicket() if row is None else convert.chat_ticket(row)


def _created_ids(event: Event) -> Iterator[str]:
    return (message.id for message in event.messages_created.messages)


def _events(page: session_changes.ChangePage) -> Iterator[Event]:
    """Convert the changes of a page. Consecutive new messages share an event.

    The last event has the revision of the page, which may be beyond its last change.
    """
    response = None
    for change in page.changes:
        if response is not None and not (
            change.kind == "created" and response.HasField("messages_created")
        ):
            yield response
            response = None
        response = response or Event(epoch=page.session.epoch)
        response.revision = change.revision
        if change.message is None:
            response.message_deleted.message_id = change.message_id
        elif change.kind == "created":
            response.messages_created.messages.append(convert.message(change.message))
        else:
            response.message_updated.CopyFrom(convert.message(change.message))
    if response is not None:
        response.revision = page.revision
        yield response
