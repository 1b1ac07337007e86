"""The state of follow_sessions, over all of its streams. It does no I/O, the same for both clients.

When the database is restored or a standby is promoted, the end of what was told may be lost. So the
state remembers what was told last, and the cursor before each. The server accepts a cursor only if
nothing is lost that was told before it. So what has to be read again is what was told after the
newest cursor that it accepts.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from chat_ticket.errors import HistoryChangedError
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest, WatchChatSessionsResponse
from chat_ticket.v1.resources_pb2 import ChatSession

Event = WatchChatSessionsResponse.Event

MAX_TOLD = 10_000
PAGE_SIZE = 100

# What is told instead of a revision.
GONE = -1
LEFT = -2


class Key(NamedTuple):
    """Names a session or a ticket."""

    is_session: bool
    id: str


class Told(NamedTuple):
    """What was told last of a session or a ticket."""

    revision: int
    cursor: str  # that of the response before


class FirstResponse:
    """The Resumable of a stream of which only the first response is wanted."""

    position = "nothing"
    has_ended = False

    def items(self, response: WatchChatSessionsResponse) -> Sequence[WatchChatSessionsResponse]:
        return [response]

    def on_stream_end(self) -> None:
        pass

    def on_not_found(self) -> Sequence[WatchChatSessionsResponse]:
        return []


class FollowedSessions:
    """The Resumable of WatchChatSessions."""

    has_ended = False  # it goes on until the caller has enough

    def __init__(self, first_request: WatchChatSessionsRequest):
        self._first_request = first_request
        self._cursor = first_request.cursor
        self._is_caught_up = False
        self._told: OrderedDict[Key, Told] = OrderedDict()  # in the order in which it was told
        self._has_forgotten = False  # something that was told in this call

    def request(self) -> WatchChatSessionsRequest:
        """That of the next stream."""
        return self.request_after(self._cursor)

    def request_after(self, cursor: str) -> WatchChatSessionsRequest:
        """The first request, except that it goes on after the cursor, if there is one."""
        request = WatchChatSessionsRequest()
        request.CopyFrom(self._first_request)
        if cursor:
            request.cursor, request.from_beginning = cursor, False
        return request

    @property
    def position(self) -> str:
        return "its last cursor" if self._cursor else "nothing"

    def items(self, response: WatchChatSessionsResponse) -> Sequence[WatchChatSessionsResponse]:
        for event in response.events:
            if event.HasField("caught_up"):
                if self._is_caught_up:
                    event.heartbeat.SetInParent()
                self._is_caught_up = True
        self._remember(response.events)
        self._cursor = response.cursor
        return [response]

    def on_stream_end(self) -> None:
        pass  # it ends by itself only when a proxy ends it

    def on_not_found(self) -> Sequence[WatchChatSessionsResponse]:
        return []

    def older_cursors(self) -> Iterator[str]:
        """Cursors of this call that the server may still accept, from the newest one to the oldest.

        The steps between them grow, so that a few requests find one.
        """
        cursors = [told.cursor for told in self._told.values()]
        steps = (10**exponent for exponent in range(len(str(MAX_TOLD))))
        candidates = [cursors[-step] for step in steps if step <= len(cursors)] + cursors[:1]
        if not self._has_forgotten:
            candidates.append(self._first_request.cursor)
        return (each for each in dict.fromkeys(candidates) if each and each != self._cursor)

    def cursor_of_refusal(self, refusal: HistoryChangedError) -> str:
        """Where to resume if the server accepts no older cursor. Empty means from the beginning.

        Raises the refusal unless all that was ever told can be read again.
        """
        if self._has_forgotten or self._first_request.cursor:
            raise refusal
        cursor = refusal.metadata.get("cursor", "")
        if not cursor:
            self._first_request.from_beginning = True
        return cursor

    def told_after(self, cursor: str) -> Iterator[list[Key]]:
        """What was told after an older cursor, newest first, in pages. Of another cursor, all."""
        told = list(self._told.items())
        # A cursor can be there twice, if a history changed before. All after the first is in doubt.
        first = next((i for i, (_, each) in enumerate(told) if each.cursor == cursor), 0)
        keys = [key for key, _ in reversed(told[first:])]
        return (keys[start : start + PAGE_SIZE] for start in range(0, len(keys), PAGE_SIZE))

    def corrections(self, events: Iterable[Event]) -> Sequence[WatchChatSessionsResponse]:
        """What to tell of sessions and tickets that were read again: what was told wrong.

        The cursor is the one before: whoever leaves in the middle resumes there, and is not told
        that all is well.
        """
        changed = [event for event in events if not self._is_still_true(event)]
        if not changed:
            return []
        self._remember(changed)
        return [WatchChatSessionsResponse(cursor=self._cursor, events=changed)]

    def resume_after(self, cursor: str) -> None:
        self._cursor = cursor

    def session_event(self, session: ChatSession) -> Event:
        """How a stream would tell the session."""
        if matches(session, self._first_request):
            return Event(session=session)
        return Event(left=WatchChatSessionsResponse.ChatSessionLeft(session_id=session.id))

    def _remember(self, events: Iterable[Event]) -> None:
        for event in events:
            if (state := state_of(event)) is not None:
                key, revision = state
                self._told[key] = Told(revision, self._cursor)
                self._told.move_to_end(key)
        while len(self._told) > MAX_TOLD:
            self._told.popitem(last=False)
            self._has_forgotten = True

    def _is_still_true(self, event: Event) -> bool:
        """Whether the event is what was told, or newer.

        Changes of the new history need no thought: the stream tells them.
        """
        state = state_of(event)
        if state is None:
            return True
        key, revision = state
        told = self._told[key].revision
        return revision >= told >= 0 or revision == told


def state_of(event: Event) -> tuple[Key, int] | None:
    """What an event says of a session or a ticket, and its revision, or GONE or LEFT."""
    match event.WhichOneof("event"):
        case "session":
            return Key(True, event.session.id), event.session.revision
        case "session_deleted":
            return Key(True, event.session_deleted.session_id), GONE
        case "left":
            return Key(True, event.left.session_id), LEFT
        case "ticket":
            return Key(False, event.ticket.id), event.ticket.revision
        case "ticket_deleted":
            return Key(False, event.ticket_deleted.ticket_id), GONE
        case _:
            return None


def gone_event(key: Key) -> Event:
    """How a stream would tell that it is deleted."""
    if key.is_session:
        deleted = WatchChatSessionsResponse.ChatSessionDeleted(session_id=key.id)
        return Event(session_deleted=deleted)
    return Event(ticket_deleted=WatchChatSessionsResponse.TicketDeleted(ticket_id=key.id))


def matches(session: ChatSession, filters: WatchChatSessionsRequest) -> bool:
    """Whether a session matches the filters of a request, as the server says."""
    return (
        (not filters.statuses or session.status in filters.statuses)
        and (not filters.HasField("has_ticket") or session.has_ticket == filters.has_ticket)
        and (not filters.user_id or session.user_id == filters.user_id)
        and filters.labels.items() <= session.labels.items()
    )
