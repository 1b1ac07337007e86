"""The threading runtime of ChatTicketClient. `_runtime_asyncio` has the same names."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
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

    A blocked read cannot time out by itself. A thread watches the time, one for each stream, and
    cancels the call.
    """

    def __init__(self, call: Any, silence_seconds: float):
        self._call = call
        self._silence_seconds = min(silence_seconds, threading.TIMEOUT_MAX)
        self._responses: Iterator[Response] = iter(call)
        self._waiting_since: float | None = None
        self._is_silent = False
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="chat-ticket-silence", daemon=True).start()

    def read(self) -> Response | None:
        """The next response, or None at the end. TimeoutError after the silence."""
        self._waiting_since = time.monotonic()
        try:
            return next(self._responses, None)
        except errors.CallCancelledError:
            if self._is_silent:
                raise TimeoutError from None
            raise
        finally:
            self._waiting_since = None

    def cancel(self) -> None:
        """End the stream, also at the server."""
        self._ended.set()
        self._call.cancel()

    def _watch(self) -> None:
        """Cancel the call after the silence; return when the stream ends.

        It sleeps until the present wait would be over, and looks again. So it needs no lock and
        no signal for each response. A response that arrives just as the call is cancelled is not
        lost: the watch resumes after the last one delivered.
        """
        pause = self._silence_seconds
        while not self._ended.wait(pause):
            since = self._waiting_since
            pause = self._silence_seconds
            if since is not None:
                pause += since - time.monotonic()
                if pause <= 0:
                    self._is_silent = True
                    self._call.cancel()
                    return


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
