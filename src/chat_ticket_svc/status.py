"""The second of two hops: domain error → gRPC status, in one table and one interceptor.

The interceptor is the outermost of the server. Services raise; nothing else aborts a call.
"""

import asyncio
import contextlib
import functools
import inspect
import math
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from prometheus_client import Counter, Histogram

from chat_ticket_svc import errors, logs, metrics
from chat_ticket_svc.access.door import Door
from chat_ticket_svc.access.methods import OPEN, READS
from chat_ticket_svc.time_limit import TimeLimit
from chat_ticket_svc.timers import Timers

log = structlog.get_logger()

DOMAIN = "chat-ticket-svc"

# Subclasses stand before their base.
TABLE: tuple[tuple[type[errors.DomainError], grpc.StatusCode], ...] = (
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AbortedError, grpc.StatusCode.ABORTED),
    (errors.OutOfRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (errors.ResourceExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
)

# With less than this left of its deadline a write is not begun: the caller would not hear of it.
WRITE_SECONDS = 0.05

# Trailers have to fit into the 8 KiB of metadata that callers accept, details in base64.
TEXT_BYTES = 300
VIOLATION_BYTES = 3500


def code_of(error: errors.DomainError) -> grpc.StatusCode:
    return next(code for kind, code in TABLE if isinstance(error, kind))


def _details(error: errors.DomainError) -> Iterator[Message]:
    yield details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    match error:
        case errors.InvalidArgumentError():
            yield _bad_request(error)
        case errors.FailedPreconditionError():
            violation = details_pb2.PreconditionFailure.Violation(
                type=error.reason, subject=error.subject, description=str(error)
            )
            yield details_pb2.PreconditionFailure(violations=[violation])
        case errors.NotFoundError() | errors.AlreadyExistsError():
            yield details_pb2.ResourceInfo(
                resource_type=error.resource,
                resource_name=error.resource_id,
                description=str(error),
            )
        case errors.QuotaExceededError():
            quota = details_pb2.QuotaFailure.Violation(
                subject=error.subject, description=str(error)
            )
            yield details_pb2.QuotaFailure(violations=[quota])
    if error.retry_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(1000 * error.retry_seconds))
        yield details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: errors.InvalidArgumentError) -> details_pb2.BadRequest:
    details = details_pb2.BadRequest()
    for index, violation in enumerate(error.violations):
        details.field_violations.add(field=violation.field, description=violation.description)
        if details.ByteSize() > VIOLATION_BYTES:
            del details.field_violations[-1]
            rest = len(error.violations) - index + error.unlisted
            details.field_violations.add(field="", description=f"and {rest} more violations")
            return details
    if error.unlisted:
        details.field_violations.add(field="", description=f"and {error.unlisted} more violations")
    return details


def _shortened(text: str) -> str:
    """In bytes, which may travel percent-encoded, as three characters each."""
    data = text.encode()
    return text if len(data) <= TEXT_BYTES else data[:TEXT_BYTES].decode(errors="ignore") + "..."


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any], status: status_pb2.Status, *details: Message
) -> None:
    for detail in details:
        status.details.add().Pack(detail)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    trailer = ("grpc-status-details-bin", status.SerializeToString())
    try:
        await context.abort(code, status.message, trailing_metadata=(trailer,))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:  # the caller has left without waiting for the status
        raise asyncio.CancelledError from error


async def _abort_known(
    context: grpc.aio.ServicerContext[Any, Any], error: errors.DomainError
) -> None:
    if isinstance(error, errors.ResourceExhaustedError):
        metrics.REJECTED.labels(error.metadata.get("quota", error.reason)).inc()
    status = status_pb2.Status(code=code_of(error).value[0], message=_shortened(str(error)))
    await _abort(context, status, *_details(error))


