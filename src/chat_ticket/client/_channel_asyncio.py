"""gRPC's channel for asyncio, whose calls carry metadata and raise chat_ticket.errors.

It takes the place of interceptors of grpc.aio, which cost each call a task and a dozen objects: 6 %
of the client's CPU with one caller. It costs 1.5 µs more than a bare stub, 3 with a function for
the token. A call of it is a call of gRPC: it ends as gRPC ends it when the connection breaks, when
the server refuses it, and when the task of its caller is cancelled. Only a token that has to be
awaited is awaited in a task, which ends with the call.
"""

import asyncio
import functools
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from chat_ticket import errors
from chat_ticket.client._channel import CallMetadata
from chat_ticket.client._retry import bounded

if TYPE_CHECKING:
    from chat_ticket.client._runtime_asyncio import Closing


class ClientChannel:
    """What the stubs take for their channel. They make each of its methods once."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        metadata: CallMetadata[str | Awaitable[str]],
        timeout: float,
        closing: "Closing",
    ):
        self._channel: Any = channel
        self._metadata = metadata
        self._timeout = timeout
        self._closing = closing
        self._beginning: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._beginning:
            task.cancel()
        await self._channel.close()

    def unary_unary(self, *arguments: Any, **keywords: Any) -> "_Method":
        method = self._channel.unary_unary(*arguments, **keywords)
        return _Method(self._call, method, _UnaryCall, self._timeout)

    def unary_stream(self, *arguments: Any, **keywords: Any) -> "_Method":
        method = self._channel.unary_stream(*arguments, **keywords)
        return _Method(self._call, method, _StreamCall, None)

    def stream_stream(self, *arguments: Any, **keywords: Any) -> "_Method":
        method = self._channel.stream_stream(*arguments, **keywords)
        return _DuplexMethod(self._call, method, _DuplexCall, None)

    def _call(
        self,
        call_class: "type[_Call]",
        begin: Callable[..., Any],
        timeout: float | None,
        metadata: Iterable[tuple[str, str | bytes]] | None,
    ) -> "_Call":
        """What a caller gets. It has begun, unless it awaits its token."""
        timeout = bounded(timeout)
        call = call_class(self._closing)
        if self._metadata.get_token is None:
            call.begin(begin(timeout=timeout, metadata=self._metadata.combine(metadata, None)))
            return call
        start = time.monotonic()

        def begin_with(token: str) -> Any:
            left = None if timeout is None else timeout - (time.monotonic() - start)
            return begin(timeout=left, metadata=self._metadata.combine(metadata, token))

        async def begin_later(token: Awaitable[str]) -> Any:
            return begin_with(await _within(timeout, token))

        try:
            token = self._metadata.get_token()
            if inspect.isawaitable(token):
                task = call.begin_by(begin_later(token))
                self._beginning.add(task)
                task.add_done_callback(self._beginning.discard)
            else:
                call.begin(begin_with(token))
        except Exception as error:  # who awaits the call gets it
            call.fail(error)
        return call


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


class _Method:
    """A method of a service, with the arguments of gRPC's."""

    def __init__(
        self,
        call: Callable[..., Any],
        method: Callable[..., Any],
        call_class: "type[_Call]",
        timeout: float | None,
    ):
        self._call = call
        self._method = method
        self._call_class = call_class
        self._timeout = timeout

    def __call__(
        self,
        request: Any,
        timeout: float | None = None,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        credentials: grpc.CallCredentials | None = None,
        wait_for_ready: bool | None = None,
        compression: grpc.Compression | None = None,
    ) -> Any:
        begin = functools.partial(
            self._method,
            request,
            credentials=credentials,
            wait_for_ready=wait_for_ready,
            compression=compression,
        )
        timeout = self._timeout if timeout is None else timeout
        return self._call(self._call_class, begin, timeout, metadata)


class _DuplexMethod(_Method):
    def __call__(  # type: ignore[override]  # gRPC's name of the first argument
        self, request_iterator: Any = None, *arguments: Any, **keywords: Any
    ) -> Any:
        return super().__call__(request_iterator, *arguments, **keywords)


