"""The asyncio runtime of AsyncChatTicketClient. `_runtime_threads` has the same names."""

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._retry import bounded

Token = str | Callable[[], str | Awaitable[str]]
Channel = grpc.aio.Channel
Response = TypeVar("Response")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Closing:
    """Whether the client is closed. Its streams, retries and pauses end when it is."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def begin(self) -> None:
        self._event.set()

    @property
    def has_begun(self) -> bool:
        return self._event.is_set()

    async def sleep(self, seconds: float) -> None:
        """CallCancelledError as soon as the client is closed."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return
        raise errors.client_closed()


async def map_concurrently(
    function: Callable[[Item], Awaitable[Result]], items: Sequence[Item], at_once: int
) -> list[Result]:
    """The result of the function for each item, in order."""
    free = asyncio.Semaphore(at_once)

    async def run(item: Item) -> Result:
        async with free:
            return await function(item)

    return await asyncio.gather(*map(run, items))


async def close(channels: Sequence[Channel]) -> None:
    await asyncio.gather(*(channel.close() for channel in channels))


def open_channel(
    target: str,
    *,
    closing: Closing,
    metadata: CallMetadata[str | Awaitable[str]],
    timeout: float,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> Channel:
    """A channel whose calls carry the metadata, and raise the exceptions of chat_ticket.errors."""
    asyncio.get_running_loop()  # gRPC would use another loop, in which no call ends
    interceptors = [
        _UnaryInterceptor(metadata, timeout, closing),
        _StreamInterceptor(metadata, closing),
        _DuplexInterceptor(metadata, closing),
    ]
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=options, interceptors=interceptors)
    return grpc.aio.secure_channel(target, credentials, options=options, interceptors=interceptors)


class ResponseReader(Generic[Response]):
    """The responses of a stream, each awaited for at most `silence_seconds`."""

    def __init__(self, call: Any, silence_seconds: float):
        self._call = call
        self._silence_seconds = silence_seconds
        self._responses: AsyncIterator[Response] = aiter(call)

    async def read(self) -> Response | None:
        """The next response, or None at the end. TimeoutError after the silence."""
        async with asyncio.timeout(self._silence_seconds):
            return await anext(self._responses, None)

    def cancel(self) -> None:
        """End the stream, also at the server."""
        self._call.cancel()


async def _with_metadata(
    details: grpc.aio.ClientCallDetails,
    metadata: CallMetadata[str | Awaitable[str]],
    timeout: float | None,
) -> grpc.aio.ClientCallDetails:
    """The details of a call, with the metadata, and the timeout that the token has left."""
    timeout = bounded(timeout if details.timeout is None else details.timeout)
    token: str | None = None
    if metadata.get_token is not None:
        start = time.monotonic()
        result = metadata.get_token()
        token = await _within(timeout, result) if inspect.isawaitable(result) else result
        if timeout is not None:
            timeout -= time.monotonic() - start
    return grpc.aio.ClientCallDetails(
        details.method,
        timeout,
        grpc.aio.Metadata(*metadata.combine(details.metadata, token)),
        details.credentials,
        details.wait_for_ready,
    )


async def _within(timeout: float | None, token: Awaitable[str]) -> str:
    """The token; DeadlineExceededError when it takes as long as the call may."""
    try:
        async with asyncio.timeout(timeout) as limit:
            return await token
    except TimeoutError:
        if not limit.expired():
            raise  # the function's own
        raise errors.DeadlineExceededError(
            grpc.StatusCode.DEADLINE_EXCEEDED, f"token: its function took over {timeout:g} s"
        ) from None


# grpc.aio looks at the first kind that an interceptor has, so each kind needs its own class.
class _UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(
        self, metadata: CallMetadata[str | Awaitable[str]], timeout: float, closing: Closing
    ):
        self._metadata = metadata
        self._timeout = timeout
        self._closing = closing

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        try:
            call = await continuation(
                await _with_metadata(details, self._metadata, self._timeout), request
            )
            await call
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        except asyncio.CancelledError:  # of the call: the caller's task is another one
            if self._closing.has_begun:
                raise errors.client_closed() from None
            raise
        return call


class _Streams:
    """What is the same for streams of responses, whether or not the requests are a stream too."""

    def __init__(self, metadata: CallMetadata[str | Awaitable[str]], closing: Closing):
        self._metadata = metadata
        self._closing = closing

    async def _start(self, continuation: Any, details: Any, request: Any) -> AsyncIterator[Any]:
        call = await continuation(await _with_metadata(details, self._metadata, None), request)
        return self._responses(call)

    async def _responses(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closing.has_begun and (task is None or not task.cancelling()):
                raise errors.client_closed() from None
            raise


class _StreamInterceptor(_Streams, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return await self._start(continuation, details, request)


class _DuplexInterceptor(_Streams, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, details: Any, requests: Any) -> Any:
        return await self._start(continuation, details, requests)
