"""What a follower of the tenant's feed was told, over all its streams."""

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, NamedTuple

from chat_ticket.v1 import resources_pb2 as r
from faults.feed_audit import Key, SessionState, Snapshot, State, Stored, TicketState


class Event(Enum):
    """What an event of the feed says of a session or ticket."""

    STATE = auto()
    DELETED = auto()
    LEFT = auto()


class Told(NamedTuple):
    key: Key
    event: Event
    revision: int = 0
    state: State | None = None


class Checkpoint(NamedTuple):
    """The moment at which a stream had caught up with what was there when it began."""

    told: int  # how many events the follower had been told by then
    xmin: int  # all transactions below had ended before the stream began


@dataclass(frozen=True)
class Filters:
    """Those of the request."""

    statuses: tuple[str, ...] = ()
    has_ticket: bool | None = None
    user_id: str = ""
    labels: tuple[tuple[str, str], ...] = ()

    def match(self, state: State) -> bool:
        """Whether it is told; tickets always are."""
        return isinstance(state, TicketState) or (
            (not self.statuses or state.status in self.statuses)
            and self.has_ticket in (None, state.has_ticket)
            and self.user_id in ("", state.user_id)
            and set(self.labels) <= set(state.labels)
        )

    @property
    def request(self) -> dict[str, Any]:
        """The fields of the request."""
        return {
            "statuses": [SESSION_STATUSES[status] for status in self.statuses],
            "has_ticket": self.has_ticket,
            "user_id": self.user_id,
            "labels": dict(self.labels),
        }


@dataclass(kw_only=True)
class FeedRecord:
    """What one follower was told."""

    tenant: str
    name: str = ""
    filters: Filters = Filters()
    from_beginning: bool = True
    # What was committed when the first response had come: what was committed later must be told.
    began: Snapshot | None = None
    cursor: str = ""
    streams: int = 0
    told: list[Told] = field(default_factory=list)
    held: dict[Key, Stored] = field(default_factory=dict)  # after all that was told
    checkpoints: list[Checkpoint] = field(default_factory=list)

    def apply(self, response: Any) -> bool:
        """Take down a response; whether the stream has caught up with it."""
        has_caught_up = False
        for event in response.events:
            match event.WhichOneof("event"):
                case "session":
                    session = event.session
                    told = Told(
                        ("session", session.id), Event.STATE, session.revision, _session(session)
                    )
                case "ticket":
                    ticket = event.ticket
                    told = Told(
                        ("ticket", ticket.id), Event.STATE, ticket.revision, _ticket(ticket)
                    )
                case "session_deleted":
                    told = Told(("session", event.session_deleted.session_id), Event.DELETED)
                case "ticket_deleted":
                    told = Told(("ticket", event.ticket_deleted.ticket_id), Event.DELETED)
                case "left":
                    told = Told(("session", event.left.session_id), Event.LEFT)
                case kind:
                    has_caught_up |= kind == "caught_up"
                    continue
            self.told.append(told)
            if told.state is None:
                self.held.pop(told.key, None)
            else:
                self.held[told.key] = Stored(told.revision, told.state)
        self.cursor = response.cursor
        return has_caught_up


# As the database writes them.
SESSION_STATUSES = {
    name.removeprefix("CHAT_SESSION_STATUS_").lower(): number
    for name, number in r.ChatSessionStatus.items()
}
TICKET_STATUSES = {
    name.removeprefix("TICKET_STATUS_").lower(): number for name, number in r.TicketStatus.items()
}
_SESSION_STATUS = {number: name for name, number in SESSION_STATUSES.items()}
_TICKET_STATUS = {number: name for name, number in TICKET_STATUSES.items()}


def _session(session: r.ChatSession) -> SessionState:
    return SessionState.of(
        _SESSION_STATUS[session.status],
        session.has_ticket,
        session.user_id,
        session.title,
        dict(session.labels),
    )


def _ticket(ticket: r.Ticket) -> TicketState:
    return TicketState(_TICKET_STATUS[ticket.status], ticket.title, ticket.external_ref)
