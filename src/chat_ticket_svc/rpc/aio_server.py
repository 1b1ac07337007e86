"""A grpc.aio server that accepts calls in its own loop.

grpcio's loop (AioServer._server_main_loop in 1.85.1) waits for the next call of every registered
method at once, and after each call it starts all of these waits again. With our number of methods
that is a quarter of the cost of an empty call. Here each method has acceptor tasks of its own.
gRPC's loop waits only once, until one of these tasks fails.

grpcio's loop also decodes the path of an unknown method as UTF-8. A path that is not UTF-8 ends the
loop: after one such request, from anybody who can reach the port, the server accepts no more calls
while its process lives on. gRPC's core routes the calls of registered methods itself, so only calls
of unknown methods arrive that way. They are rejected without a look at their path.

Unary calls are answered by `unary_calls`. For streams of responses, the request is read before the
handler is called: as there, a request that ends before its message is answered INTERNAL, and one
that does not arrive in time DEADLINE_EXCEEDED.
"""

import asyncio
import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

from chat_ticket_svc.rpc.unary_calls import Handle, UnaryCalls
from chat_ticket_svc.timeouts import Timeout

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


class _UnaryMethod(NamedTuple):
    """`fail` gets the errors that gRPC's loop expects when the server stops."""

    name: bytes
    handle: Handle
    loop: asyncio.AbstractEventLoop
    fail: Callable[[BaseException], None]


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    def __init__(self, request_timeout_seconds: float, *arguments: Any):
        super().__init__(*arguments)
        self._request_timeout_seconds = request_timeout_seconds
        self._unary_calls = UnaryCalls(request_timeout_seconds=request_timeout_seconds)
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

        handler = None if method is None else self._handlers[method.decode()]
        for _ in range(ACCEPTORS_PER_METHOD):
            if method is None:
                self._spawn(self._reject_unknown_methods()).add_done_callback(propagate_error)
            elif _is_unary(handler):
                self._accept_next(_UnaryMethod(method, _handle_of(handler), loop, fail))
            else:
                accepting = self._accept_calls(method, handler)
                self._spawn(accepting).add_done_callback(propagate_error)
        return failure

    def _accept_next(self, method: _UnaryMethod) -> None:
        """Start a task that accepts the next call of a method, and answers it."""
        # The task gets itself: asyncio.current_task is slow before Python 3.12.
        itself: list[asyncio.Task[None]] = []
        task = method.loop.create_task(self._accept_unary_call(method, itself))
        itself.append(task)
        self._tasks.add(task)

    async def _accept_unary_call(
        self, method: _UnaryMethod, itself: list[asyncio.Task[None]]
    ) -> None:
        """Accept a call, start the task that accepts the next one, and answer the call."""
        task = itself.pop()
        try:
            call = await self._request_registered_call(method.name)
            # Before the handler sets its context variables: the next task starts with a copy.
            self._accept_next(method)
        except Exception as error:
            method.fail(error)
        else:
            await self._unary_calls.answer(call, method.handle, method.loop, task)
        finally:
            self._tasks.discard(task)

    async def _accept_calls(self, method: bytes, handler: Any) -> None:
        """Never return; raise the errors that gRPC's loop expects when the server stops."""
        loop, name = asyncio.get_running_loop(), method.decode()
        while True:
            call = await self._request_registered_call(method)
            handling = self._handle(handler, call, loop)
            self._spawn(cygrpc._schedule_rpc_coro(handling, call, loop, name))
            # They would keep this call in memory until the next one arrives.
            del call, handling

    async def _handle(self, handler: Any, call: Any, loop: asyncio.AbstractEventLoop) -> None:
        """Read the request and run the handler of a call that is no unary one.

        This also breaks the reference cycle of an aborted call, see UnaryContext.
        """
        try:
            if handler.request_streaming:
                await _HANDLE_REQUEST_STREAM[handler.response_streaming](handler, call, loop)
                return
            context = cygrpc._ServicerContext(
                call, handler.request_deserializer, handler.response_serializer, loop
            )
            request = await self._read_request(context)
            await cygrpc._finish_handler_with_stream_responses(
                call, handler.unary_stream, request, context, loop
            )
        except grpc.aio.AbortError as error:
            error.__traceback__ = error.__context__ = None
            raise

    async def _read_request(self, context: Any) -> Any:
        """Return the only message of a request, or abort the call."""
        try:
            # gRPC's core itself ends a call at the caller's deadline.
            with (
                Timeout(self._request_timeout_seconds)
                if context.time_remaining() is None
                else contextlib.nullcontext()
            ):
                request = await context.read()
        except TimeoutError:
            await _abort(
                context, grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time"
            )
        if request is grpc.aio.EOF:
            await _abort(context, grpc.StatusCode.INTERNAL, "the request ended before its message")
        return request

    async def _reject_unknown_methods(self) -> None:
        """Never return; raise as _accept_calls does."""
        while True:
            self._spawn(_abort_unimplemented(await self._request_call()))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _is_unary(handler: Any) -> bool:
    return not handler.request_streaming and not handler.response_streaming


def _handle_of(handler: Any) -> Handle:
    """The handler of a unary method, for serialised messages."""
    handle: Handle = handler.unary_unary
    deserialize, serialize = handler.request_deserializer, handler.response_serializer
    if deserialize is None and serialize is None:
        return handle

    async def handle_serialized(data: bytes, context: Any) -> bytes:
        response: bytes = serialize(await handle(deserialize(data), context))
        return response

    return handle_serialized


# By whether responses are a stream.
_HANDLE_REQUEST_STREAM = (cygrpc._handle_stream_unary_rpc, cygrpc._handle_stream_stream_rpc)


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], code: grpc.StatusCode, details: str
) -> NoReturn:
    try:
        await context.abort(code, details)
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:  # the caller has left before the status
        raise asyncio.CancelledError from error


async def _abort_unimplemented(call: Any) -> None:
    context = cygrpc._ServicerContext(call, None, None, asyncio.get_running_loop())
    # `abort` always raises: AbortError, or another error when the caller has left already.
    with contextlib.suppress(grpc.aio.BaseError):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
