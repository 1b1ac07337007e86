"""What a watch tells its caller when the database has lost changes that it told. It does no I/O."""

from collections import deque
from collections.abc import Iterator

from chat_ticket.client._followed_drafts import FollowedDrafts
from chat_ticket.client._position import Position
from chat_ticket.client._told_messages import ToldMessages
from chat_ticket.v1.chat_message_pb2 import GetChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse
from chat_ticket.v1.resources_pb2 import ChatMessage

MAX_CREATED = 500  # messages of a response, as the server sends them


class Corrections:
    """The events that lead from what was told to the history up to `shared`, where both agree.

    Whoever resumes after the shared revision never hears of what was told after it. So the events
    have the position before, which a server refuses. Only the last one, a heartbeat, has the shared
    one.
    """

    def __init__(
        self, told: ToldMessages, drafts: FollowedDrafts, before: Position, shared: Position
    ):
        self.shared = shared
        self._told = told
        self._drafts = drafts
        self._before = before
        undone = told.undo(shared.revision)
        self._lost = undone.created
        self._unread = deque([*undone.changed, *undone.deleted])
        self._deleted = set(undone.deleted)
        self._created: list[ChatMessage] = []

    def first_events(self) -> Iterator[WatchChatSessionResponse]:
        """What is gone: all drafts, and lost messages. What the new history has of it comes later.

        A draft can have gone on with another text.
        """
        yield from self._drafts.all_ended(self._before)
        for message_id in self._lost:
            yield self._gone(message_id)

    def next_read(self) -> GetChatMessageRequest | None:
        """What to read now, to tell how it is. None when everything is read."""
        return GetChatMessageRequest(message_id=self._unread[0]) if self._unread else None

    def on_read(self, message: ChatMessage | None) -> Iterator[WatchChatSessionResponse]:
        """What to tell of a message that was read. None when it is not there."""
        message_id = self._unread.popleft()
        was_deleted = message_id in self._deleted
        if message is None:
            if not was_deleted:
                yield self._gone(message_id)
        elif not was_deleted:
            yield self._remembered(self._before.event(message_updated=message))
        elif message.sequence <= self.shared.revision:
            self._created.append(message)

    def last_events(self) -> Iterator[WatchChatSessionResponse]:
        """The messages that are there again, and the shared position."""
        self._created.sort(key=lambda message: message.sequence)
        for start in range(0, len(self._created), MAX_CREATED):
            batch = WatchChatSessionResponse.ChatMessagesCreated(
                messages=self._created[start : start + MAX_CREATED]
            )
            yield self._remembered(self._before.event(messages_created=batch))
        yield self.shared.event(heartbeat=WatchChatSessionResponse.Heartbeat())

    def _remembered(self, event: WatchChatSessionResponse) -> WatchChatSessionResponse:
        self._told.add(event)
        return event

    def _gone(self, message_id: str) -> WatchChatSessionResponse:
        deleted = WatchChatSessionResponse.ChatMessageDeleted(message_id=message_id)
        return self._before.event(message_deleted=deleted)
