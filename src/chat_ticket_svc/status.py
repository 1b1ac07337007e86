"""The second of two hops: domain error → gRPC status, in one table and one interceptor.

The interceptor is the outermost of the server. Services raise; nothing else aborts a call.
"""

import asyncio
import contextlib
import functools
import inspect
import math
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from chat_ticket_svc import calls, errors, logs, metrics
from chat_ticket_svc.access.door import Door
from chat_ticket_svc.access.methods import OPEN, READS
from chat_ticket_svc.calls import Behavior, Call
from chat_ticket_svc.time_limit import TimeLimit
from chat_ticket_svc.timers import Timers
from chat_ticket_svc.validate import is_uuid

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
    context: grpc.aio.ServicerContext[Any, Any],
    call: Call,
    status: status_pb2.Status,
    *details: Message,
) -> NoReturn:
    for detail in (*details, details_pb2.RequestInfo(request_id=call.request_id)):
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
    context: grpc.aio.ServicerContext[Any, Any], call: Call, error: errors.DomainError
) -> NoReturn:
    call.reason = error.reason
    if isinstance(error, errors.ResourceExhaustedError):
        metrics.REJECTED.labels(error.metadata.get("quota", error.reason)).inc()
    status = status_pb2.Status(code=code_of(error).value[0], message=_shortened(str(error)))
    await _abort(context, call, status, *_details(error))


async def _abort_unknown(
    context: grpc.aio.ServicerContext[Any, Any], call: Call, method: str, error: BaseException
) -> NoReturn:
    """Log what an unexpected error is and where it came from; tell the caller nothing but an id."""
    correlation_id = uuid.uuid4().hex
    log.error(
        "internal error",
        correlation_id=correlation_id,
        request_id=call.request_id,
        method=method,
        errors=logs.story(error),
    )
    status = status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error {correlation_id}"
    )
    info = details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"correlation_id": correlation_id}
    )
    call.reason = info.reason
    await _abort(context, call, status, info)


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


class StatusInterceptor:
    """Lets calls in by the door, maps what they raise, gives deadlines, bounds writes.

    Not one of gRPC's interceptors, which wrap the method anew for every call.
    """

    def __init__(
        self,
        door: Door,
        *,
        unary_timeout_seconds: float,
        slow_reader_seconds: float,
        log_calls: bool,
    ):
        self._door = door
        self._told = functools.partial(calls.told, logged=log_calls)
        self._unary_timeout = unary_timeout_seconds
        # Those who write now, and those of them whose write was not read for too long.
        self._writing = Timers[asyncio.Task[Any]](slow_reader_seconds, self._cut_off)
        self._stuck: set[asyncio.Task[Any]] = set()
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._open = asyncio.Event()
        self._open.set()
        self._came = 0.0  # when the last of those came who wait for it

    async def hold(self, *, quiet: float, most: float) -> None:
        """Let every new call wait; returns when none has come for `quiet` seconds, or after `most`.

        Callers who call again when they were answered all wait then.
        """
        self._open.clear()
        clock = asyncio.get_running_loop().time
        self._came = clock()
        end = self._came + most
        while (left := min(self._came + quiet, end) - clock()) > 0:  # noqa: ASYNC110 - it moves
            await asyncio.sleep(left)

    async def _until_open(self) -> None:
        if not self._open.is_set():
            self._came = asyncio.get_running_loop().time()
            await self._open.wait()

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
            behavior = self._stream(method, handler.stream_stream, parse, serialize)
            told = self._told(method, "bidi_stream", behavior)
            return grpc.stream_stream_rpc_method_handler(told, None, serialize)
        if handler.unary_stream:
            behavior = self._stream(method, handler.unary_stream, parse, serialize)
            told = self._told(method, "server_stream", behavior)
            return grpc.unary_stream_rpc_method_handler(told, None, serialize)
        behavior = self._unary(method, handler.unary_unary, parse, serialize)
        told = self._told(method, "unary", behavior)
        return grpc.unary_unary_rpc_method_handler(told, None, None)

    def _unary(
        self,
        method: str,
        behavior: Callable[..., Awaitable[Any]],
        parse: Callable[[bytes], Any],
        serialize: Callable[[Any], bytes],
    ) -> Behavior:
        least = 0 if method in OPEN or method in READS else WRITE_SECONDS

        async def unary(
            data: bytes, context: grpc.aio.ServicerContext[Any, Any], call: Call
        ) -> bytes:
            task = self._begin()
            call.request_bytes = len(data)
            try:
                await self._until_open()
                remaining = context.time_remaining()
                timeout = self._unary_timeout if remaining is None else remaining
                if timeout < least:
                    raise errors.DeadlineExceededError
                try:
                    with TimeLimit(timeout), await self._door.call(method, context, call.metadata):
                        request = parse(data)
                        _require_message(request)
                        response = serialize(await behavior(request, context))
                except TimeoutError as error:
                    raise errors.DeadlineExceededError from error
                call.responses, call.response_bytes = 1, len(response)
                return response
            except BaseException as error:
                await self._refuse(method, context, call, task, error)
            finally:
                self._in_flight.discard(task)

        return unary

    def _stream(
        self,
        method: str,
        behavior: Callable[..., Any],
        parse: Callable[[Any], Any],
        serialize: Callable[[Any], bytes],
    ) -> Behavior:
        """Around a method that streams its responses, and perhaps its requests."""

        async def stream(
            data: Any, context: grpc.aio.ServicerContext[Any, Any], call: Call
        ) -> None:
            # Parsed within the door, which asks for the session of a caller that it knows.
            parsed = functools.cache(lambda: parse(data))
            task = self._begin()
            if isinstance(data, bytes):
                call.request_bytes = len(data)
            try:
                await self._until_open()

                def session_id() -> str:
                    return getattr(parsed(), "session_id", "")

                async with self._door.stream(method, context, call.metadata, session_id):
                    request = parsed()
                    _require_message(request)
                    of = session_id()
                    call.opened(of if is_uuid(of) else None)
                    responses = behavior(request, context)
                    if inspect.isawaitable(responses):  # the health service's Watch writes itself
                        await responses
                        return
                    async with contextlib.aclosing(responses):
                        async for response in responses:
                            message = serialize(response)
                            self._writing.start(task)
                            await context.write(message)
                            self._writing.stop(task)
                            call.responses += 1
                            call.response_bytes += len(message)
            except BaseException as error:
                await self._refuse(method, context, call, task, error)
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
        call: Call,
        task: asyncio.Task[Any],
        error: BaseException,
    ) -> NoReturn:
        """End a call by what it has raised; always raises."""
        match error:
            case grpc.aio.AbortError():  # the health service ends its calls by itself
                raise error
            case errors.DomainError():
                await _abort_known(context, call, error)
            case grpc.aio.BaseError():  # the caller has left while it was written to
                raise asyncio.CancelledError from error
            case asyncio.CancelledError() if task in self._stuck and not task.uncancel():
                slow = errors.ResourceExhaustedError(
                    f"nothing was read for {self._writing.seconds:g} seconds: resume",
                    reason="SLOW_READER",
                )
                await _abort_known(context, call, slow)
            case asyncio.CancelledError() if task.cancelling():  # by the caller, or our end
                raise error
            case asyncio.CancelledError() | Exception():
                await _abort_unknown(context, call, method, error)
            case _:
                raise error
