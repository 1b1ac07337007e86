"""A grpc.aio server that accepts calls in its own loop.

grpcio's loop (AioServer._server_main_loop in 1.85.1) waits for the next call of every registered
method at once, and after each call it starts all of these waits again. With our number of methods
that is a quarter of the cost of an empty call. Here each method has acceptor tasks of its own.
gRPC's loop waits only once, until one of these tasks fails.

grpcio's loop also decodes the path of an unknown method as UTF-8. A path that is not UTF-8 ends the
loop: after one such request, from anybody who can reach the port, the server accepts no more calls
while its process lives on. gRPC's core routes the calls of registered methods itself, so only calls
of unknown methods arrive that way. They are rejected without a look at their path.

Calls with one request are answered by `calls`.
"""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

from chat_ticket_svc.rpc.calls import Calls, Handle

# The tasks of a method that wait for calls. Each accepts one call per turn of the event loop, and
# calls beyond that queue inside gRPC, where no quota sees them. With one acceptor, a burst of ten
# times as many callers as the server can serve was rejected only after a second, and the calls that
# were accepted had waited as long.
ACCEPTORS_PER_METHOD = 16


def create_server(*, request_timeout_seconds: float, **arguments: Any) -> grpc.aio.Server:
    """Create a grpc.aio.Server with the arguments of grpc.aio.server.

    It serves registered methods only, without interceptors and `maximum_concurrent_rpcs`. The
    request of a call without a deadline must arrive within `request_timeout_seconds`.
    """
    original = cygrpc.AioServer
    cygrpc.AioServer = functools.partial(_AioServer, request_timeout_seconds)
    try:
        return grpc.aio.server(**arguments)
    finally:
        cygrpc.AioServer = original


class _Method(NamedTuple):
    """`fail` gets the errors that gRPC's loop expects when the server stops."""

    name: bytes
    handle: Handle
    loop: asyncio.AbstractEventLoop
    fail: Callable[[BaseException], None]


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(self, request_timeout_seconds: float, *arguments: Any):
        super().__init__(*arguments)
        self._calls = Calls(request_timeout_seconds=request_timeout_seconds)
        self._handlers: dict[str, Any] = {}
        # The event loop holds only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()

    def add_registered_method_handlers(self, handlers: Mapping[str, Any]) -> None:
        super().add_registered_method_handlers(handlers)
        self._handlers.update(handlers)

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """Start the acceptors of a method, or of all unknown methods for None.

        gRPC's loop waits for the returned future, which fails as soon as an acceptor fails.
        """
        loop = asyncio.get_running_loop()
        # A plain future, not a task: when gRPC's loop fails, it cancels what it waits for. A
        # cancelled acceptor would free memory that gRPC's core still writes to.
        failure = loop.create_future()

        def fail(error: BaseException) -> None:
            if not failure.done():
                failure.set_exception(error)

        def propagate_error(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and (error := task.exception()):
                fail(error)

        handler: Any = None if method is None else self._handlers[method.decode()]
        for _ in range(ACCEPTORS_PER_METHOD):
            if method is None:
                self._spawn(self._reject_unknown_methods()).add_done_callback(propagate_error)
            elif handler.request_streaming:
                accepting = self._accept_request_streams(method, handler)
                self._spawn(accepting).add_done_callback(propagate_error)
            else:
                self._accept_next(_Method(method, _handle_of(handler), loop, fail))
        return failure

    def _accept_next(self, method: _Method) -> None:
        """Start a task that accepts the next call of a method, and answers it."""
        # The task gets itself: asyncio.current_task is slow before Python 3.12.
        itself: list[asyncio.Task[None]] = []
        task = method.loop.create_task(self._accept_call(method, itself))
        itself.append(task)
        self._tasks.add(task)

    async def _accept_call(self, method: _Method, itself: list[asyncio.Task[None]]) -> None:
        """Accept a call, start the task that accepts the next one, and answer the call."""
        task = itself.pop()
        try:
            call = await self._request_registered_call(method.name)
            # Before the handler sets its context variables: the next task starts with a copy.
            self._accept_next(method)
        except Exception as error:
            method.fail(error)
        else:
            await self._calls.answer(call, method.handle, method.loop, task)
        finally:
            self._tasks.discard(task)

    async def _accept_request_streams(self, method: bytes, handler: Any) -> None:
        """Never return; raise the errors that gRPC's loop expects when the server stops."""
        loop, name = asyncio.get_running_loop(), method.decode()
        while True:
            call = await self._request_registered_call(method)
            handling = _handle_request_stream(handler, call, loop)
            self._spawn(cygrpc._schedule_rpc_coro(handling, call, loop, name))
            # They would keep this call in memory until the next one arrives.
            del call, handling

    async def _reject_unknown_methods(self) -> None:
        """Never return; raise as _accept_request_streams does."""
        while True:
            self._spawn(_abort_unimplemented(await self._request_call()))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _handle_of(handler: Any) -> Handle:
    """The handler of a method with one request, for serialised messages."""
    deserialize = handler.request_deserializer or bytes
    serialize = handler.response_serializer or bytes
    behavior = handler.unary_stream if handler.response_streaming else handler.unary_unary
    if inspect.isasyncgenfunction(behavior):

        async def write_all(data: bytes, context: Any) -> None:
            async for response in behavior(deserialize(data), context):
                await context.write(serialize(response))

        return write_all
    if handler.request_deserializer is None and handler.response_serializer is None:
        handle: Handle = behavior
        return handle

    async def handle_serialized(data: bytes, context: Any) -> bytes:
        return bytes(serialize(await behavior(deserialize(data), context)))

    return handle_serialized


async def _handle_request_stream(handler: Any, call: Any, loop: asyncio.AbstractEventLoop) -> None:
    """Handle a call with a stream of requests.

    This also breaks the reference cycle of an aborted call, see CallContext.
    """
    try:
        await _HANDLE_REQUEST_STREAM[handler.response_streaming](handler, call, loop)
    except grpc.aio.AbortError as error:
        error.__traceback__ = error.__context__ = None
        raise


# By whether responses are a stream.
_HANDLE_REQUEST_STREAM = (cygrpc._handle_stream_unary_rpc, cygrpc._handle_stream_stream_rpc)


async def _abort_unimplemented(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # `abort` always raises: AbortError, or another error when the caller has left already.
    with contextlib.suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
