"""The asyncio runtime of AsyncChatTicketClient. `_runtime_threads` has the same names."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._channel_asyncio import ClientChannel

Token = str | Callable[[], str | Awaitable[str]]
Channel = ClientChannel
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
    if credentials is None:
        channel = grpc.aio.insecure_channel(target, options=options)
    else:
        channel = grpc.aio.secure_channel(target, credentials, options=options)
    return ClientChannel(channel, metadata, timeout, closing)


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
