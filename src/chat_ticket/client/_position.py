"""Where a watch is in a session."""

from typing import Any, NamedTuple

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse


class Position(NamedTuple):
    """A revision of a session, and the history that it belongs to."""

    revision: int
    epoch: str = ""
    """Empty when it is not known."""

    def event(self, **event: Any) -> WatchChatSessionResponse:
        """A response at this position, as the server would send it."""
        return WatchChatSessionResponse(revision=self.revision, epoch=self.epoch, **event)
