"""The drafts that a watch has shown, over all of its streams. It does no I/O."""

from collections.abc import Iterable, Sequence

from chat_ticket.client._position import Position
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse


class FollowedDrafts:
    """The drafts that the caller has, and how much of each.

    Each stream begins with all open drafts, as they stand. The caller gets what is new in them, and
    the end of those that are open no more.
    """

    def __init__(self) -> None:
        # In bytes of UTF-8. Text is only ever added to a draft, so its length says what is known.
        self._lengths: dict[str, int] = {}
        # Of earlier streams, and not seen in this one.
        self._unseen: dict[str, None] = {}

    def begin_stream(self) -> None:
        self._unseen = dict.fromkeys(self._lengths)

    def ended_before(
        self, response: WatchChatSessionResponse, position: Position
    ) -> Sequence[WatchChatSessionResponse]:
        """The ends of drafts that the response implies, to be delivered before it."""
        match response.WhichOneof("event"):
            case "messages_created":
                ids = [message.id for message in response.messages_created.messages]
            case "message_deleted":
                ids = [response.message_deleted.message_id]
            case "caught_up":  # all open drafts were before it
                ids = list(self._unseen)
            case _:
                ids = []
        return self._ended(ids, position)

    def all_ended(self, position: Position) -> Sequence[WatchChatSessionResponse]:
        """The ends of all drafts: the session is gone, or its history has changed."""
        return self._ended(list(self._lengths), position)

    def accept(self, response: WatchChatSessionResponse) -> WatchChatSessionResponse | None:
        """The event to deliver. None for what the caller has already."""
        match response.WhichOneof("event"):
            case "draft":
                return self._accept_draft(response)
            case "draft_appended":
                appended = response.draft_appended
                length = appended.offset + len(appended.text.encode())
                self._lengths[appended.draft_id] = length
            case "draft_ended":
                draft_id = response.draft_ended.draft_id
                self._unseen.pop(draft_id, None)
                if self._lengths.pop(draft_id, None) is None:
                    return None
        return response

    def _accept_draft(self, response: WatchChatSessionResponse) -> WatchChatSessionResponse | None:
        draft = response.draft
        self._unseen.pop(draft.id, None)
        known = self._lengths.get(draft.id)
        self._lengths[draft.id] = draft.length
        if known is None or draft.length < known:  # less is what a failover has left of it
            return response
        if draft.length == known:
            return None
        return Position(response.revision, response.epoch).event(
            draft_appended=WatchChatSessionResponse.ChatDraftAppended(
                draft_id=draft.id, offset=known, text=draft.content.encode()[known:].decode()
            ),
        )

    def _ended(
        self, draft_ids: Iterable[str], position: Position
    ) -> Sequence[WatchChatSessionResponse]:
        events = []
        for draft_id in draft_ids:
            self._unseen.pop(draft_id, None)
            if self._lengths.pop(draft_id, None) is not None:
                ended = WatchChatSessionResponse.ChatDraftEnded(draft_id=draft_id)
                events.append(position.event(draft_ended=ended))
        return events
