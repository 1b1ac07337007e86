"""Calls with one request, from gRPC's core to the handler and back, without the service."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc._cython import cygrpc

from chat_ticket_svc.rpc import aio_server, calls

METHOD, STREAM = "/test.Test/Call", "/test.Test/Stream"
SEEN: ContextVar[str] = ContextVar("seen")

Behavior = Callable[[bytes, Any], Awaitable[bytes]]


class Handler:
    """The method that is called. Each test sets what it does."""

    def __init__(self) -> None:
        self.behavior: Behavior = self.echo
        self.has_started = asyncio.Event()
        self.was_cancelled = asyncio.Event()

    async def __call__(self, request: bytes, context: Any) -> bytes:
        return await self.behavior(request, context)

    async def echo(self, request: bytes, _: Any) -> bytes:
        return request

    async def wait(self, _: bytes, __: Any) -> bytes:
        """Until the call is cancelled."""
        self.has_started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        return b"late"


@pytest.fixture
def handler() -> Handler:
    return Handler()


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[tuple[grpc.aio.Server, grpc.aio.Channel]]:
    """A server with the method, and a channel to it."""
    server = aio_server.create_server(request_timeout_seconds=10)

    async def call(request: bytes, context: Any) -> bytes:
        return await handler(request, context)

    methods = {
        "Call": grpc.unary_unary_rpc_method_handler(call),
        "Stream": grpc.unary_stream_rpc_method_handler(call),
    }
    server.add_registered_method_handlers("test.Test", methods)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield server, channel
    finally:
        await server.stop(0)


@pytest_asyncio.fixture
async def call(handler: Handler) -> AsyncIterator[Callable[..., Any]]:
    """`call(request, **options)` calls the method."""
    async with serving(handler) as (_, channel):
        yield channel.unary_unary(METHOD)


@pytest_asyncio.fixture
async def stream(handler: Handler) -> AsyncIterator[Callable[..., Any]]:
    """`stream(request, **options)` calls the method as a stream."""
    async with serving(handler) as (_, channel):
        yield channel.unary_stream(STREAM)


@contextlib.contextmanager
def loop_errors() -> Iterator[list[dict[str, Any]]]:
    """What the event loop's exception handler gets meanwhile."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        yield errors
    finally:
        loop.set_exception_handler(before)


class TestCallerLeaves:
    """The handler is cancelled, whether or not the call listens for its end already."""

    @pytest.mark.parametrize("seconds", [0, 3 * calls.LISTEN_AFTER_SECONDS])
    async def test_cancelled_call(
        self, handler: Handler, call: Callable[..., Any], seconds: float
    ) -> None:
        handler.behavior = handler.wait
        calling = call(b"x")
        async with asyncio.timeout(10):
            await handler.has_started.wait()
            await asyncio.sleep(seconds)
            calling.cancel()
            await handler.was_cancelled.wait()

    async def test_lost_connection(self, handler: Handler) -> None:
        handler.behavior = handler.wait
        async with serving(handler) as (_, channel):
            calling = channel.unary_unary(METHOD)(b"x")
            async with asyncio.timeout(10):
                await handler.has_started.wait()
                await channel.close()
                await handler.was_cancelled.wait()
            assert calling.cancelled()

    async def test_passed_deadline(self, handler: Handler, call: Callable[..., Any]) -> None:
        handler.behavior = handler.wait
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(b"x", timeout=0.05)
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        async with asyncio.timeout(10):
            await handler.was_cancelled.wait()

    async def test_answered_call_is_not_cancelled(
        self, handler: Handler, call: Callable[..., Any]
    ) -> None:
        """The end of a call that has its answer is no leaving."""

        async def slow(request: bytes, _: Any) -> bytes:
            await asyncio.sleep(3 * calls.LISTEN_AFTER_SECONDS)
            return request

        handler.behavior = slow
        with loop_errors() as errors:
            assert await asyncio.gather(*(call(b"%d" % n) for n in range(20))) == [
                b"%d" % n for n in range(20)
            ]
        assert not errors


class TestAbort:
    async def test_status_and_trailers_are_sent(
        self, handler: Handler, call: Callable[..., Any]
    ) -> None:
        async def abort(_: bytes, context: Any) -> bytes:
            await context.abort(grpc.StatusCode.ABORTED, "why: ö", (("a", "b"), ("c-bin", b"\0")))
            raise AssertionError

        handler.behavior = abort
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call(b"x")
        error = refusal.value
        assert (error.code(), error.details()) == (grpc.StatusCode.ABORTED, "why: ö")
        assert {*error.trailing_metadata()} >= {("a", "b"), ("c-bin", b"\0")}

    async def test_aborted_call_is_freed_at_once(
        self, handler: Handler, call: Callable[..., Any]
    ) -> None:
        """Without the garbage collector, which would stop all calls after a flood of aborts."""

        async def abort(_: bytes, context: Any) -> bytes:
            try:
                raise LookupError
            except LookupError:
                await context.abort(grpc.StatusCode.NOT_FOUND, "no")
            raise AssertionError

        def states() -> int:
            return sum(type(each) is cygrpc.RPCState for each in gc.get_objects())

        await call(b"x")
        gc.collect()
        gc.disable()
        try:
            before = states()
            handler.behavior = abort
            for _ in range(10):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await call(b"x")
            handler.behavior = handler.echo
            for _ in range(3):  # so that the last aborted call has ended
                await call(b"x")
            assert states() <= before + 1
        finally:
            gc.enable()

    async def test_unexpected_error_ends_only_its_call(
        self, handler: Handler, call: Callable[..., Any]
    ) -> None:
        """It is reported to the event loop. The caller does not get its text."""

        async def fail(_: bytes, __: Any) -> bytes:
            raise ValueError("secret")

        handler.behavior = fail
        with loop_errors() as errors:
            for _ in range(2 * aio_server.ACCEPTORS_PER_METHOD):
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await call(b"x")
        assert refusal.value.code() is grpc.StatusCode.UNKNOWN
        assert "secret" not in str(refusal.value.details())
        assert isinstance(errors[0]["exception"], ValueError)
        handler.behavior = handler.echo
        assert await call(b"y") == b"y"


