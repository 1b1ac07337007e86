"""The state that makes many streams look like one. It does no I/O, the same for both clients."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import grpc

from chat_ticket.client._corrections import Corrections
from chat_ticket.client._followed_drafts import FollowedDrafts
from chat_ticket.client._position import Position
from chat_ticket.client._told_messages import ToldMessages
from chat_ticket.errors import HistoryChangedError, NotFoundError
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, ListChatMessagesResponse
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse
from chat_ticket.v1.resources_pb2 import ChatMessage, ChatSession, ChatTicket

Response = TypeVar("Response", contravariant=True)
Item = TypeVar("Item", covariant=True)


class Resumable(Protocol[Response, Item]):
    """What was delivered so far, of a stream that is started again after each break."""

    @property
    def position(self) -> str:
        """After what the next stream starts, for the log."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing is left to deliver."""

    def items(self, response: Response) -> Sequence[Item]:
        """What to deliver for a response."""

    def on_stream_end(self) -> None:
        """The server ended the stream without an error."""

    def on_not_found(self) -> Sequence[Item]:
        """What to deliver at last when the session is not found. Empty: that is an error."""


class ResumeState:
    """What a watch has delivered so far, over all of its streams.

    It does no I/O, and does not know which client uses it.
    """

    def __init__(self, revision: int, epoch: str = ""):
        self.revision = revision
        """Everything up to here is delivered. The next stream starts after it."""
        self.epoch = epoch
        """The history that the revision belongs to. Empty when it is not known."""
        self.session: ChatSession | None = None
        """As delivered last. None until the first stream has begun."""
        self.ticket = ChatTicket()
        """As delivered last. Empty while the session is linked to none."""
        self.ended = False
        """Whether the session is deleted, after which nothing follows."""
        self._caught_up = False
        self._delivered = self.position  # of the last event

    @property
    def position(self) -> Position:
        """The revision and its epoch."""
        return Position(self.revision, self.epoch)

    def move_to(self, position: Position) -> None:
        """Go on from another position, which was delivered."""
        self.revision, self.epoch = self._delivered = position

    def accept(self, response: WatchChatSessionResponse) -> WatchChatSessionResponse | None:
        """The event to deliver for a response.

        None when the response only repeats what every stream begins with: the session, its ticket,
        and the end of the backlog.
        """
        is_known = False
        match response.WhichOneof("event"):
            case "session":
                previous = self.session
                if previous is not None and previous.create_time != response.session.create_time:
                    # The id was used again, which callers must not do. The watched one is gone.
                    return self.session_deleted()
                is_known = self._is_known(response.session)
                self.session = response.session
            case "ticket":
                is_known = response.ticket == self.ticket
                self.ticket = response.ticket
            case "caught_up" if self._caught_up:
                # A second caught_up is delivered as a heartbeat, and only if the position moved.
                is_known = (response.revision, response.epoch) == self._delivered
                response.heartbeat.SetInParent()
            case "caught_up":
                self._caught_up = True
            case "session_deleted":
                self.ended = True
        # The position counts whether or not this response is delivered.
        self.revision, self.epoch = response.revision, response.epoch
        if is_known:
            return None
        self._delivered = self.position
        return response

    def _is_known(self, session: ChatSession) -> bool:
        """Whether the session shows nothing new.

        Its other fields change with every message, which has an event of its own.
        """
        previous = self.session
        return previous is not None and (
            previous.status == session.status
            and previous.has_ticket == session.has_ticket
            and previous.title == session.title
            and previous.labels == session.labels
        )

    def unlinked(self, response: WatchChatSessionResponse) -> Sequence[WatchChatSessionResponse]:
        """The event that an unbroken stream has had, for a ticket that is gone.

        `response` is the first of a stream. A new stream does not say that the session was unlinked
        meanwhile: it begins with a session without a ticket.
        """
        is_unlinked = response.HasField("session") and not response.session.has_ticket
        if self.ended or not is_unlinked or not self.ticket.id:
            return []
        self.ticket = ChatTicket()
        return [self.position.event(ticket=self.ticket)]

    def session_deleted(self) -> WatchChatSessionResponse:
        """End the watch; returns the event that the server would have sent."""
        self.ended = True
        return self.position.event(session_deleted=WatchChatSessionResponse.ChatSessionDeleted())


