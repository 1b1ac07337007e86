"""The threading runtime of ChatTicketClient. `_runtime_asyncio` has the same names."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._channel_threads import ClientChannel
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub

Token = str | Callable[[], str]
Channel = ClientChannel
Response = TypeVar("Response")
Item = TypeVar("Item")
Result = TypeVar("Result")

STUBS: Sequence[Callable[[grpc.Channel], object]] = (
    ChatAttachmentServiceStub,
    ChatDraftServiceStub,
    ChatMessageServiceStub,
    ChatSessionServiceStub,
    ChatTicketServiceStub,
)


class Closing:
    """Whether the client is closed. Its streams, retries and pauses end when it is."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def begin(self) -> None:
        self._event.set()

    @property
    def has_begun(self) -> bool:
        return self._event.is_set()

    def sleep(self, seconds: float) -> None:
        """CallCancelledError as soon as the client is closed."""
        if self._event.wait(seconds):
            raise errors.client_closed()


def map_concurrently(
    function: Callable[[Item], Result], items: Sequence[Item], at_once: int
) -> list[Result]:
    """The result of the function for each item, in order."""
    with ThreadPoolExecutor(at_once, "chat-ticket-read") as threads:
        return list(threads.map(function, items))


def close(channels: Sequence[Channel]) -> None:
    for channel in channels:
        channel.close()


def open_channel(
    target: str,
    *,
    closing: Closing,  # noqa: ARG001 - grpc.aio alone has to be told
    metadata: CallMetadata[str],
    timeout: float,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> Channel:
    """A channel whose calls carry the metadata, and raise the exceptions of chat_ticket.errors."""
    if credentials is None:
        channel = grpc.insecure_channel(target, options=options)
    else:
        channel = grpc.secure_channel(target, credentials, options=options)
    # gRPC registers a method with its core when the first stub of it is made: for a stream, that is
    # at its first call. On a channel that another thread has closed it then crashes the process.
    # Registered before, the method raises ValueError.
    for stub in STUBS:
        stub(channel)
    return ClientChannel(channel, metadata, timeout)


class ResponseReader(Generic[Response]):
    """The responses of a stream, each awaited for at most `silence_seconds`.

    A blocked read of gRPC cannot time out by itself. To cancel the call is not enough: when servers
    are killed under load, gRPC now and then does not wake the reader. So a thread of each stream
    reads, one response whenever the caller wants one.
    """

    def __init__(self, call: Any, silence_seconds: float):
        self._call = call
        self._silence_seconds = min(silence_seconds, threading.TIMEOUT_MAX)
        self._wanted = threading.Semaphore(0)
        # A response, None at the end, or the error that ends the stream.
        self._results: queue.SimpleQueue[Response | Exception | None] = queue.SimpleQueue()
        self._has_ended = False
        threading.Thread(target=self._read, name="chat-ticket-stream", daemon=True).start()

    def read(self) -> Response | None:
        """The next response, or None at the end. TimeoutError after the silence."""
        self._wanted.release()
        try:
            result = self._results.get(timeout=self._silence_seconds)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(result, Exception):
            raise result
        return result

    def cancel(self) -> None:
        """End the stream, also at the server."""
        self._has_ended = True
        self._wanted.release()
        self._call.cancel()

    def _read(self) -> None:
        """Read until the stream ends.

        A response that arrives just as the caller gives up is not lost: the watch resumes after the
        last one delivered.
        """
        while True:
            self._wanted.acquire()
            if self._has_ended:
                return
            result: Response | Exception | None
            try:
                result = next(self._call, None)
            except Exception as error:  # any error: it is the caller's
                result = error
            self._results.put(result)
