"""The drafts that a stream has shown, and what it is to show next.

The stream is at a revision of its session, and so is the feed of the drafts. A feed at a lower one
is not used: a draft in it may have become a message that the stream has sent. If the feed is at the
same or a higher one, the messages of all drafts in it are still to come.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from chat_ticket_svc.services import convert
from chat_ticket_svc.services.session_page import SerializedPage, draft_ended, serialize
from chat_ticket_svc.watch.draft_feed import DraftFeed, FollowedDraft

# The event that has a whole draft, among FollowedDraft.events.
WHOLE = -1
# Larger events are built for each stream: they would double the memory of a draft.
MAX_SHARED_EVENT_BYTES = 16 * 1024
# Of a draft at its present length. Streams that are slow have fallen behind by different lengths.
MAX_SHARED_EVENTS = 16


class _ShownDraft(NamedTuple):
    draft: FollowedDraft
    length: int


class ShownDrafts:
    """The open drafts of one stream, as far as it has sent them."""

    def __init__(self, feed: DraftFeed):
        self._feed = feed
        self._shown: dict[str, _ShownDraft] = {}
        # The revision of the feed when it had one of them no more. If the draft has become a
        # message, it did so up to this revision.
        self._missing_since: dict[str, int] = {}
        self.seen_version = -1

    def news(self, revision: int, epoch: str) -> Iterator[bytes]:
        """What has changed since the last call, for a stream at this position."""
        feed = self._feed
        self.seen_version = feed.version
        if feed.revision is None:  # the page with the end of the session is to come
            return
        if feed.revision < revision:
            feed.refresh()
            return
        for draft_id in [draft_id for draft_id in self._shown if draft_id not in feed.drafts]:
            if self._missing_since.setdefault(draft_id, feed.revision) <= revision:
                self.forget([draft_id])
                yield draft_ended(revision, epoch, draft_id)
        for draft_id, draft in list(feed.drafts.items()):
            self._missing_since.pop(draft_id, None)
            shown = self._shown.get(draft_id)
            length = shown.length if shown is not None and shown.draft is draft else WHOLE
            if length < draft.length:
                self._shown[draft_id] = _ShownDraft(draft, draft.length)
                # The fields of a message can be joined, and only the position differs.
                yield serialize(revision, epoch) + _serialized(draft, draft_id, length)

    def ended_by(self, page: SerializedPage | None) -> frozenset[str]:
        """The drafts whose messages are in a page."""
        if page is None or page.position is None or not self._shown:
            return frozenset()
        return page.message_ids.intersection(self._shown)

    def end_all(self, revision: int, epoch: str) -> Iterator[bytes]:
        return (draft_ended(revision, epoch, draft_id) for draft_id in self._shown)

    def forget(self, draft_ids: Iterable[str]) -> None:
        for draft_id in draft_ids:
            del self._shown[draft_id]
            self._missing_since.pop(draft_id, None)


def _serialized(draft: FollowedDraft, draft_id: str, length: int) -> bytes:
    """The event for a stream that has shown a draft up to a length, without its position."""
    serialized = draft.events.get(length)
    if serialized is None:
        if length == WHOLE:
            event = Event(draft=convert.draft(draft.row))
        else:
            text = draft.text_after(length)
            event = Event(
                draft_appended=Event.ChatDraftAppended(draft_id=draft_id, offset=length, text=text)
            )
        serialized = event.SerializeToString()
        if len(serialized) <= MAX_SHARED_EVENT_BYTES and len(draft.events) < MAX_SHARED_EVENTS:
            draft.events[length] = serialized
    return serialized
