"""chat_ticket.client.ChatTicketClient: what only threads have. test_client.py has all else."""

import contextlib
import inspect
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import grpc
import pytest
from support.client import an_id
from support.client_servers import OPTIONS, SETTINGS, free_port
from support.process import server_process

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, ChatTicketClient
from chat_ticket.client._runtime_threads import ResponseReader
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    WatchChatSessionRequest,
)

READER = "chat-ticket-stream"  # the name of the thread of a stream


@pytest.fixture(scope="module")
def target(database: str) -> Iterator[str]:
    """The address of a server in another process."""
    with server_process(database, **SETTINGS) as process:
        process.wait_for("serving")
        yield process.address


@pytest.fixture
def client(target: str, tenant: str) -> Iterator[ChatTicketClient]:
    with ChatTicketClient(target, tenant=tenant, options=OPTIONS) as client:
        yield client


def session_of(client: ChatTicketClient) -> str:
    request = CreateChatSessionRequest(session=r.ChatSession(id=an_id()))
    return client.sessions.CreateChatSession(request).session.id


def message_in(session_id: str, content: str = "hello") -> CreateChatMessageRequest:
    message = r.ChatMessage(id=an_id(), role=r.CHAT_MESSAGE_ROLE_USER, content=content)
    return CreateChatMessageRequest(session_id=session_id, message=message)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def readers() -> int:
    return sum(thread.name == READER for thread in threading.enumerate())


def test_call_has_the_metadata_and_status_of_grpc(client: ChatTicketClient) -> None:
    """As a response with its call, and as a future, whose errors are typed too."""
    request = ListChatSessionsRequest()
    response, call = client.sessions.ListChatSessions.with_call(request)
    assert not response.sessions
    assert call.code() is grpc.StatusCode.OK
    assert not client.sessions.ListChatSessions.future(request).result(10).sessions

    absent = client.sessions.GetChatSession.future(GetChatSessionRequest(session_id=an_id()))
    with pytest.raises(errors.NotFoundError, match="CHAT_SESSION_NOT_FOUND"):
        absent.result(10)
    assert isinstance(absent.exception(), errors.NotFoundError)
    with pytest.raises(errors.NotFoundError):
        client.sessions.GetChatSession.with_call(GetChatSessionRequest(session_id=an_id()))


def test_future_does_not_wait(tenant: str) -> None:
    """Nor for a server that does not answer."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        ChatTicketClient(
            f"127.0.0.1:{silent.getsockname()[1]}", tenant=tenant, timeout=30
        ) as client,
    ):
        start = time.monotonic()
        future = client.sessions.ListChatSessions.future(ListChatSessionsRequest())
        assert time.monotonic() - start < 5
        assert future.cancel()


def test_call_without_its_token_has_the_methods_of_grpc(target: str) -> None:
    """What looks at calls, such as a wrapper that logs them, looks at those that failed too."""

    def token() -> str:
        raise LookupError("no token")

    with ChatTicketClient(target, token=token) as client:
        future: Any = client.sessions.GetChatSession.future(GetChatSessionRequest())  # type: ignore[attr-defined]
        stream: Any = client.messages.ListChatMessages(ListChatMessagesRequest())
        for call in (future, stream):
            assert (call.code(), call.details()) == (grpc.StatusCode.INTERNAL, "no token")
            assert (call.is_active(), call.add_callback(print), call.cancel()) == (False,) * 3
            assert call.initial_metadata() is call.trailing_metadata() is None
            assert call.time_remaining() is None
            assert call.traceback() is call.exception().__traceback__ is not None


def test_stream_can_be_cancelled(client: ChatTicketClient) -> None:
    """Like any gRPC call, and its error is the cancellation."""
    session_id = session_of(client)
    for _ in range(3):
        client.messages.CreateChatMessage(message_in(session_id))
    call = client.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    assert sum(len(batch.messages) for batch in call) == 3
    assert call.code() is grpc.StatusCode.OK
    call = client.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    call.cancel()
    with pytest.raises(errors.CallCancelledError):
        list(call)


def test_threads_share_a_client(client: ChatTicketClient) -> None:
    """Calls, retries and watches at the same time."""
    session_id = session_of(client)

    def watch() -> list[str]:
        contents = []
        for event in client.watch(session_id):
            contents += [message.content for message in event.messages_created.messages]
            if len(contents) == 80:
                break
        return contents

    def write(writer: int) -> None:
        for number in range(10):
            request = message_in(session_id, f"{writer} {number}")
            client.retry(client.messages.CreateChatMessage, request)

    with ThreadPoolExecutor(12) as threads:
        watches = [threads.submit(watch) for _ in range(4)]
        wait([threads.submit(write, writer) for writer in range(8)], timeout=30)
        first, *others = [each.result(timeout=30) for each in watches]
    assert sorted(first) == sorted(
        f"{writer} {number}" for writer in range(8) for number in range(10)
    )
    assert others == [first] * 3
    until(lambda: readers() == 0)


def test_silence_resumes_the_watch(
    database: str, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After `silence_seconds`, and not before; a reader that takes its time is not silence."""
    caplog.set_level("INFO", "chat_ticket.client")
    settings = {**SETTINGS, "CHAT_TICKET_WATCH_HEARTBEAT_SECONDS": "60"}
    with (
        server_process(database, **settings) as server,
        contextlib.ExitStack() as stack,
    ):
        server.wait_for("serving")
        client = stack.enter_context(
            ChatTicketClient(server.address, tenant=tenant, options=OPTIONS)
        )
        session_id = session_of(client)
        events = client.watch(session_id, silence_seconds=0.6)
        assert next(events).WhichOneof("event") == "session"
        time.sleep(1)
        assert next(events).WhichOneof("event") == "caught_up"
        assert not caplog.records
        with ThreadPoolExecutor(1) as threads:
            start = time.monotonic()
            waiting = threads.submit(next, events)
            until(lambda: bool(caplog.records))
            assert 0.6 <= time.monotonic() - start < 3
            client.messages.CreateChatMessage(message_in(session_id, "after it"))
            [message] = waiting.result(timeout=20).messages_created.messages
        assert message.content == "after it"
        events.close()
    assert re.search(r"resumes after revision 0 in [\d.]+ s: no response for 0.6 s", caplog.text)


