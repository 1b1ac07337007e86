"""The asyncio runtime of AsyncChatTicketClient. `_runtime_threads` has the same names."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata

Token = str | Callable[[], str | Awaitable[str]]
Channel = grpc.aio.Channel
Response = TypeVar("Response")

sleep = asyncio.sleep


def open_channel(
    target: str,
    *,
    metadata: CallMetadata[str | Awaitable[str]],
    timeout: float,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[tuple[str, Any]],
) -> Channel:
    """A channel whose calls carry the metadata, and raise the exceptions of chat_ticket.errors."""
    asyncio.get_running_loop()  # gRPC would use another loop, in which no call ends
    interceptors = [_UnaryInterceptor(metadata, timeout), _StreamInterceptor(metadata)]
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
    """The details of a call, with the metadata and the default timeout."""
    token: str | None = None
    if metadata.get_token is not None:
        result = metadata.get_token()
        token = await result if inspect.isawaitable(result) else result
    return grpc.aio.ClientCallDetails(
        details.method,
        timeout if details.timeout is None else details.timeout,
        grpc.aio.Metadata(*metadata.combine(details.metadata, token)),
        details.credentials,
        details.wait_for_ready,
    )


# grpc.aio looks at the first kind that an interceptor has, so each kind needs its own class.
class _UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, metadata: CallMetadata[str | Awaitable[str]], timeout: float):
        self._metadata = metadata
        self._timeout = timeout

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        call = await continuation(
            await _with_metadata(details, self._metadata, self._timeout), request
        )
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        return call


class _StreamInterceptor(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, metadata: CallMetadata[str | Awaitable[str]]):
        self._metadata = metadata

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        call = await continuation(await _with_metadata(details, self._metadata, None), request)
        return self._responses(call)

    async def _responses(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
