"""What stands around every handler: admission, deadlines, write timeouts, statuses, the drain.

Services raise domain errors, and nothing but this middleware aborts a call.
"""

import asyncio
import contextlib
import functools
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from chat_ticket_svc import errors
from chat_ticket_svc.access.admission import AdmissionController
from chat_ticket_svc.access.method_permissions import READ_METHODS, UNAUTHENTICATED_METHODS
from chat_ticket_svc.rpc import instrumentation
from chat_ticket_svc.rpc.instrumentation import Behavior, Call
from chat_ticket_svc.rpc.status import abort_with_domain_error, abort_with_internal_error
from chat_ticket_svc.services.validate import is_uuid
from chat_ticket_svc.timeouts import Timeout, TimeoutQueue

log = structlog.get_logger()

# With less than this left of its deadline a write is not begun: the caller would not hear of it.
WRITE_SECONDS = 0.05


class _MalformedRequest:
    """Stands for a request whose bytes are not the message they should be."""


def _safe_deserializer(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """`deserialize`, which gRPC is not left to call: it would send a failure's text to the caller.

    And it would call it before the door: 4 KiB on the way can be two million messages in memory.
    """

    def tolerant(data: bytes) -> Any:
        try:
            return deserialize(data)
        except (DecodeError, ValueError):
            return _MalformedRequest()

    return tolerant


def _passthrough_serializer(serialize: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """`serialize`, but for responses that are bytes already: what many streams are sent is
    serialised once, and what a page holds is encoded as it comes from the database.
    """

    def serialized(response: Any) -> bytes:
        return response if type(response) is bytes else serialize(response)

    return serialized


def _require_message(request: Any) -> None:
    if isinstance(request, _MalformedRequest):
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


class RpcMiddleware:
    """Lets calls in by the door, maps what they raise, gives deadlines, bounds writes.

    Not one of gRPC's interceptors, which wrap the method anew for every call.
    """

    def __init__(
        self,
        door: AdmissionController,
        *,
        unary_timeout_seconds: float,
        stream_write_timeout_seconds: float,
        access_log: bool,
    ):
        self._door = door
        self._told = functools.partial(instrumentation.told, logged=access_log)
        self._unary_timeout = unary_timeout_seconds
        # Those who write now, and those of them whose write was not read for too long.
        self._writing = TimeoutQueue[asyncio.Task[Any]](stream_write_timeout_seconds, self._cut_off)
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

    def wrap(self, method: str, handler: Any) -> Any:
        """The handler of a method, to be registered instead of it."""
        parse = _safe_deserializer(handler.request_deserializer)
        serialize = _passthrough_serializer(handler.response_serializer)
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
        least = 0 if method in UNAUTHENTICATED_METHODS or method in READ_METHODS else WRITE_SECONDS

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
                    with (
                        Timeout(timeout),
                        await self._door.admit_unary(method, context, call.metadata),
                    ):
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

                async with self._door.admit_stream(method, context, call.metadata, session_id):
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
                await abort_with_domain_error(context, call, error)
            case grpc.aio.BaseError():  # the caller has left while it was written to
                raise asyncio.CancelledError from error
            case asyncio.CancelledError() if task in self._stuck and not task.uncancel():
                slow = errors.ResourceExhaustedError(
                    f"nothing was read for {self._writing.seconds:g} seconds: resume",
                    reason="SLOW_READER",
                )
                await abort_with_domain_error(context, call, slow)
            case asyncio.CancelledError() if task.cancelling():  # by the caller, or our end
                raise error
            case asyncio.CancelledError() | Exception():
                await abort_with_internal_error(context, call, method, error)
            case _:
                raise error


class MethodRegistrar:
    """Registers a server's methods with the middleware around them, and collects their names.

    Stands for the server in the generated `add_…Servicer_to_server` functions.
    """

    def __init__(self, server: grpc.aio.Server, middleware: RpcMiddleware):
        self.names: set[str] = set()
        self._server = server
        self._middleware = middleware

    def add_generic_rpc_handlers(self, _: Any) -> None:
        """Does nothing: the generated functions register each method below as well."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        wrapped = {}
        for name, handler in handlers.items():
            method = f"/{service}/{name}"
            self.names.add(method)
            wrapped[name] = self._middleware.wrap(method, handler)
        self._server.add_registered_method_handlers(service, wrapped)