def test_calls_do_not_wait_behind_watches(client: ChatTicketClient) -> None:
    """More of them than a connection has streams."""
    session_ids = [session_of(client) for _ in range(3)]
    with contextlib.ExitStack() as stack:
        for number in range(220):
            watch = client.watch(session_ids[number % 3])
            events = stack.enter_context(contextlib.closing(watch))
            assert next(events).WhichOneof("event") == "session"
        session_of(client)


def test_silence_is_noticed_although_the_read_does_not_end(
    tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC does not always wake who reads a call that is cancelled."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        ChatTicketClient(f"127.0.0.1:{silent.getsockname()[1]}", tenant=tenant) as client,
    ):
        call: Any = client.sessions.WatchChatSession(WatchChatSessionRequest(session_id=an_id()))
        monkeypatch.setattr(call, "cancel", lambda: None)
        reader: ResponseReader[object] = ResponseReader(call, 0.2)
        with pytest.raises(TimeoutError):
            reader.read()
        reader.cancel()
    until(lambda: readers() == 0)


def test_leaving_the_loop_ends_the_thread_that_reads(client: ChatTicketClient) -> None:
    """And an iterator that is dropped unread starts none."""
    session_id = session_of(client)
    client.watch(session_id)
    for event in client.watch(session_id):
        assert readers() == 1
        if event.WhichOneof("event") == "caught_up":
            break
    until(lambda: readers() == 0)


def test_closing_the_client_ends_a_watch_in_another_thread(target: str, tenant: str) -> None:
    """By CallCancelledError, and at once."""
    client = ChatTicketClient(target, tenant=tenant, options=OPTIONS)
    session_id = session_of(client)
    caught_up = threading.Event()

    def watch() -> None:
        for event in client.watch(session_id):
            if event.WhichOneof("event") == "caught_up":
                caught_up.set()

    with ThreadPoolExecutor(1) as threads:
        watching = threads.submit(watch)
        assert caught_up.wait(10)
        client.close()
        with pytest.raises(errors.CallCancelledError, match="the client is closed"):
            watching.result(timeout=20)


def test_first_call_of_a_closed_client_raises() -> None:
    """In a process of its own: gRPC crashed it for a method that was not called before."""
    program = """
from chat_ticket.client import ChatTicketClient
from chat_ticket.errors import CallCancelledError
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest
client = ChatTicketClient("127.0.0.1:1", tenant="acme")
client.close()
for call in (
    lambda: client.sessions.GetChatSession(GetChatSessionRequest(session_id="x")),
    lambda: list(client.watch("x")),
):
    try:
        call()
    except (ValueError, CallCancelledError):
        print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=False, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (0, "refused\nrefused\n"), done.stderr


def test_retry_gives_up_in_time(tenant: str) -> None:
    """By the error of the last attempt, which may not have had the time to fail by itself."""
    with ChatTicketClient(f"127.0.0.1:{free_port()}", tenant=tenant, options=OPTIONS) as client:
        start = time.monotonic()
        request = DeleteChatSessionRequest(session_id=an_id())
        with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)):
            client.retry(client.sessions.DeleteChatSession, request, timeout=0.5)
        assert time.monotonic() - start < 5


def test_both_clients_have_the_same_surface() -> None:
    """The same public names, parameters and defaults. `write` takes asyncio."""

    def surface(client_class: Any) -> dict[str, Any]:
        return {
            name: [
                (parameter.name, parameter.kind, parameter.default)
                for parameter in inspect.signature(member).parameters.values()
            ]
            for name, member in vars(client_class).items()
            if callable(member) and (name == "__init__" or not name.startswith("_"))
        }

    expected = surface(AsyncChatTicketClient)
    del expected["write"]
    assert surface(ChatTicketClient) == expected
    assert ChatTicketClient.__annotations__.keys() == AsyncChatTicketClient.__annotations__.keys()