class _Call(grpc.aio.Call):
    """gRPC's call, with the exceptions of chat_ticket.errors."""

    _call: Any = None
    _beginning: asyncio.Future[None]

    def __init__(self, closing: "Closing"):
        self._closing = closing

    def begin(self, call: Any) -> None:
        self._call = call

    def begin_by(self, call: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
        async def begin() -> None:
            self._call = await call

        self._beginning = task = asyncio.create_task(begin())
        return task

    def fail(self, error: Exception) -> None:
        self._beginning = asyncio.get_running_loop().create_future()
        self._beginning.set_exception(error)

    def cancel(self) -> bool:
        return (self._beginning if self._call is None else self._call).cancel()

    def cancelled(self) -> bool:
        return (self._beginning if self._call is None else self._call).cancelled()

    def done(self) -> bool:
        return (self._beginning if self._call is None else self._call).done()

    def add_done_callback(self, callback: Callable[[Any], Any]) -> None:
        def on_beginning(_: object) -> None:
            if self._call is None:
                callback(self)
            else:
                self._call.add_done_callback(lambda _: callback(self))

        if self._call is None:
            self._beginning.add_done_callback(on_beginning)
        else:
            on_beginning(None)

    def time_remaining(self) -> float | None:
        return None if self._call is None else self._call.time_remaining()

    async def initial_metadata(self) -> Any:
        return await (await self._begun()).initial_metadata()

    async def trailing_metadata(self) -> Any:
        return await (await self._begun()).trailing_metadata()

    async def code(self) -> Any:
        return await (await self._begun()).code()

    async def details(self) -> Any:
        return await (await self._begun()).details()

    async def debug_error_string(self) -> Any:
        return await (await self._begun()).debug_error_string()

    async def wait_for_connection(self) -> None:
        await self._typed(lambda call: call.wait_for_connection())

    async def _begun(self) -> Any:
        """gRPC's call, also when who asks for it is not who waits for its end."""
        if self._call is None:
            await asyncio.wait([self._beginning])
            if self._beginning.cancelled():
                raise errors.CallCancelledError(
                    grpc.StatusCode.CANCELLED, "cancelled before it had its token"
                )
            self._beginning.result()
        return self._call

    async def _typed(self, use: Callable[[Any], Awaitable[Any]]) -> Any:
        """What a use of gRPC's call returns, or the typed exception that it raises."""
        try:
            if self._call is None:
                await self._beginning
            return await use(self._call)
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from error
        except asyncio.CancelledError:
            if self._is_ended_by_closing():
                raise errors.client_closed() from None
            raise

    def _is_ended_by_closing(self) -> bool:
        """Whether a cancellation is that of the client, and not of the task that waits."""
        task = asyncio.current_task()
        return self._closing.has_begun and (task is None or not task.cancelling())


class _UnaryCall(_Call, grpc.aio.UnaryUnaryCall[Any, Any]):
    def __await__(self) -> Generator[Any, None, Any]:
        return self._typed(lambda call: call).__await__()


class _StreamCall(_Call, grpc.aio.UnaryStreamCall[Any, Any]):
    """It iterates by itself: with a generator it would be part of a cycle, as gRPC's own is."""

    def __del__(self) -> None:
        # The stream would stay open until the cycle of gRPC's own is collected.
        if self._call is not None:
            self._call.cancel()

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        response = await self.read()
        if response is grpc.aio.EOF:
            raise StopAsyncIteration
        return response

    async def read(self) -> Any:
        return await self._typed(_read)


def _read(call: Any) -> Awaitable[Any]:
    response: Awaitable[Any] = call.read()
    return response


class _DuplexCall(_StreamCall, grpc.aio.StreamStreamCall[Any, Any]):
    async def write(self, request: Any) -> None:
        await self._typed(lambda call: call.write(request))

    async def done_writing(self) -> None:
        await self._typed(lambda call: call.done_writing())