async def _abort_unknown(
    context: grpc.aio.ServicerContext[Any, Any], method: str, error: BaseException
) -> None:
    """Log what an unexpected error is and where it came from; tell the caller nothing but an id."""
    correlation_id = uuid.uuid4().hex
    log.error(
        "internal error", correlation_id=correlation_id, method=method, errors=logs.story(error)
    )
    status = status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error {correlation_id}"
    )
    info = details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"correlation_id": correlation_id}
    )
    await _abort(context, status, info)


class _Malformed:
    """Stands for a request whose bytes are not the message they should be."""


def _tolerant(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`deserialize`, which gRPC is not left to call: it would send a failure's text to the caller.

    And it would call it before the door: 4 KiB on the way can be two million messages in memory.
    """

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            return _Malformed()

    return tolerant


def _serialized(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """`serialize`, but for responses that are bytes already: what many streams are sent is
    serialised once, and what a page holds is encoded as it comes from the database.
    """

    def serialized(response: Any) -> bytes:
        return response if type(response) is bytes else serialize(response)

    return serialized


def _require_message(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise errors.InvalidArgumentError(
            [errors.Violation("", "the request is not the message of this method")]
        )


async def _each(
    parse: Callable[[bytes], Any], requests: AsyncIterable[bytes]
) -> AsyncIterator[Any]:
    """The messages of a stream of requests."""
    async for data in requests:
        request = parse(data)
        _require_message(request)
        # Reflection repeats a request in its answer, one level deeper than callers may parse.
        request.DiscardUnknownFields()
        yield request


def _outermost(
    method: str, kind: str, behavior: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    """`behavior`, measured, and without what keeps an aborted call in memory.

    gRPC's state of the call has the error that ended it, whose traceback has our frames, which
    have the call: only the garbage collector undoes that, and it stops everybody's calls for a
    tenth of a second when a flood of refused calls has left enough of it.
    """
    _, service, name = method.split("/")
    ended = functools.cache(functools.partial(_metrics_of, kind, service, name))
    is_stream = kind != "unary"
    streams = metrics.STREAMS.labels(service, name) if is_stream else None

    async def outermost(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        began = time.perf_counter()
        code = grpc.StatusCode.CANCELLED
        if streams is not None:
            streams.inc()
        try:
            response = await behavior(request, context)
            code = grpc.StatusCode.OK
            return response
        except grpc.aio.AbortError as error:
            code = context.code()
            error.__traceback__ = error.__context__ = None
            raise
        finally:
            handled, seconds = ended(code)
            handled.inc()
            if streams is None:
                seconds.observe(time.perf_counter() - began)
            else:
                streams.dec()

    return outermost


def _metrics_of(
    kind: str, service: str, name: str, code: grpc.StatusCode
) -> tuple[Counter, Histogram]:
    labels = (kind, service, name, code.name)
    return metrics.HANDLED.labels(*labels), metrics.HANDLING_SECONDS.labels(*labels)


class StatusInterceptor:
    """Lets calls in by the door, maps what they raise, gives deadlines, bounds writes.

    Not one of gRPC's interceptors, which wrap the method anew for every call.
    """

    def __init__(self, door: Door, *, unary_timeout_seconds: float, slow_reader_seconds: float):
        self._door = door
        self._unary_timeout = unary_timeout_seconds
        # Those who write now, and those of them whose write was not read for too long.
        self._writing = Timers[asyncio.Task[Any]](slow_reader_seconds, self._cut_off)
        self._stuck: set[asyncio.Task[Any]] = set()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        """Let every new call wait."""
        self._open.clear()

    def release(self) -> None:
        """Let those that wait go on."""
        self._open.set()

    async def finished(self, timeout: float) -> None:
        """Wait for the handlers that still run, and end those that go on."""
        if self._in_flight:
            _, running = await asyncio.wait(set(self._in_flight), timeout=timeout)
            for task in running:
                task.cancel()
            if running:
                await asyncio.wait(running, timeout=timeout)

    def wrapped(self, method: str, handler: Any) -> Any:
        """The handler of a method, to be registered instead of it."""
        parse = _tolerant(handler.request_deserializer)
        serialize = _serialized(handler.response_serializer)
        if handler.stream_stream:
            parse = functools.partial(_each, parse)
            behavior = _outermost(
                method, "bidi_stream", self._stream(method, handler.stream_stream, parse)
            )
            return grpc.stream_stream_rpc_method_handler(behavior, None, serialize)
        if handler.unary_stream:
            behavior = _outermost(
                method, "server_stream", self._stream(method, handler.unary_stream, parse)
            )
            return grpc.unary_stream_rpc_method_handler(behavior, None, serialize)
        behavior = self._unary(method, handler.unary_unary, parse)
        behavior = _outermost(method, "unary", behavior)
        return grpc.unary_unary_rpc_method_handler(behavior, None, serialize)

    def _unary(
        self,
        method: str,
        behavior: Callable[..., Awaitable[Any]],
        parse: Callable[[bytes], Any],
    ) -> Any:
        least = 0 if method in OPEN or method in READS else WRITE_SECONDS

        async def unary(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            task = self._begin()
            try:
                await self._open.wait()
                remaining = context.time_remaining()
                timeout = self._unary_timeout if remaining is None else remaining
                if timeout < least:
                    raise errors.DeadlineExceededError
                try:
                    with TimeLimit(timeout), await self._door.call(method, context):
                        request = parse(data)
                        _require_message(request)
                        return await behavior(request, context)
                except TimeoutError as error:
                    raise errors.DeadlineExceededError from error
            except BaseException as error:
                await self._refuse(method, context, task, error)
            finally:
                self._in_flight.discard(task)

        return unary

    def _stream(
        self, method: str, behavior: Callable[..., Any], parse: Callable[[Any], Any]
    ) -> Any:
        """Around a method that streams its responses, and perhaps its requests."""

        async def stream(data: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            # Parsed within the door, which asks for the session of a caller that it knows.
            parsed = functools.cache(lambda: parse(data))
            task = self._begin()
            try:
                await self._open.wait()
                session_id = lambda: getattr(parsed(), "session_id", "")  # noqa: E731
                async with self._door.stream(method, context, session_id):
                    request = parsed()
                    _require_message(request)
                    responses = behavior(request, context)
                    if inspect.isawaitable(responses):  # the health service's Watch writes itself
                        await responses
                        return
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            self._writing.start(task)
                            await context.write(response)
                            self._writing.stop(task)
            except BaseException as error:
                await self._refuse(method, context, task, error)
            finally:
                self._in_flight.discard(task)
                self._writing.stop(task)
                self._stuck.discard(task)

        return stream

    def _cut_off(self, task: asyncio.Task[Any]) -> None:
        self._stuck.add(task)
        task.cancel()

    def _begin(self) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - for the type checker: a handler is a task
        self._in_flight.add(task)
        return task

    async def _refuse(
        self,
        method: str,
        context: grpc.aio.ServicerContext[Any, Any],
        task: asyncio.Task[Any],
        error: BaseException,
    ) -> None:
        """End a call by what it has raised; always raises."""
        match error:
            case grpc.aio.AbortError():  # the health service ends its calls by itself
                raise error
            case errors.DomainError():
                await _abort_known(context, error)
            case grpc.aio.BaseError():  # the caller has left while it was written to
                raise asyncio.CancelledError from error
            case asyncio.CancelledError() if task in self._stuck and not task.uncancel():
                slow = errors.ResourceExhaustedError(
                    f"nothing was read for {self._writing.seconds:g} seconds: resume",
                    reason="SLOW_READER",
                )
                await _abort_known(context, slow)
            case asyncio.CancelledError() if task.cancelling():  # by the caller, or our end
                raise error
            case asyncio.CancelledError() | Exception():
                await _abort_unknown(context, method, error)
            case _:
                raise error
