"""The middleware around every method: admission, deadlines, statuses, the drain.

It also enforces the write timeout of slow readers: a stream that its client does not read ends with
the reason SLOW_READER.

Services raise domain errors. Only this middleware aborts calls.
"""

import asyncio
import contextlib
import functools
import math
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from chat_ticket_svc import errors
from chat_ticket_svc.access.admission import AdmissionController
from chat_ticket_svc.access.method_permissions import READ_METHODS, UNAUTHENTICATED_METHODS
from chat_ticket_svc.rpc.calls import CallContext
from chat_ticket_svc.rpc.instrumentation import (
    CallRecord,
    Context,
    MethodInstrumentation,
    status_code_of,
)
from chat_ticket_svc.rpc.response_writer import ResponseWriter
from chat_ticket_svc.rpc.status import abort_with_domain_error, abort_with_internal_error
from chat_ticket_svc.services.paging import LastResponse
from chat_ticket_svc.services.validate import is_uuid
from chat_ticket_svc.tasks import current_task
from chat_ticket_svc.timeouts import Timeout, TimeoutQueue, TimeoutSweep

# A write with less time left than this is not started: its caller would not learn the outcome.
MIN_WRITE_SECONDS = 0.05
# gRPC counts deadlines in milliseconds. A call with less left has passed its deadline.
MIN_READ_SECONDS = 0.001
# A call may wait for its quotas for this part of its time. The rest is for the call itself.
MAX_QUOTA_WAIT = 0.5


class _MalformedRequest:
    """A request that cannot be parsed."""


