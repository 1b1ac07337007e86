"""The streams of WatchChatSession, with drafts and without."""

import functools
from collections.abc import AsyncIterator
from typing import NamedTuple, Protocol

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from chat_ticket_svc import errors
from chat_ticket_svc.services import paging
from chat_ticket_svc.services.session_page import (
    SerializedPage,
    SessionState,
    TicketState,
    first_events,
    read_page,
    serialize,
)
from chat_ticket_svc.services.shown_drafts import ShownDrafts
from chat_ticket_svc.store import epochs, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.draft_feed import DraftsChanged
from chat_ticket_svc.watch.hub import WatchHub


class ResponseWriter(Protocol):
    """Writes the responses of a call."""

    def start_write(self, message: bytes) -> bool:
        """Begin to send a response. Returns False if the one before it is not sent yet."""


async def watch(
    db: Database,
    watch_hub: WatchHub,
    tenant_id: str,
    session_id: str,
    after: int,
    epoch: str,
    writer: ResponseWriter,
) -> AsyncIterator[bytes]:
    """The events of a stream without drafts. An empty `epoch` is not checked.

    While the stream waits, it yields only what `writer` could not begin to send at once.
    """
    page_size = paging.MIN_STREAM_PAGE
    stream = _WatchStream(session_id, after, epoch)
    with watch_hub.watch(tenant_id, session_id, functools.partial(read_page, db)) as watcher:
        while not stream.is_finished:
            if stream.is_caught_up:
                page = await watcher.next_page(functools.partial(stream.send_at_once, writer))
            else:
                page = await watcher.read_page(stream.revision, page_size)
                page_size = min(2 * page_size, paging.MAX_STREAM_PAGE)
            for event in stream.advance(page):
                yield event
            # Many streams wait for a long time, and their local variables would keep memory.
            del page, event


async def watch_with_drafts(
    db: Database, watch_hub: WatchHub, tenant_id: str, session_id: str, after: int, epoch: str
) -> AsyncIterator[bytes]:
    """The events of a stream that shows drafts too. An empty `epoch` is not checked."""
    page_size = paging.MIN_STREAM_PAGE
    stream = _WatchStream(session_id, after, epoch)
    with (
        watch_hub.watch(tenant_id, session_id, functools.partial(read_page, db)) as watcher,
        watcher.following_drafts() as feed,
    ):
        drafts = ShownDrafts(feed)
        while not (stream.is_caught_up or stream.is_finished):
            sent = stream.revision
            history = await watcher.read_page(sent, page_size)
            page_size = min(2 * page_size, paging.MAX_STREAM_PAGE)
            events = stream.advance(history)
            caught_up = events.pop() if stream.is_caught_up else b""
            for event in events:
                yield event
            if caught_up:
                await watcher.read_drafts(feed)
                # Where no message has changed, only `caught_up` moves the position.
                if events:
                    sent = Event.FromString(events[-1]).revision
                for event in drafts.news(sent, stream.epoch):
                    yield event
                yield caught_up
        del history
        while not stream.is_finished:
            page = await watcher.next_page_or_drafts(feed, drafts.seen_version)
            if not isinstance(page, DraftsChanged):
                ended = drafts.ended_by(page)
                events = stream.advance(page, ended)
                if stream.is_finished:
                    for event in drafts.end_all(stream.revision, stream.epoch):
                        yield event
                drafts.forget(ended)
                for event in events:
                    yield event
            for event in drafts.news(stream.revision, stream.epoch):
                yield event
            # As above.
            page, events, event = None, [], b""


class StreamState(NamedTuple):
    """What a stream has sent."""

    revision: int
    position: epochs.Position
    created_at: int | None = None
    session_state: SessionState | None = None
    ticket_state: TicketState | None = None
    is_caught_up: bool = False