class WatchProgress:
    """The Resumable of WatchChatSession."""

    def __init__(
        self, session_id: str, after_revision: int, epoch: str = "", *, include_drafts: bool
    ):
        self._session_id = session_id
        self._include_drafts = include_drafts
        self._state = ResumeState(after_revision, epoch)
        self._sent_epoch = epoch
        self._drafts = FollowedDrafts()
        self._told = ToldMessages(after_revision)
        self._is_at_start = True  # of a stream

    def request(self) -> WatchChatSessionRequest:
        """That of the next stream."""
        self._drafts.begin_stream()
        self._is_at_start = True
        self._sent_epoch = self._state.epoch
        return WatchChatSessionRequest(
            session_id=self._session_id,
            after_revision=self._state.revision,
            epoch=self._state.epoch,
            include_drafts=self._include_drafts,
        )

    @property
    def position(self) -> str:
        return f"revision {self._state.revision}"

    @property
    def has_new_epoch(self) -> bool:
        """Whether the next stream names the epoch of its position, and this one did not."""
        return bool(self._state.epoch) and not self._sent_epoch

    @property
    def has_ended(self) -> bool:
        return self._state.ended

    def items(self, response: WatchChatSessionResponse) -> Sequence[WatchChatSessionResponse]:
        position = self._state.position
        before = self._drafts.ended_before(response, position)
        event = self._state.accept(response)
        if event is not None:
            self._told.add(event)
            event = self._drafts.accept(event)
        if self._state.ended:
            before = [*before, *self._drafts.all_ended(position)]
        unlinked = self._state.unlinked(response) if self._is_at_start else []
        self._is_at_start = False
        return [*before, *([] if event is None else [event]), *unlinked]

    def on_stream_end(self) -> None:
        pass  # it ends by itself only after session_deleted, or when a proxy ends it

    def on_not_found(self) -> Sequence[WatchChatSessionResponse]:
        if self._state.session is None:
            return []
        ended = self._drafts.all_ended(self._state.position)
        return [*ended, self._state.session_deleted()]

    def corrections(self, change: HistoryChangedError) -> Corrections:
        """How to tell that the history has changed. Raises the error if that is not known.

        It is not known what an earlier process was told.
        """
        if change.revision < self._told.first_known:
            raise change
        shared = Position(change.revision, change.epoch)
        return Corrections(self._told, self._drafts, self._state.position, shared)

    def resume_after(self, corrections: Corrections) -> None:
        """Go on after all corrections have been delivered."""
        self._state.move_to(corrections.shared)


class ListProgress:
    """The Resumable of ListChatMessages."""

    def __init__(self, session_id: str, after_sequence: int):
        self._session_id = session_id
        self._sequence = after_sequence
        self._session: ChatSession | None = None
        self._is_complete = False

    def request(self) -> ListChatMessagesRequest:
        request = ListChatMessagesRequest(
            session_id=self._session_id, after_sequence=self._sequence
        )
        if self._session is not None:
            # As far as the first stream would have gone.
            request.before_sequence = self._session.revision + 1
            request.epoch = self._session.epoch
        return request

    @property
    def position(self) -> str:
        return f"sequence {self._sequence}"

    @property
    def has_ended(self) -> bool:
        return self._is_complete

    def items(self, response: ListChatMessagesResponse) -> Sequence[ChatMessage]:
        if response.HasField("session"):
            if self._session is None:
                self._session = response.session
            elif self._session.create_time != response.session.create_time:
                # The id was used again, which callers must not do. The listed one is gone.
                raise NotFoundError(grpc.StatusCode.NOT_FOUND, "the session was deleted meanwhile")
        if response.messages:
            self._sequence = response.messages[-1].sequence
        return response.messages

    def on_stream_end(self) -> None:
        self._is_complete = True

    def on_not_found(self) -> Sequence[ChatMessage]:
        return []