def _safe_deserializer(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Return `deserialize` without its errors.

    gRPC is not given this function, because it would parse requests before admission: 4 KiB of
    compressed request can become two million messages. It would also send the text of an error to
    the caller.
    """

    def deserialize_safely(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            return _MalformedRequest()

    return deserialize_safely


def _passthrough_serializer(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return `serialize`, except that a response that is already bytes passes unchanged.

    An event for many streams is serialised once, and pages are encoded straight from the rows.
    """

    def serialize_unless_bytes(response: Any) -> bytes:
        return response if type(response) is bytes else serialize(response)

    return serialize_unless_bytes


def _raise_if_malformed(request: Any) -> None:
    if type(request) is _MalformedRequest:
        raise errors.InvalidArgumentError(
            [errors.Violation("", "malformed request: not the request message of this method")]
        )


async def _parse_stream(
    parse: Callable[[bytes], Any], first_timeout_seconds: float, requests: AsyncIterable[bytes]
) -> AsyncIterator[Any]:
    """The requests of a stream. The first one must come in time."""
    iterator = aiter(requests)
    timeout: contextlib.AbstractContextManager[Any] = Timeout(first_timeout_seconds)
    while True:
        try:
            with timeout:
                data = await anext(iterator)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise errors.DeadlineExceededError from error
        timeout = contextlib.nullcontext()
        request = parse(data)
        _raise_if_malformed(request)
        # Reflection copies a request into its response, one level deeper than callers may parse.
        request.DiscardUnknownFields()
        yield request


class RpcMiddleware:
    """Admits calls, maps their errors to statuses, and bounds calls and stream writes in time.

    Not a gRPC interceptor: those wrap the method again for every call.
    """

    def __init__(
        self,
        admission: AdmissionController,
        *,
        unary_timeout_seconds: float,
        stream_write_timeout_seconds: float,
        access_log: bool,
    ):
        self._admission = admission
        self._instrumentation = functools.partial(
            MethodInstrumentation, access_log_enabled=access_log
        )
        self._unary_timeout_seconds = unary_timeout_seconds
        self._unary_timeouts = TimeoutSweep()
        # The tasks whose write is in progress, and those whose write took too long.
        self._write_timeouts = TimeoutQueue[asyncio.Task[Any]](
            stream_write_timeout_seconds, self._on_write_timeout
        )
        self._write_timed_out: set[asyncio.Task[Any]] = set()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._resumed = asyncio.Event()
        self._resumed.set()
        self._last_arrival = 0.0  # of a call that waits for `resume`, in the loop's time

    async def pause(self, *, quiet_seconds: float, max_seconds: float) -> None:
        """Make new calls wait. Return when none has arrived for a while, or after `max_seconds`.

        Callers that send their next call as soon as they have a response are all waiting then.
        """
        self._resumed.clear()
        clock = asyncio.get_running_loop().time
        self._last_arrival = clock()
        end = self._last_arrival + max_seconds
        while (  # noqa: ASYNC110 - each call that arrives moves the time
            remaining := min(self._last_arrival + quiet_seconds, end) - clock()
        ) > 0:
            await asyncio.sleep(remaining)

    async def _wait_until_resumed(self) -> None:
        if not self._resumed.is_set():
            self._last_arrival = asyncio.get_running_loop().time()
            await self._resumed.wait()

    def resume(self) -> None:
        """Let the calls that wait, and all new ones, go on."""
        self._resumed.set()

    async def wait_for_handlers(self, timeout: float) -> None:
        """Wait for the handlers in flight, and cancel those that take longer than `timeout`."""
        if self._in_flight:
            _, running = await asyncio.wait(set(self._in_flight), timeout=timeout)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running, timeout=timeout)

    def wrap(self, method: str, handler: Any) -> Any:
        """Return the handler to register for a method instead of `handler`."""
        parse = _safe_deserializer(handler.request_deserializer)
        serialize = _passthrough_serializer(handler.response_serializer)
        if handler.stream_stream:
            parse = functools.partial(_parse_stream, parse, self._unary_timeout_seconds)
            stream = self._stream(method, "bidi_stream", handler.stream_stream, parse, serialize)
            return grpc.stream_stream_rpc_method_handler(stream, None, None)
        if handler.unary_stream:
            stream = self._stream(method, "server_stream", handler.unary_stream, parse, serialize)
            return grpc.unary_stream_rpc_method_handler(stream, None, None)
        unary = self._unary(method, handler.unary_unary, parse, serialize)
        return grpc.unary_unary_rpc_method_handler(unary, None, None)

    def _unary(
        self,
        method: str,
        behavior: Callable[..., Awaitable[Any]],
        parse: Callable[[bytes], Any],
        serialize: Callable[[Any], bytes],
    ) -> Callable[[bytes, CallContext], Awaitable[bytes]]:
        """Wrap a unary method.

        One coroutine does all that is around the method. Each further one, and each object made for
        a call, costs about as much as one of the things that it does.
        """
        is_write = method not in UNAUTHENTICATED_METHODS and method not in READ_METHODS
        min_seconds = MIN_WRITE_SECONDS if is_write else MIN_READ_SECONDS
        instrumentation = self._instrumentation(method, "unary")
        admission, timeouts = self._admission, self._unary_timeouts

        async def unary(data: bytes, context: CallContext) -> bytes:
            record = instrumentation.begin(context)
            instrumentation.metrics.received += 1
            record.request_bytes = len(data)
            task = context.task
            self._in_flight.add(task)
            try:
                if not self._resumed.is_set():
                    await self._wait_until_resumed()
                remaining = context.time_remaining()
                timeout = self._unary_timeout_seconds if remaining is None else remaining
                if timeout < min_seconds:
                    raise errors.DeadlineExceededError
                timeouts.start(task, timeout)
                try:
                    lease = await admission.admit_unary(
                        method,
                        context,
                        record.metadata,
                        wait_seconds=(timeout - min_seconds) * MAX_QUOTA_WAIT,
                        request_bytes=len(data),
                    )
                    try:
                        request = parse(data)
                        _raise_if_malformed(request)
                        response = serialize(await behavior(request, context))
                    finally:
                        if lease is not None:
                            lease.release()
                except asyncio.CancelledError as error:
                    if timeouts.stop(task):
                        raise errors.DeadlineExceededError from error
                    raise
                except TimeoutError as error:
                    raise errors.DeadlineExceededError from error
                finally:
                    timeouts.stop(task)
                record.count_response(len(response))
                record.code = grpc.StatusCode.OK
                return response
            except BaseException as error:
                await self._end_with_error(context, record, task, error)
            finally:
                self._in_flight.discard(task)
                instrumentation.end(record)

        return unary

    def _stream(
        self,
        method: str,
        grpc_type: str,
        behavior: Callable[..., Any],
        parse: Callable[[Any], Any],
        serialize: Callable[[Any], bytes],
    ) -> Callable[[Any, Context], Awaitable[bytes | None]]:
        """Wrap a method that streams responses. It may stream requests too.

        What is returned writes the responses. It returns a LastResponse, as `calls` sends it
        together with the status.
        """
        instrumentation = self._instrumentation(method, grpc_type)

        async def stream(data: Any, context: Context) -> bytes | None:
            record = instrumentation.begin(context)
            if isinstance(data, bytes):
                instrumentation.metrics.received += 1
                record.request_bytes = len(data)
            else:
                data = instrumentation.counted(data)
            # Parsed during admission at the earliest, once the caller is authenticated.
            parsed = functools.cache(lambda: parse(data))
            task = context.task if isinstance(context, CallContext) else current_task()
            self._in_flight.add(task)
            last_response: bytes | None = None
            writer = ResponseWriter(context, record, task, self._write_timeouts)
            if isinstance(context, CallContext):
                context.writer = writer
            try:
                await self._wait_until_resumed()

                def session_id() -> str:
                    return getattr(parsed(), "session_id", "")

                remaining = context.time_remaining()
                async with self._admission.admit_stream(
                    method,
                    context,
                    record.metadata,
                    session_id,
                    wait_seconds=math.inf if remaining is None else remaining * MAX_QUOTA_WAIT,
                    request_bytes=record.request_bytes or 0,
                ):
                    request = parsed()
                    _raise_if_malformed(request)
                    requested_id = session_id()
                    record.log_started(requested_id if is_uuid(requested_id) else None)
                    async with contextlib.aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            if type(response) is LastResponse:
                                last_response = response.message
                                record.count_response(len(last_response))
                                break
                            await writer.write(serialize(response))
                record.code = grpc.StatusCode.OK
                return last_response
            except BaseException as error:
                await self._end_with_error(context, record, task, error)
            finally:
                self._in_flight.discard(task)
                self._write_timeouts.stop(task)
                self._write_timed_out.discard(task)
                instrumentation.end(record)

        return stream

    def _on_write_timeout(self, task: asyncio.Task[Any]) -> None:
        self._write_timed_out.add(task)
        task.cancel()

    async def _end_with_error(
        self,
        context: Context,
        record: CallRecord,
        task: asyncio.Task[Any],
        error: BaseException,
    ) -> NoReturn:
        """Abort or cancel a call, and record its status. Always raises."""
        try:
            await self._abort(context, record, task, error)
        except BaseException as ended:
            record.code = status_code_of(context, ended)
            raise

    async def _abort(
        self,
        context: Context,
        record: CallRecord,
        task: asyncio.Task[Any],
        error: BaseException,
    ) -> NoReturn:
        """End a call by the error that its handler has raised. Always raises."""
        match error:
            case grpc.aio.AbortError():  # the health service aborts its calls by itself
                raise error
            case errors.DomainError():
                await abort_with_domain_error(context, record, error)
            case grpc.aio.BaseError():  # the caller has left during a write
                raise asyncio.CancelledError from error
            case asyncio.CancelledError() if task in self._write_timed_out and not task.uncancel():
                slow_reader = errors.ResourceExhaustedError(
                    f"stream not read for {self._write_timeouts.seconds:g} seconds: resume it",
                    reason="SLOW_READER",
                )
                await abort_with_domain_error(context, record, slow_reader)
            case asyncio.CancelledError() if task.cancelling():  # by the caller, or by the drain
                raise error
            case asyncio.CancelledError() | Exception():
                await abort_with_internal_error(context, record, error)
            case _:
                raise error


class MethodRegistrar:
    """Registers methods with the middleware around them, and collects their names.

    Pass it as the server to the generated functions `add_…Servicer_to_server`.
    """

    def __init__(self, server: grpc.aio.Server, middleware: RpcMiddleware):
        self.names: set[str] = set()
        self._server = server
        self._middleware = middleware

    def add_generic_rpc_handlers(self, _: Any) -> None:
        """Ignored: the generated functions also call add_registered_method_handlers."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        wrapped = {}
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self.names.add(method)
            wrapped[name] = self._middleware.wrap(method, handler)
        self._server.add_registered_method_handlers(service, wrapped)
