"""The state that makes many streams of a watch look like one."""

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse
from chat_ticket.v1.resources_pb2 import ChatSession


class ResumeState:
    """What a watch has delivered so far, over all of its streams.

    Pure: it does no I/O, and does not know which client uses it.
    """

    def __init__(self, revision: int):
        self.revision = revision
        """Everything up to here is delivered. The next stream starts after it."""
        self.session: ChatSession | None = None
        """As delivered last. None until the first stream has begun."""
        self.ended = False
        """Whether the session is deleted, after which nothing follows."""
        self._caught_up = False

    def accept(self, response: WatchChatSessionResponse) -> WatchChatSessionResponse | None:
        """The event to deliver for a response.

        None when the response only repeats what every stream begins with: the session, and the
        end of the backlog.
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
            case "caught_up" if self._caught_up:
                # A second caught_up is delivered as a heartbeat, and only if the revision moved.
                is_known = response.revision == self.revision
                response.heartbeat.SetInParent()
            case "caught_up":
                self._caught_up = True
            case "session_deleted":
                self.ended = True
        # The revision counts whether or not this response is delivered.
        self.revision = response.revision
        return None if is_known else response

    def _is_known(self, session: ChatSession) -> bool:
        """Whether the session shows nothing new.

        Its other fields change with every message, which has an event of its own.
        """
        previous = self.session
        return previous is not None and (previous.status, previous.has_ticket) == (
            session.status,
            session.has_ticket,
        )

    def session_deleted(self) -> WatchChatSessionResponse:
        """End the watch; returns the event that the server would have sent."""
        self.ended = True
        return WatchChatSessionResponse(
            revision=self.revision, session_deleted=WatchChatSessionResponse.ChatSessionDeleted()
        )