class _WatchStream:
    """A stream's state, and the events that bring it to the next one."""

    def __init__(self, session_id: str, after: int, epoch: str):
        self._session_id = session_id
        self._sent_epoch = bool(epoch)
        self._state = StreamState(revision=after, position=epochs.parse(epoch, after))
        self.is_finished = False

    @property
    def revision(self) -> int:
        return self._state.revision

    @property
    def is_caught_up(self) -> bool:
        return self._state.is_caught_up

    @property
    def epoch(self) -> str:
        """What the caller sends with the revision to resume."""
        return str(self._state.position)

    def send_at_once(self, writer: ResponseWriter, page: SerializedPage | None) -> bool:
        """Begin to send the event of a page, and move to its end, if it has only one event."""
        state = self._state
        try:
            events = self.advance(page)
        except errors.DomainError:
            return False
        if not self.is_finished and len(events) == 1 and writer.start_write(events[0]):
            return True
        self._state, self.is_finished = state, False
        return False

    def advance(
        self, page: SerializedPage | None, ended_drafts: frozenset[str] = frozenset()
    ) -> list[bytes]:
        """Move to the end of a page, and return its events. None stands for a heartbeat.

        The drafts that have become messages of the page end just before them.
        """
        if page is None:
            return [serialize(self.revision, self.epoch, heartbeat=Event.Heartbeat())]
        if not ended_drafts and (advance := page.advances.get(self._state)):
            self._state, events = advance
            return events
        before = self._state
        if page.position is None:
            if before.created_at is None:
                raise sessions.not_found(self._session_id)
            return self._end()
        end, epoch = page.session.revision, page.session.epoch
        history, head, exact = before.position
        shared = epochs.shared_revision(history or epoch, head, epoch, end)
        if before.created_at not in (None, page.position.created_at):
            # Ids are not reused. If one is, the session that was watched is gone all the same. But
            # a session that the database has lost can be created again.
            if shared >= 0 or not self._sent_epoch:
                return self._end()
            raise errors.HistoryChangedError(0, epoch)
        if head > max(0, shared):
            if self._sent_epoch:
                raise errors.HistoryChangedError(max(0, min(shared, exact)), epoch)
            raise errors.OutOfRangeError(
                f"revision {head} does not exist, or no more: the session is at {end}",
                reason="REVISION_OUT_OF_RANGE",
            )
        states = _states(before, page)
        changes = page.changes_ending(ended_drafts) if ended_drafts else page.changes
        between = epochs.Position(epoch, end, exact)
        if head != exact:
            states = _at(between, states)
        if page.has_more:
            events = [*states, *_at(between, changes)]
        else:
            events = [*states, *_at(between, changes[:-1]), *changes[-1:]]
        is_caught_up = before.is_caught_up or not page.has_more
        if is_caught_up and not before.is_caught_up:
            events = [*events, serialize(end, epoch, caught_up=Event.CaughtUp())]
        elif not events:
            # The changes have cancelled each other out. A heartbeat carries the new revision.
            events = [serialize(end, epoch, heartbeat=Event.Heartbeat())]
        self._state = StreamState(
            revision=page.position.revision,
            position=between if page.has_more else epochs.Position(epoch, end, end),
            created_at=page.position.created_at,
            session_state=page.session_state,
            ticket_state=page.ticket_state,
            is_caught_up=is_caught_up,
        )
        if before.is_caught_up and not ended_drafts:
            page.advances[before] = self._state, events
        return events

    def _end(self) -> list[bytes]:
        self.is_finished = True
        deleted = Event.ChatSessionDeleted()
        return [serialize(self.revision, self.epoch, session_deleted=deleted)]


def _states(before: StreamState, page: SerializedPage) -> list[bytes]:
    """The events of the session and of its ticket, as far as they are new to a stream."""
    if before.session_state is None:
        return first_events(before.revision, page)
    return page.state_events(
        session=before.session_state != page.session_state,
        ticket=before.ticket_state != page.ticket_state,
    )


def _at(position: epochs.Position, events: list[bytes]) -> list[bytes]:
    """The events with the epoch of a position between changes: of a field, the last one counts."""
    if not events:
        return []
    epoch = Event(epoch=str(position)).SerializeToString()
    return [event + epoch for event in events]