async def test_calls_share_no_context_variables(handler: Handler, call: Callable[..., Any]) -> None:
    """Although the task of a call starts the one that accepts the next call."""

    async def look(request: bytes, _: Any) -> bytes:
        seen = SEEN.get("nothing")
        SEEN.set(request.decode())
        return seen.encode()

    handler.behavior = look
    for _ in range(2 * aio_server.ACCEPTORS_PER_METHOD):
        assert await call(b"secret of a tenant") == b"nothing"


@pytest.mark.parametrize("seconds", [0, 3 * calls.LISTEN_AFTER_SECONDS])
async def test_server_stops_after_the_calls_in_flight(handler: Handler, seconds: float) -> None:
    """They are answered within the grace period."""
    finish = asyncio.Event()

    async def until_told(request: bytes, _: Any) -> bytes:
        handler.has_started.set()
        await finish.wait()
        return request

    handler.behavior = until_told
    async with serving(handler) as (server, channel), asyncio.timeout(10):
        calling = channel.unary_unary(METHOD)(b"x")
        await handler.has_started.wait()
        await asyncio.sleep(seconds)
        stopping = asyncio.create_task(server.stop(5))
        await asyncio.sleep(0.02)
        finish.set()
        assert await calling == b"x"
        await stopping


async def test_call_that_outlasts_the_grace_period_is_cancelled(handler: Handler) -> None:
    handler.behavior = handler.wait
    async with serving(handler) as (server, channel), asyncio.timeout(10):
        calling = channel.unary_unary(METHOD)(b"x")
        await handler.has_started.wait()
        await server.stop(0.01)
        await handler.was_cancelled.wait()
        with pytest.raises(grpc.aio.AioRpcError):
            await calling


class TestStream:
    """Of responses. The handler writes them, and may return the last one."""

    @pytest.mark.parametrize("written", [0, 1, 3])
    @pytest.mark.parametrize("last", [None, b"", b"last"])
    async def test_responses_come_in_order_and_then_the_status(
        self, handler: Handler, stream: Callable[..., Any], written: int, last: bytes | None
    ) -> None:
        async def write(_: bytes, context: Any) -> Any:
            for number in range(written):
                await context.write(b"%d" % number)
            return last

        handler.behavior = write
        call = stream(b"x")
        responses = [b"%d" % number for number in range(written)]
        assert [each async for each in call] == responses + ([] if last is None else [last])
        assert await call.code() is grpc.StatusCode.OK

    async def test_abort_after_a_response(
        self, handler: Handler, stream: Callable[..., Any]
    ) -> None:
        async def abort(_: bytes, context: Any) -> bytes:
            await context.write(b"first")
            await context.abort(grpc.StatusCode.ABORTED, "why", (("a", "b"),))
            raise AssertionError

        handler.behavior = abort
        call = stream(b"x")
        assert await call.read() == b"first"
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert refusal.value.code() is grpc.StatusCode.ABORTED
        assert ("a", "b") in {*refusal.value.trailing_metadata()}

    @pytest.mark.parametrize("seconds", [0, 3 * calls.LISTEN_AFTER_SECONDS])
    async def test_caller_that_leaves_between_responses_is_heard(
        self, handler: Handler, stream: Callable[..., Any], seconds: float
    ) -> None:
        async def write_and_wait(request: bytes, context: Any) -> bytes:
            await context.write(b"first")
            return await handler.wait(request, context)

        handler.behavior = write_and_wait
        call = stream(b"x")
        async with asyncio.timeout(10):
            assert await call.read() == b"first"
            await asyncio.sleep(seconds)
            call.cancel()
            await handler.was_cancelled.wait()

    async def test_write_to_a_caller_that_has_left_fails(
        self, handler: Handler, stream: Callable[..., Any]
    ) -> None:
        """Or the handler is cancelled before."""
        ended = asyncio.Event()

        async def write_for_ever(_: bytes, context: Any) -> bytes:
            try:
                while True:
                    await context.write(b"x" * 1000)
            finally:
                ended.set()

        handler.behavior = write_for_ever
        with loop_errors():
            call = stream(b"x")
            async with asyncio.timeout(10):
                await call.read()
                call.cancel()
                await ended.wait()
