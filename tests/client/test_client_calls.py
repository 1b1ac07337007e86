"""What a call of the Python client carries, and how its object behaves, before a gRPC server."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from support.client_calls import NewClient, only_asyncio, until
from support.threaded import ThreadedClient

from chat_ticket import errors
from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest

ANSWERS = 2  # of a stream


class Recorder(grpc.GenericRpcHandler):
    """Answers every call, and records its metadata and how long it may take.

    A call with `x-silent` is not answered, and a stream with `x-endless` does not end. A stream of
    requests is answered one by one.
    """

    def __init__(self) -> None:
        self.port = 0
        self.metadata: list[list[tuple[str, str | bytes]]] = []
        self.seconds: list[float | None] = []
        self.left = 0  # how many calls ended before their answer

    def service(self, details: Any) -> Any:
        if "/Write" in details.method:
            return grpc.stream_stream_rpc_method_handler(self._echo)
        if "/ListChatMessages" in details.method:
            return grpc.unary_stream_rpc_method_handler(self._stream)
        return grpc.unary_unary_rpc_method_handler(self._answer)

    async def _answer(self, _: bytes, context: Any) -> bytes:
        await self._record(context)
        return b""

    async def _stream(self, _: bytes, context: Any) -> AsyncIterator[bytes]:
        await self._record(context)
        is_endless = ("x-endless", "1") in self.metadata[-1]
        if is_endless:
            # Not by `finally`: gRPC does not close the generator of a call that ends at a yield.
            context.add_done_callback(self._count_left)
        for _ in range(ANSWERS):
            yield b""
        if is_endless:
            await asyncio.sleep(60)

    def _count_left(self, _: object) -> None:
        self.left += 1

    async def _echo(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        await self._record(context)
        async for _ in requests:
            yield b""

    async def _record(self, context: Any) -> None:
        metadata = [
            (key, value)
            for key, value in context.invocation_metadata()
            if key != "user-agent" and not key.startswith("grpc-")
        ]
        self.metadata.append(metadata)
        self.seconds.append(context.time_remaining())
        if ("x-silent", "1") in metadata:
            try:
                await asyncio.sleep(60)
            finally:
                self.left += 1


@pytest_asyncio.fixture
async def recorder() -> AsyncIterator[Recorder]:
    recorder, server = Recorder(), grpc.aio.server()
    server.add_generic_rpc_handlers([recorder])
    recorder.port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield recorder
    await server.stop(None)


async def call_both(client: Any, **keywords: Any) -> None:
    """A call with one response, and a stream."""
    await client.sessions.ListChatSessions(ListChatSessionsRequest(), **keywords)
    stream = client.messages.ListChatMessages(ListChatMessagesRequest(), **keywords)
    assert len([response async for response in stream]) == ANSWERS


async def test_metadata_of_the_caller_comes_before_that_of_the_client(
    recorder: Recorder, connect: NewClient, tenant: str
) -> None:
    """With the token, whether it is a string or what a function returns for the call."""
    tokens = iter(["one", "two"])
    expected = [("x-tenant-id", tenant), ("authorization", "Bearer fixed")]
    client = connect(recorder.port, token="fixed")
    for metadata in (None, [("x-a", "1"), ("x-a", "2")], (("x-b-bin", b"\0"),)):
        await call_both(client, metadata=metadata)
        assert recorder.metadata[-2:] == [[*(metadata or ()), *expected]] * 2
    await call_both(connect(recorder.port, token=lambda: next(tokens)), metadata=[("x-a", "1")])
    assert recorder.metadata[-2:] == [
        [("x-a", "1"), ("x-tenant-id", tenant), ("authorization", f"Bearer {token}")]
        for token in ("one", "two")
    ]


async def test_time_of_the_token_counts(recorder: Recorder, connect: NewClient) -> None:
    """A call with one response has the timeout of the client or its own; a stream only its own."""

    spent = 0.05

    def slow() -> str:
        time.sleep(spent)
        return "token"

    client = connect(recorder.port, token=slow, timeout=5)
    await call_both(client)
    await call_both(client, timeout=3)
    most = 0.01 - spent  # gRPC sends hundredths of seconds
    own, none, *given = recorder.seconds
    assert own is not None
    assert 4 < own <= 5 + most
    assert none is None
    assert all(seconds is not None and 2 < seconds <= 3 + most for seconds in given)


async def test_token_that_cannot_be_got_is_an_error_of_the_call(
    recorder: Recorder, connect: NewClient
) -> None:
    """Which begins like any other: its caller may handle errors where it awaits or reads it."""

    def broken() -> str:
        raise LookupError("no token")

    client: Any = connect(recorder.port, token=broken)
    stubs = client.client if isinstance(client, ThreadedClient) else client
    calls = [stubs.messages.ListChatMessages(ListChatMessagesRequest())]
    if isinstance(client, ThreadedClient):
        calls.append(stubs.sessions.ListChatSessions.future(ListChatSessionsRequest()))
    else:
        calls.append(stubs.sessions.ListChatSessions(ListChatSessionsRequest()))
    for call in calls:
        assert call.done()
        assert not call.cancel()
    stream, single = calls
    with pytest.raises(LookupError):
        await anext(aiter(stream)) if hasattr(stream, "__aiter__") else next(stream)
    with pytest.raises(LookupError):
        await single if hasattr(single, "__await__") else single.result(1)
    assert not recorder.metadata


@only_asyncio
class TestAsyncCall:
    async def test_is_a_call_of_grpc(self, recorder: Recorder, connect: NewClient) -> None:
        """Of its kind, whatever comes of its token."""
        tokens: list[Any] = [None, lambda: "token", lambda: asyncio.sleep(0, "token")]
        for token in tokens:
            client = connect(recorder.port, token=token)
            call: Any = client.sessions.ListChatSessions(request=ListChatSessionsRequest())
            ended: list[object] = []
            call.add_done_callback(ended.append)
            assert isinstance(call, grpc.aio.UnaryUnaryCall)
            assert await call == await call
            assert ended == [call]
            call.add_done_callback(ended.append)
            assert ended == [call, call]
            assert (call.done(), call.cancelled(), call.cancel()) == (True, False, False)
            assert await call.code() is grpc.StatusCode.OK
            assert (await call.details(), await call.debug_error_string()) == ("", "")
            assert list(await call.trailing_metadata()) == list(await call.initial_metadata()) == []

    async def test_stream_is_read_and_written_by_hand(
        self, recorder: Recorder, connect: NewClient
    ) -> None:
        """Without an iterator of requests; the end is grpc.aio.EOF."""
        client: Any = connect(recorder.port)
        call = client.drafts.WriteChatDraft()
        assert isinstance(call, grpc.aio.StreamStreamCall)
        await call.wait_for_connection()
        await call.write(WriteChatDraftRequest())
        assert await call.read() is not grpc.aio.EOF
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF

    async def test_stream_that_is_dropped_ends(
        self, recorder: Recorder, connect: NewClient
    ) -> None:
        """At the server too, and at once: the client counts the open streams of a connection."""
        silent: Any = [("x-silent", "1")]
        client = connect(recorder.port)
        stream = client.messages.ListChatMessages(ListChatMessagesRequest(), metadata=silent)
        await until(lambda: bool(recorder.metadata))
        gc.disable()
        try:
            del stream
            await until(lambda: recorder.left == 1)
        finally:
            gc.enable()

    async def test_stream_that_is_dropped_in_the_middle_ends(
        self, recorder: Recorder, connect: NewClient
    ) -> None:
        """As one that was never read, whether a loop is left or it is read by hand."""
        endless: Any = [("x-endless", "1")]
        client: Any = connect(recorder.port)

        async def leave_loop() -> None:
            request = ListChatMessagesRequest()
            async for _ in client.messages.ListChatMessages(request, metadata=endless):
                break

        async def read_once() -> None:
            await client.messages.ListChatMessages(
                ListChatMessagesRequest(), metadata=endless
            ).read()

        gc.disable()
        try:
            await leave_loop()
            await until(lambda: recorder.left == 1)
            await read_once()
            await until(lambda: recorder.left == 2)
        finally:
            gc.enable()

    async def test_failed_call_has_its_status(self, connect: NewClient) -> None:
        """Its exception does not stand in for it."""
        with pytest.raises(errors.DeadlineExceededError):
            await (
                call := connect(1).sessions.ListChatSessions(ListChatSessionsRequest(), timeout=0)
            )
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]

    async def test_waits_for_its_token_as_long_as_it_may(
        self, recorder: Recorder, connect: NewClient
    ) -> None:
        """Then it has failed, and nothing was sent."""
        client = connect(recorder.port, token=lambda: asyncio.sleep(60, "token"))
        with pytest.raises(errors.DeadlineExceededError, match="token: its function took over"):
            await client.sessions.ListChatSessions(ListChatSessionsRequest(), timeout=0.05)
        assert not recorder.metadata

    @pytest.mark.parametrize("token", [None, lambda: asyncio.sleep(60, "token")])
    async def test_ends_when_it_is_cancelled(
        self, recorder: Recorder, connect: NewClient, token: Any
    ) -> None:
        """By itself or by its task, while it waits for its token or for the server."""
        client = connect(recorder.port, token=token)
        silent: Any = [("x-silent", "1")]
        call: Any = client.sessions.ListChatSessions(ListChatSessionsRequest(), metadata=silent)
        await asyncio.sleep(0.02)
        assert not call.done()
        assert call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert call.cancelled()
        assert call.done()
        if token is None:
            assert await call.code() is grpc.StatusCode.CANCELLED
        else:
            with pytest.raises(errors.CallCancelledError, match="before it had its token"):
                await call.code()
        call = client.sessions.ListChatSessions(ListChatSessionsRequest(), metadata=silent)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.02)
        assert call.cancelled()

    @pytest.mark.parametrize("token", [None, lambda: asyncio.sleep(60, "token")])
    async def test_closing_the_client_ends_it(
        self, recorder: Recorder, connect: NewClient, token: Any
    ) -> None:
        """By CallCancelledError, and not as if the task that waits was cancelled."""
        client = connect(recorder.port, token=token)
        silent: Any = [("x-silent", "1")]
        call = client.sessions.ListChatSessions(ListChatSessionsRequest(), metadata=silent)
        stream = client.messages.ListChatMessages(ListChatMessagesRequest(), metadata=silent)
        waiting = [asyncio.ensure_future(call), asyncio.ensure_future(anext(aiter(stream)))]
        await asyncio.sleep(0.02)
        await client.close()
        for each in waiting:
            with pytest.raises(errors.CallCancelledError, match="the client is closed"):
                await asyncio.wait_for(each, 5)
