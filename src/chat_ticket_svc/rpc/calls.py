"""Calls with one request, from the request to the status, in fewer steps than grpc.aio takes.

grpc.aio uses two tasks and four events of gRPC's core for a unary call, and five events for a
stream of one response. One of them always waits for the end of the call, to hear when the caller
leaves. Here a call is one task and three events: the wait for its end, the last response and the
status are one batch. Only a call that is not answered within LISTEN_AFTER_SECONDS gets a second
task, which waits for its end.

What becomes of a call:

- Its caller leaves, or its connection breaks: the handler is cancelled. That may be
  LISTEN_AFTER_SECONDS later than with grpc.aio. Once the status is being sent, nothing happens.
- It is aborted: the status is sent instead of a response.
- Its request ends before its message, or does not arrive in time: it is answered INTERNAL or
  DEADLINE_EXCEEDED, and the handler is not called. grpc.aio returns without a status in the first
  case. The caller would wait for ever, and the call would hold a stream of its connection that no
  quota sees.
- The server stops: gRPC's core cancels the calls that outlast the grace period, as if their callers
  had left.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs

from chat_ticket_svc.timeouts import TimeoutQueue

LISTEN_AFTER_SECONDS = 0.01

# Takes a serialised message. Returns one, which the status follows. A stream may write others
# before, and need not return one.
Handle = Callable[[bytes, Any], Awaitable[bytes | None]]

_NO_FLAGS = 0


class CallContext(cygrpc._ServicerContext):  # type: ignore[misc]
    """The context of a call, as handlers know it from grpc.aio.

    gRPC's own `abort` sends the status in a batch of its own. It also keeps the error, whose
    traceback has the frames that hold the call. Only the garbage collector frees such a cycle.
    After a flood of rejected calls it stops every call for 0.1 s to do so.
    """

    __slots__ = (
        "_code",
        "_details",
        "_trailing_metadata",
        "call",
        "has_request",
        "has_request_timeout",
        "has_sent_metadata",
        "is_answered",
        "is_late",
        "is_listening",
        "loop",
        "task",
        "writer",
    )

    def __init__(self, call: Any, _: None, __: None, loop: asyncio.AbstractEventLoop):
        self.call = call
        self.loop = loop
        self.task: asyncio.Task[Any]  # that answers the call
        self.has_request = False
        self.has_request_timeout = False
        self.is_late = False  # the request has not arrived in time
        self.is_listening = False  # for the end of the call
        self.has_sent_metadata = False
        self.is_answered = False
        self._code: grpc.StatusCode | None = None

    async def write(self, message: bytes) -> None:
        """Send a response of a stream. Raises ExecuteBatchError if the caller has left."""
        operations = (*self._metadata(), cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self.has_sent_metadata = True
        await cygrpc.execute_batch(self.call, operations, self.loop)

    def start_write(self, message: bytes, on_sent: Callable[[], object]) -> asyncio.Future[None]:
        """Begin to send a response of a stream, without a task that waits until it is sent.

        Then it calls `on_sent`. The returned future is done, and must not be cancelled. Raises
        ExecuteBatchError if the caller has left before. If it leaves later, the response is lost.
        """
        operations = (*self._metadata(), cygrpc.SendMessageOperation(message, _NO_FLAGS))
        self.has_sent_metadata = True
        batch = cygrpc.execute_batch(self.call, operations, self.loop)
        sent: asyncio.Future[None] = batch.send(None)  # as far as to its only await

        def finish(_: object) -> None:
            try:
                batch.send(None)
            except (StopIteration, cygrpc.ExecuteBatchError):
                on_sent()

        sent.add_done_callback(finish)
        return sent

    async def abort(
        self,
        code: grpc.StatusCode,
        details: str = "",
        trailing_metadata: tuple[tuple[str, str | bytes], ...] = (),
    ) -> NoReturn:
        self._code = code
        self._details = details
        self._trailing_metadata = trailing_metadata
        raise grpc.aio.AbortError("the call was aborted")

    def code(self) -> grpc.StatusCode | None:
        """That of the abort. None without one."""
        return self._code

    def last_operations(self, response: bytes | None) -> tuple[Any, ...]:
        """Those that end the call with OK, after a last response if there is one."""
        status = cygrpc.SendStatusFromServerOperation((), 0, "", _NO_FLAGS)
        if response is None:
            return (*self._metadata(), status)
        return (*self._metadata(), cygrpc.SendMessageOperation(response, _NO_FLAGS), status)

    def error_operations(
        self,
        code: grpc.StatusCode,
        details: str,
        trailing_metadata: tuple[tuple[str, str | bytes], ...] = (),
    ) -> tuple[Any, ...]:
        """Those that end the call with an error."""
        status = cygrpc.SendStatusFromServerOperation(
            trailing_metadata, code.value[0], details, _NO_FLAGS
        )
        return (*self._metadata(), status)

    def abort_operations(self) -> tuple[Any, ...]:
        """Those that end the call as `abort` was told."""
        assert self._code is not None  # noqa: S101 - for the type checker
        return self.error_operations(self._code, self._details, self._trailing_metadata)

    def _metadata(self) -> tuple[Any, ...]:
        """The operation that comes before all others."""
        if self.has_sent_metadata:
            return ()
        return (cygrpc.SendInitialMetadataOperation(None, _NO_FLAGS),)


class Calls:
    """Answers the calls of a server that have one request."""

    def __init__(self, *, request_timeout_seconds: float):
        # Those that do not listen for their end yet.
        self._recent: set[CallContext] = set()
        self._is_scheduled = False
        # The event loop holds only weak references to its tasks.
        self._listeners: set[asyncio.Task[None]] = set()
        self._request_timeouts = TimeoutQueue[CallContext](
            request_timeout_seconds, self._on_late_request
        )

    async def answer(
        self, call: Any, handle: Handle, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]
    ) -> None:
        """Answer a call that gRPC's core has accepted, in `task`. Raises no errors."""
        context = CallContext(call, None, None, loop)
        context.task = task
        self._recent.add(context)
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_later(LISTEN_AFTER_SECONDS, self._listen)
        operations: tuple[Any, ...] = ()
        try:
            request = await self._receive(context, loop)
            if request is None:
                operations = context.error_operations(
                    grpc.StatusCode.INTERNAL, "the request ended before its message"
                )
            else:
                operations = context.last_operations(await handle(request, context))
        except grpc.aio.AbortError:
            operations = context.abort_operations()
        except asyncio.CancelledError:  # by the caller, by the drain, or as the request is late
            if context.is_late and not context.task.uncancel():
                operations = context.error_operations(
                    grpc.StatusCode.DEADLINE_EXCEEDED, "the request did not arrive in time"
                )
        except Exception as error:
            loop.call_exception_handler({"message": "error of a call", "exception": error})
            operations = context.error_operations(grpc.StatusCode.UNKNOWN, "unexpected error")
        context.is_answered = True
        if not context.is_listening:
            self._recent.discard(context)
            operations = (*operations, cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS))
        if operations:
            try:
                await cygrpc.execute_batch(call, operations, loop)
            except cygrpc.ExecuteBatchError:
                return  # the caller has left

    async def _receive(self, context: CallContext, loop: asyncio.AbstractEventLoop) -> bytes | None:
        """The message of the request. None if it ends before."""
        receive = cygrpc.ReceiveMessageOperation(_NO_FLAGS)
        try:
            await cygrpc.execute_batch(context.call, (receive,), loop)
        except cygrpc.ExecuteBatchError:
            return None  # the caller has left
        finally:
            context.has_request = True
            if context.has_request_timeout:
                self._request_timeouts.stop(context)
        request: bytes | None = receive.message()
        return request

    def _listen(self) -> None:
        """Listen for the end of the calls that are not as quick as most."""
        self._is_scheduled = False
        loop = asyncio.get_running_loop()
        for context in self._recent:
            context.is_listening = True
            listener = loop.create_task(_cancel_when_ended(context, loop))
            self._listeners.add(listener)
            listener.add_done_callback(self._listeners.discard)
            # gRPC's core itself ends a call at the caller's deadline.
            if not context.has_request and context.time_remaining() is None:
                context.has_request_timeout = True
                self._request_timeouts.start(context)
        self._recent.clear()

    def _on_late_request(self, context: CallContext) -> None:
        context.is_late = True
        context.task.cancel()


async def _cancel_when_ended(context: CallContext, loop: asyncio.AbstractEventLoop) -> None:
    close = cygrpc.ReceiveCloseOnServerOperation(_NO_FLAGS)
    await cygrpc.execute_batch(context.call, (close,), loop)
    if close.cancelled() and not context.is_answered:
        context.task.cancel()
