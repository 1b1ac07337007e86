"""What the server has of a draft, over all of the streams that write it. It does no I/O."""

from collections.abc import Callable, Sequence

import grpc

from chat_ticket.errors import AbortedError
from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest, WriteChatDraftResponse
from chat_ticket.v1.resources_pb2 import ChatMessage


class DraftProgress:
    """The Resumable of WriteChatDraft. It keeps the text that is not acknowledged.

    Positions in the text are in bytes of UTF-8.
    """

    def __init__(self, on_change: Callable[[], None]):
        self._on_change = on_change
        self.stream = 0
        """The number of the present stream."""
        self.is_open = False
        """Whether any stream has started."""
        self.has_started = False
        """Whether the present stream has started, and takes text."""
        self.has_ended = False
        """Whether the draft is finished, stopped or dropped."""
        self.ended_by_others = False
        self.message: ChatMessage | None = None
        self.finish: WriteChatDraftRequest.Finish | None = None
        """How the draft is to be finished, once all text is sent."""
        self._acknowledged = 0
        self._sent = 0
        self._text = bytearray()  # from `_acknowledged` on

    @property
    def length(self) -> int:
        return self._acknowledged + len(self._text)

    @property
    def unacknowledged(self) -> int:
        return len(self._text)

    @property
    def has_unsent(self) -> bool:
        return self._sent < self.length

    def append(self, text: str) -> None:
        self._text += text.encode()

    def drop_unacknowledged(self) -> None:
        self._text.clear()

    def next_append(self) -> WriteChatDraftRequest.Append:
        """What is not sent yet. Empty when there is nothing."""
        offset, self._sent = self._sent, self.length
        text = self._text[offset - self._acknowledged :].decode()
        return WriteChatDraftRequest.Append(offset=offset, text=text)

    def begin_stream(self) -> int:
        """Returns its number."""
        self.stream += 1
        self.has_started = False
        return self.stream

    @property
    def position(self) -> str:
        return f"length {self._acknowledged}"

    def items(self, response: WriteChatDraftResponse) -> Sequence[WriteChatDraftResponse]:
        kind = response.WhichOneof("response")
        match kind:
            case "started":
                self._start(response.started.length)
            case "written":
                self._acknowledge(response.written.length)
            case "finished":
                self._end(response.finished, by_others=not self._is_mine(response.finished))
            case "stopped":
                self._end(response.stopped, by_others=True)
        self._on_change()
        # A stream that starts and breaks, again and again, makes no progress.
        return [] if kind == "started" else [response]

    def on_stream_end(self) -> None:
        pass  # it ends by itself only after `finished` or `stopped`, or when a proxy ends it

    def on_not_found(self) -> Sequence[WriteChatDraftResponse]:
        return []

    def _start(self, length: int) -> None:
        if not self.is_open:
            self.is_open = True
            self._acknowledged = length
        if length > self.length:
            raise AbortedError(grpc.StatusCode.ABORTED, "another writer has added to the draft")
        self._acknowledge(length)
        self._sent = self._acknowledged
        self.has_started = True

    def _acknowledge(self, length: int) -> None:
        """Forget the text before a position.

        If it is before what was acknowledged already, the database has lost text. That cannot be
        sent again: the server answers DRAFT_GAP to what follows.
        """
        if length > self._acknowledged:
            del self._text[: length - self._acknowledged]
            self._acknowledged = length

    def _is_mine(self, finished: WriteChatDraftResponse.Finished) -> bool:
        """Whether this writer has finished the draft, by this stream or an earlier one.

        Its `finish` can be unknown to have succeeded. If the draft is a message with another state,
        somebody else was faster.
        """
        if self.finish is None:
            return False
        return not finished.HasField("message") or finished.message.state == self.finish.state

    def _end(
        self,
        end: WriteChatDraftResponse.Finished | WriteChatDraftResponse.Stopped,
        *,
        by_others: bool,
    ) -> None:
        self.has_ended = True
        self.ended_by_others = by_others
        self.message = end.message if end.HasField("message") else None
