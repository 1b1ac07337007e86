"""The threading runtime of ChatTicketClient. `_runtime_asyncio` has the same names."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._retry import bounded
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub

Token = str | Callable[[], str]
Channel = grpc.Channel
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
    # gRPC registers a method with its core when the first stub of it is made: below an interceptor
    # that is at the first call. On a channel that another thread has closed it then crashes the
    # process. Registered before, the method raises ValueError.
    for stub in STUBS:
        stub(channel)
    return grpc.intercept_channel(channel, _Interceptor(metadata, timeout))


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


class _CallDetails(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]]
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Details(_CallDetails, grpc.ClientCallDetails):  # type: ignore[misc]
    """As gRPC documents it for interceptors: a tuple that is also ClientCallDetails."""


class _Interceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    def __init__(self, metadata: CallMetadata[str], timeout: float):
        self._metadata = metadata
        self._timeout = timeout

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return _Call(continuation(self._with_metadata(details, self._timeout), request))

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return _Call(continuation(self._with_metadata(details, None), request))

    def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return _Call(continuation(self._with_metadata(details, None), requests))

    def _with_metadata(self, details: Any, timeout: float | None) -> _Details:
        timeout = bounded(timeout if details.timeout is None else details.timeout)
        get_token = self._metadata.get_token
        token: str | None = None
        if get_token is not None:
            start = time.monotonic()
            token = get_token()
            if timeout is not None:
                timeout -= time.monotonic() - start
        return _Details(
            details.method,
            timeout,
            self._metadata.combine(details.metadata, token),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


class _Call:
    """gRPC's call, future or stream of responses, but with the exceptions of chat_ticket.errors."""

    def __init__(self, call: Any):
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._typed(self._call.__next__)

    def result(self, timeout: float | None = None) -> Any:
        return self._typed(self._call.result, timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error: BaseException | None = self._call.exception(timeout)
        return errors.from_rpc_error(error) if isinstance(error, grpc.RpcError) else error

    @staticmethod
    def _typed(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except grpc.RpcError as error:
            raise errors.from_rpc_error(error) from error
