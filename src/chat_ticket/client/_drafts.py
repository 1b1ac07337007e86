"""Writing a draft with the asyncio client: one writer, however many streams it takes."""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client._draft_progress import DraftProgress
from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest, WriteChatDraftResponse
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_STATE_COMPLETE,
    CHAT_MESSAGE_STATE_INCOMPLETE,
    ChatAttachment,
    ChatMessage,
)

Item = TypeVar("Item")

# Text goes out at once after a pause. What follows within this time goes out together.
COALESCE_SECONDS = 0.05
# How much may be on its way before `append` waits.
MAX_UNACKNOWLEDGED_BYTES = 64 * 1024
# A third of the time after which the server counts a silent writer as lost, by default.
KEEP_ALIVE_SECONDS = 20.0
# How long leaving the block by an exception waits for the end of the draft.
LEAVE_SECONDS = 5.0

# A stream that ends with one of these has refused a request, and has left the draft to its writer.
REFUSALS = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


class ChatDraftWriter:
    """A draft that AsyncChatTicketClient.write writes, for the duration of its block.

    Leaving the block finishes the draft, unless `finish` has. Leaving it by an exception, or by the
    cancellation of its task, finishes it as INCOMPLETE with what was appended, and the exception
    goes on. That takes up to 5 seconds; after them, the server does it when it misses the writer.
    A draft that is empty at its end is dropped.

    The writer shows the server that it is alive, so a model may be silent for as long as it likes.
    Use a writer in one task at a time.
    """

    id: str
    """The id of the draft, and of its message."""

    def __init__(
        self,
        start: WriteChatDraftRequest.Start,
        call: Callable[[AsyncGenerator[WriteChatDraftRequest, None]], Any],
        resumed: Callable[..., AsyncGenerator[WriteChatDraftResponse, None]],
    ):
        self.id = start.draft.id
        self._start = start
        self._call = call
        self._resumed = resumed
        self._progress = DraftProgress(on_change=self._notify)
        self._changed = asyncio.Event()
        self._failure: Exception | None = None
        self._writing: asyncio.Task[None] | None = None
        # What waits for the caller's model, to be interrupted.
        self._interruptible: set[asyncio.Timeout] = set()

    @property
    def length(self) -> int:
        """The length of the draft in bytes of UTF-8, with what is on its way.

        At the beginning of the block it is 0, or the length of a draft that was taken over.
        """
        return self._progress.length

    @property
    def stopped(self) -> bool:
        """Whether somebody else has ended the draft. `append` and `finish` then do nothing."""
        return self._progress.ended_by_others

    @property
    def message(self) -> ChatMessage | None:
        """The message, when the draft has ended. None before, and if the draft was empty."""
        return self._progress.message

    async def append(self, text: str) -> None:
        """Add text to the draft.

        It returns before the text is durable, and waits only while more than 64 KiB are not. Text
        after a pause is sent at once. What follows within 50 ms is sent together.

        Raises what has ended the writing, which may be about earlier text.
        """
        self._raise_failure()
        if self.stopped:
            return
        if self._progress.finish is not None:
            raise RuntimeError("the draft is finished")
        self._progress.append(text)
        self._notify()
        await self._until(
            lambda: self._progress.unacknowledged <= MAX_UNACKNOWLEDGED_BYTES or self._is_over
        )
        self._raise_failure()

    async def finish(
        self,
        *,
        metadata: Mapping[str, Any] | None = None,
        attachments: Sequence[ChatAttachment] = (),
    ) -> ChatMessage | None:
        """Finish the draft, and return its message.

        Returns when the message is stored. Give attachments ids, so that a repeat stores no second
        one. `metadata` replaces that of the draft.

        If attachments are refused, the draft is still open: call it again without them.
        """
        request = WriteChatDraftRequest.Finish(
            state=CHAT_MESSAGE_STATE_COMPLETE,
            metadata_json=metadata_json(metadata),
            attachments=attachments,
        )
        if self._is_refused and self._progress.finish is not None:
            self._begin()
        self._raise_failure()
        if not self._is_over:
            self._progress.finish = request
            self._notify()
            await self._until(lambda: self._is_over)
            self._raise_failure()
        return self.message

    async def until_stopped(self, items: AsyncIterable[Item]) -> AsyncGenerator[Item, None]:
        """The items of a model, until somebody else ends the draft.

        Then the model is interrupted, whatever it waits for, and closed: an answer that nobody
        wants costs nothing more.

        Raises what has ended the writing.
        """
        iterator = aiter(items)
        try:
            while not self._is_over:
                try:
                    async with asyncio.timeout(None) as waiting:
                        self._interruptible.add(waiting)
                        item = await anext(iterator)
                except StopAsyncIteration:
                    break
                except TimeoutError:
                    if not waiting.expired():
                        raise  # the model's own
                    break
                finally:
                    self._interruptible.discard(waiting)
                yield item
            self._raise_failure()
        finally:
            if close := getattr(iterator, "aclose", None):
                await close()

    async def __aenter__(self) -> Self:
        self._begin()
        try:
            await self._until(lambda: self._progress.is_open or self._is_over)
            self._raise_failure()
        except BaseException:
            await self._end_writing()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                await self.finish()
        finally:
            await self._leave()

    async def _leave(self) -> None:
        """Finish what is left open as INCOMPLETE, for a bounded time."""
        if self._is_refused:
            self._progress.drop_unacknowledged()
            self._progress.finish = None
            self._begin()
        if self._progress.finish is None:
            self._progress.finish = WriteChatDraftRequest.Finish(
                state=CHAT_MESSAGE_STATE_INCOMPLETE
            )
            self._notify()
        try:
            await self._until(lambda: self._is_over, LEAVE_SECONDS)
        finally:
            await self._end_writing()

    def _begin(self) -> None:
        self._failure = None
        self._writing = asyncio.create_task(self._write())

    async def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def _write(self) -> None:
        responses = self._resumed(self._open_stream, self._progress, f"draft {self.id}")
        try:
            async with contextlib.aclosing(responses):
                async for _ in responses:
                    pass
        except asyncio.CancelledError:
            self._failure = errors.client_closed()
            raise
        except Exception as error:
            self._failure = error
        finally:
            self._notify()

    def _open_stream(self) -> Any:
        return self._call(self._requests(self._progress.begin_stream()))

    async def _requests(self, stream: int) -> AsyncGenerator[WriteChatDraftRequest, None]:
        """What one stream sends."""
        progress = self._progress

        def is_over() -> bool:
            return progress.stream != stream or self._is_over

        yield WriteChatDraftRequest(start=self._start)
        await self._until(lambda: progress.has_started or is_over())
        while not is_over():
            has_news = await self._until(
                lambda: progress.has_unsent or progress.finish is not None or is_over(),
                KEEP_ALIVE_SECONDS,
            )
            if is_over():
                return
            if progress.has_unsent or not has_news:
                yield WriteChatDraftRequest(append=progress.next_append())
                await self._until(
                    lambda: progress.finish is not None or is_over(), COALESCE_SECONDS
                )
            elif progress.finish is not None:
                yield WriteChatDraftRequest(finish=progress.finish)
                return

    @property
    def _is_over(self) -> bool:
        return self._progress.has_ended or self._failure is not None

    @property
    def _is_refused(self) -> bool:
        return isinstance(self._failure, ChatTicketError) and self._failure.code in REFUSALS

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _notify(self) -> None:
        """Wake everything that waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()
        if self._is_over:
            now = asyncio.get_running_loop().time()
            while self._interruptible:
                self._interruptible.pop().reschedule(now)

    async def _until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for a condition; False after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True


def metadata_json(metadata: Mapping[str, Any] | None) -> str:
    """As a request has it; ValueError for what JSON has not, such as NaN."""
    return "" if metadata is None else json.dumps(metadata, allow_nan=False)
