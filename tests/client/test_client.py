"""chat_ticket.client: the same tests for the asyncio client and for the synchronous one."""

import ast
import asyncio
import contextlib
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import any_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from support.authority import Authority, Key
from support.client import an_id
from support.client_servers import OPTIONS, free_port
from support.server import serving
from support.threaded import ThreadedClient

import chat_ticket
from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, channel_options
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    ListChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    UpdateChatSessionRequest,
    WatchChatSessionResponse,
)
from chat_ticket.v1.chat_ticket_pb2 import CreateChatTicketRequest
from chat_ticket_svc.server import Server

ROOT = Path(__file__).parents[2]
KEY = Key()

NewClient = Callable[..., AsyncChatTicketClient]

# A test of what only tasks can do, such as to be cancelled.
only_asyncio = pytest.mark.parametrize("client_class", [AsyncChatTicketClient], indirect=True)


@pytest.fixture(
    params=[AsyncChatTicketClient, ThreadedClient], ids=lambda client_class: client_class.__name__
)
def client_class(request: pytest.FixtureRequest) -> type[AsyncChatTicketClient]:
    """The asyncio client, or the synchronous one in threads, which looks the same."""
    return request.param  # type: ignore[no-any-return]


@pytest_asyncio.fixture
async def connect(
    client_class: type[AsyncChatTicketClient], tenant: str
) -> AsyncIterator[NewClient]:
    """`connect(port, …)`: a client of a server on this machine, for the test's tenant."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(port: int, **arguments: Any) -> AsyncChatTicketClient:
            arguments = {"tenant": tenant, "options": OPTIONS, **arguments}
            client = client_class(f"localhost:{port}", **arguments)
            stack.push_async_callback(client.close)
            return client

        yield connect


@pytest_asyncio.fixture
async def client(server: Server, connect: NewClient) -> AsyncChatTicketClient:
    """A client of the worker's server."""
    return connect(server.port)


async def session_of(client: AsyncChatTicketClient, **fields: Any) -> str:
    request = CreateChatSessionRequest(session=r.ChatSession(**fields))
    return (await client.sessions.CreateChatSession(request)).session.id


async def say(client: AsyncChatTicketClient, session_id: str, content: str = "hello") -> None:
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content=content)
    request = CreateChatMessageRequest(session_id=session_id, message=message)
    await client.messages.CreateChatMessage(request)


async def watch_all(client: AsyncChatTicketClient, session_id: str) -> None:
    async for _ in client.watch(session_id):
        pass


def kind(event: WatchChatSessionResponse) -> str:
    return event.WhichOneof("event") or ""


def said(events: list[WatchChatSessionResponse]) -> list[str]:
    return [message.content for event in events for message in event.messages_created.messages]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.02)


class TestPackage:
    def test_needs_nothing_of_the_service(self) -> None:
        """Callers install grpcio and protobuf, and import no more than that."""
        program = """
import sys, grpc.aio
before = set(sys.modules)
import chat_ticket.client
added = sys.modules.keys() - before
print(*{name.split(".")[0] for name in added}, *{name for name in added if "google.rpc" in name})
"""
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60
        )
        names = set(done.stdout.split()) - sys.stdlib_module_names
        assert "chat_ticket" in names
        assert names <= {"chat_ticket", "google", "grpc"}
        assert "google.rpc" not in done.stdout

    def test_imports_nothing_of_the_service_later(self) -> None:
        """Nor within a function."""
        for path in Path(chat_ticket.__file__).parent.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Import) and "svc" in node.names[0].name)
                assert not (isinstance(node, ast.ImportFrom) and "svc" in (node.module or ""))

    def test_channel_has_the_service_config(self) -> None:
        """The reads of two servers of which one is killed are in test_client_resume.py."""
        path = ROOT / "protos/chat_ticket/v1/chat_ticket_grpc_service_config.json"
        assert dict(channel_options())["grpc.service_config"] == path.read_text()

    async def test_has_to_be_made_in_an_event_loop(self) -> None:
        """Said at once: gRPC would take another loop, in which no call ends."""
        with pytest.raises(RuntimeError, match="no running event loop"):
            await asyncio.to_thread(AsyncChatTicketClient, "localhost:1")


class TestErrors:
    async def test_violations_are_all_there(self, client: AsyncChatTicketClient) -> None:
        """Each with its field."""
        request = CreateChatSessionRequest(session=r.ChatSession(id="x", status=77))  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgumentError) as caught:
            await client.sessions.CreateChatSession(request)
        error = caught.value
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.reason == "INVALID_ARGUMENT"
        assert {each.field for each in error.violations} == {"session.id", "session.status"}
        assert error.message in str(error)
        assert error.retry_seconds is None
        assert isinstance(error.__cause__, grpc.RpcError)

    async def test_every_status_has_its_exception(self, client: AsyncChatTicketClient) -> None:
        """With the reason of docs/reference/errors.md."""
        session_id, sessions, tickets = await session_of(client), client.sessions, client.tickets
        escalate = CreateChatTicketRequest(session_id=session_id, ticket=r.Ticket(title="help"))
        await tickets.CreateChatTicket(escalate)
        changed = UpdateChatSessionRequest(session=r.ChatSession(id=session_id, etag="77"))
        changed.session.status = r.CHAT_SESSION_STATUS_RESOLVED
        changed.update_mask.paths.append("status")
        cases: list[tuple[Awaitable[Any], type[errors.ChatTicketError], str]] = [
            (
                sessions.GetChatSession(GetChatSessionRequest(session_id=an_id())),
                errors.NotFoundError,
                "CHAT_SESSION_NOT_FOUND",
            ),
            (
                tickets.CreateChatTicket(escalate),
                errors.AlreadyExistsError,
                "SESSION_HAS_TICKET",
            ),
            (
                sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session_id)),
                errors.FailedPreconditionError,
                "SESSION_HAS_ACTIVE_TICKET",
            ),
            (sessions.UpdateChatSession(changed), errors.AbortedError, "ETAG_MISMATCH"),
            (
                anext(client.watch(session_id, 77)),
                errors.OutOfRangeError,
                "REVISION_OUT_OF_RANGE",
            ),
            (anext(client.watch(an_id())), errors.NotFoundError, "CHAT_SESSION_NOT_FOUND"),
        ]
        for call, expected, reason in cases:
            with pytest.raises(expected) as caught:
                await call
            assert caught.value.reason == reason

    async def test_what_grpc_says_itself_has_no_reason(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """As of a server that takes the connection and does not answer."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            async with client_class(f"127.0.0.1:{port}", tenant="a", timeout=0.5) as client:
                with pytest.raises(errors.DeadlineExceededError) as late:
                    await client.sessions.GetChatSession(GetChatSessionRequest())
        assert late.value.reason == ""

    async def test_details_are_messages(self, client: AsyncChatTicketClient) -> None:
        """Of google.rpc, by their full names, and equal to those of googleapis-common-protos."""
        absent = an_id()
        with pytest.raises(errors.NotFoundError) as caught:
            await client.sessions.GetChatSession(GetChatSessionRequest(session_id=absent))
        kinds = {detail.DESCRIPTOR.full_name: detail for detail in caught.value.details}
        data = kinds["google.rpc.ResourceInfo"].SerializeToString()
        assert error_details_pb2.ResourceInfo.FromString(data).resource_name == absent
        assert "google.rpc.ErrorInfo" in kinds
        assert caught.value.resource == errors.Resource("chat_session", absent)

    async def test_preconditions_and_quotas_are_typed(
        self, database: str, connect: NewClient
    ) -> None:
        """Each with its subject."""
        quotas = {"tenant_calls_per_second": 1, "tenant_burst": 3}
        async with serving(database, quotas=quotas) as server:
            client = connect(server.port)
            session_id = await session_of(client)
            ticket = CreateChatTicketRequest(session_id=session_id, ticket=r.Ticket(title="help"))
            await client.tickets.CreateChatTicket(ticket)
            request = DeleteChatSessionRequest(session_id=session_id)
            with pytest.raises(errors.FailedPreconditionError) as refused:
                await client.sessions.DeleteChatSession(request)
            [precondition] = refused.value.preconditions
            assert precondition.type == "SESSION_HAS_ACTIVE_TICKET"
            assert precondition.subject
            assert precondition.description in refused.value.message
            calls = [client.sessions.ListChatSessions(ListChatSessionsRequest()) for _ in range(5)]
            with pytest.raises(errors.ResourceExhaustedError, match="QUOTA_EXCEEDED") as exhausted:
                await asyncio.gather(*calls)
            [quota] = exhausted.value.quotas
            assert quota.subject
            assert exhausted.value.retry_seconds

    def test_details_of_others_are_kept(self) -> None:
        """As the Any that they came in. What does not parse, or is of another status, is none."""
        timestamp = any_pb2.Any()
        timestamp.Pack(Timestamp(seconds=7))
        broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
        status = status_pb2.Status(code=5, message="gone", details=[timestamp, broken])
        for data, kept in [
            (status.SerializeToString(), (timestamp, broken)),
            (b"\xff", ()),
            (
                status_pb2.Status(code=6, message="gone", details=[timestamp]).SerializeToString(),
                (),
            ),
            (
                status_pb2.Status(code=5, message="lost", details=[timestamp]).SerializeToString(),
                (),
            ),
        ]:
            trailers = grpc.aio.Metadata(("grpc-status-details-bin", data))
            error = grpc.aio.AioRpcError(
                grpc.StatusCode.NOT_FOUND, grpc.aio.Metadata(), trailers, details="gone"
            )
            found = errors.from_rpc_error(error)
            assert found.details == kept
            copy = pickle.loads(pickle.dumps(found))
            assert (type(copy), copy.details) == (errors.NotFoundError, kept)

    async def test_streams_raise_them_too(self, client: AsyncChatTicketClient) -> None:
        """When they are read."""
        with pytest.raises(errors.NotFoundError):
            async for _ in client.messages.ListChatMessages(
                ListChatMessagesRequest(session_id=an_id())
            ):
                pass

    async def test_tenant_is_required(self, server: Server, connect: NewClient) -> None:
        """Without a credential that settles it."""
        with pytest.raises(errors.UnauthenticatedError, match="TENANT_REQUIRED"):
            await connect(server.port, tenant=None).sessions.ListChatSessions(
                ListChatSessionsRequest()
            )

    async def test_server_that_is_not_there(self, connect: NewClient) -> None:
        """UNAVAILABLE, within the deadline, from gRPC itself: without a reason."""
        with pytest.raises(errors.UnavailableError) as caught:
            await session_of(connect(free_port()))
        assert caught.value.reason == ""
        assert caught.value.details == ()

    async def test_calls_have_a_deadline(self, server: Server, connect: NewClient) -> None:
        """That of the client, or their own."""
        client, request = connect(server.port, timeout=0), ListChatSessionsRequest()
        with pytest.raises(errors.DeadlineExceededError):
            await client.sessions.ListChatSessions(request)
        await client.sessions.ListChatSessions(request, timeout=10)

    async def test_survive_a_process(self, client: AsyncChatTicketClient) -> None:
        """As a worker pool, or a queue, sends them on."""
        with pytest.raises(errors.InvalidArgumentError) as caught:
            await session_of(client, id="x")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is errors.InvalidArgumentError
        assert str(copy) == str(caught.value)
        assert copy.violations == caught.value.violations
        assert copy.details == caught.value.details

    async def test_synchronous_stubs_have_them_too(self, server: Server) -> None:
        """By errors.from_rpc_error, on a channel with the same options."""

        def call() -> None:
            with grpc.insecure_channel(
                f"localhost:{server.port}", options=channel_options()
            ) as channel:
                stub = chat_session_pb2_grpc.ChatSessionServiceStub(channel)
                request = GetChatSessionRequest(session_id=an_id())
                try:
                    stub.GetChatSession(request, metadata=[("x-tenant-id", "acme")])
                except grpc.RpcError as error:
                    raise errors.from_rpc_error(error) from error

        with pytest.raises(errors.NotFoundError, match="CHAT_SESSION_NOT_FOUND"):
            await asyncio.to_thread(call)

    @only_asyncio
    async def test_call_keeps_what_grpc_says_of_it(self, client: AsyncChatTicketClient) -> None:
        """The stubs are gRPC's: a call has its status and metadata, and takes more metadata."""
        request = ListChatSessionsRequest()
        call = client.sessions.ListChatSessions(request, metadata=[("x-other", "1")])  # type: ignore[arg-type]
        assert not (await call).sessions
        assert await call.code() is grpc.StatusCode.OK

    @only_asyncio
    async def test_cancelled_task_ends_its_call(self, client: AsyncChatTicketClient) -> None:
        """By asyncio.CancelledError, which is no error of a call."""
        session_id = await session_of(client)
        for _ in range(20):
            task = asyncio.create_task(say(client, session_id))
            await asyncio.sleep(0.001)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        listing = client.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        task = asyncio.ensure_future(anext(aiter(listing)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


class TestRetry:
    async def test_goes_on_until_the_server_is_there(
        self, database: str, connect: NewClient
    ) -> None:
        """And the same id makes it one session."""
        port, session_id = free_port(), an_id()
        client = connect(port)
        request = CreateChatSessionRequest(session=r.ChatSession(id=session_id))
        creating = asyncio.create_task(client.retry(client.sessions.CreateChatSession, request))
        await asyncio.sleep(0.3)
        async with serving(database, port=port):
            assert (await creating).session.id == session_id
            again = await client.retry(client.sessions.CreateChatSession, request)
            assert again.session.revision == 0

    async def test_gives_up_in_time_and_says_why(self, connect: NewClient) -> None:
        """By the last error."""
        client = connect(free_port())
        with pytest.raises(errors.UnavailableError):
            await client.retry(
                client.sessions.CreateChatSession, CreateChatSessionRequest(), timeout=0.5
            )

    async def test_is_not_for_what_will_not_pass(self, client: AsyncChatTicketClient) -> None:
        """A refusal is told at once."""
        calls = 0

        def counted(request: GetChatSessionRequest) -> Awaitable[Any]:
            nonlocal calls
            calls += 1
            return client.sessions.GetChatSession(request)

        with pytest.raises(errors.NotFoundError):
            await client.retry(counted, GetChatSessionRequest(session_id=an_id()))
        assert calls == 1

    async def test_quota_is_waited_for(self, database: str, connect: NewClient) -> None:
        """As long as the server asks for."""
        quotas = {"tenant_calls_per_second": 20, "tenant_burst": 1}
        async with serving(database, quotas=quotas) as server:
            client = connect(server.port)
            request = ListChatSessionsRequest()
            await asyncio.gather(
                *(client.retry(client.sessions.ListChatSessions, request) for _ in range(10))
            )


@pytest_asyncio.fixture
async def guarded(database: str, tmp_path: Path) -> AsyncIterator[Server]:
    """A server that asks for tokens of KEY."""
    settings = {"auth": "jwt", **KEY.trusted(tmp_path)}
    async with serving(database, watch_heartbeat_seconds=0.2, **settings) as server:
        yield server


class TestToken:
    async def test_is_a_text_or_is_asked_for_each_call(
        self,
        guarded: Server,
        connect: NewClient,
        client_class: type[AsyncChatTicketClient],
        tenant: str,
    ) -> None:
        """Of a function, or of a coroutine function where there is an event loop."""
        asked = 0

        def fresh() -> str:
            nonlocal asked
            asked += 1
            return KEY.token(tenants=[tenant])

        async def waited() -> str:
            await asyncio.sleep(0)
            return fresh()

        tokens: list[Any] = [KEY.token(tenants=[tenant]), fresh]
        if client_class is AsyncChatTicketClient:
            tokens.append(waited)
        for token in tokens:
            client = connect(guarded.port, token=token, tenant=None)
            await say(client, await session_of(client))
        assert asked == 2 * (len(tokens) - 1)

    async def test_goes_with_the_credentials_of_the_channel(
        self, database: str, tmp_path: Path, connect: NewClient, tenant: str
    ) -> None:
        """Over TLS, to a server of the authority that they trust."""
        authority = Authority()
        certificate = authority.server().write(tmp_path / "tls")
        settings = {"auth": "jwt", **KEY.trusted(tmp_path), **certificate}
        async with serving(database, **settings) as server:
            token, trust = KEY.token(tenants=[tenant]), authority.trusted_by()
            client = connect(server.port, token=token, credentials=trust)
            await say(client, await session_of(client))
            stranger = connect(server.port, token=token, credentials=Authority().trusted_by())
            with pytest.raises(errors.UnavailableError):
                await session_of(stranger)

    async def test_what_its_function_raises_the_call_raises(
        self, guarded: Server, connect: NewClient
    ) -> None:
        """Nothing is sent without it."""

        def broken() -> str:
            raise LookupError("no token")

        with pytest.raises(LookupError):
            await session_of(connect(guarded.port, token=broken))

    async def test_is_not_sent_in_plain_text_to_other_machines(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """Not by any spelling of a target, of which one address elsewhere is enough."""
        for target in (
            "chat.example:443",
            "dns:///chat.example:443",
            "dns://127.0.0.1/chat.example",
            "10.0.0.1:50051",
            "ipv4:127.0.0.1:1,10.0.0.1:1",
            "localhost.example:50051",
            "[::2]:50051",
            "xds:///localhost",
        ):
            with pytest.raises(ValueError, match="plain text"):
                client_class(target, token="secret")
        for target in (
            "localhost:50051",
            "dns:///localhost:50051",
            "127.0.0.1:50051",
            "ipv4:127.0.0.1:1,127.0.0.2:1",
            "[::1]:50051",
            "ipv6:[::1]:50051",
            "unix:/run/chat.sock",
        ):
            await client_class(target, token="secret").close()
        secure = grpc.ssl_channel_credentials()
        await client_class("chat.example:443", token="secret", credentials=secure).close()

    async def test_must_be_one_that_grpc_sends(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """As the tenant: told at once, or by the call, and never shown; watch does not retry it.

        A file often has a line break at its end.
        """
        for bad in ({"token": "secret\n"}, {"tenant": "secret\n"}, {"tenant": "café"}):
            with pytest.raises(ValueError, match="not printable ASCII") as caught:
                client_class("localhost:1", **bad)  # type: ignore[arg-type]
            assert "secret" not in str(caught.value)
        async with client_class("localhost:1", token=lambda: "secret\n") as client:
            with pytest.raises(ValueError, match="token: not printable ASCII"):
                await client.sessions.GetChatSession(GetChatSessionRequest())
            with pytest.raises(ValueError, match="token: not printable ASCII"):
                await anext(client.watch(an_id()))

    async def test_that_expires_is_asked_for_again_by_watch(
        self, guarded: Server, connect: NewClient, tenant: str
    ) -> None:
        """And the stream goes on as if nothing had happened."""
        given: list[str] = []

        def fresh() -> str:
            given.append(KEY.token(tenants=[tenant], exp=int(time.time()) + 2))
            return given[-1]

        client = connect(guarded.port, token=fresh)
        session_id = await session_of(client)
        before, told = len(given), []
        async with asyncio.timeout(20):
            async for event in client.watch(session_id):
                told.append(event)
                if kind(event) == "caught_up":
                    await say(client, session_id, "one")
                    before = len(given)
                if len(given) > before + 1 and "two" not in said(told):
                    before = len(given) + 1_000
                    await say(client, session_id, "two")
                if "two" in said(told):
                    break
        assert [each for each in map(kind, told) if each != "heartbeat"] == [
            "session",
            "caught_up",
            "messages_created",
            "messages_created",
        ]
        assert said(told) == ["one", "two"]

    async def test_that_keeps_expiring_during_a_quiet_watch_is_renewed_each_time(
        self, database: str, connect: NewClient, tenant: str, tmp_path: Path
    ) -> None:
        """The server has accepted each of them, so their source works."""
        given: list[str] = []

        def short_lived() -> str:
            given.append(KEY.token(tenants=[tenant], exp=int(time.time()) + 1))
            return given[-1]

        settings = {"auth": "jwt", **KEY.trusted(tmp_path)}
        async with serving(database, watch_heartbeat_seconds=60, **settings) as server:
            writer = connect(server.port, token=KEY.token(tenants=[tenant]))
            session_id = await session_of(writer)
            watch = connect(server.port, token=short_lived).watch(session_id)
            async with asyncio.timeout(30):
                assert [kind(await anext(watch)), kind(await anext(watch))] == [
                    "session",
                    "caught_up",
                ]
                event = asyncio.ensure_future(anext(watch))
                while len(given) < 5 and not event.done():
                    await asyncio.sleep(0.02)
                await say(writer, session_id, "late")
                assert said([await event]) == ["late"]

    async def test_that_expires_and_is_a_text_ends_watch(
        self, guarded: Server, connect: NewClient, tenant: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        """At once: there is nobody to ask."""
        caplog.set_level("INFO", "chat_ticket.client")
        token = KEY.token(tenants=[tenant], exp=int(time.time()) + 2)
        client = connect(guarded.port, token=token)
        session_id = await session_of(client)
        with pytest.raises(errors.UnauthenticatedError, match="CREDENTIAL_EXPIRED"):
            await asyncio.wait_for(watch_all(client, session_id), 20)
        assert "again" not in caplog.text

    async def test_that_is_always_expired_ends_watch(
        self, guarded: Server, connect: NewClient
    ) -> None:
        """After a few times."""
        client = connect(guarded.port, token=lambda: KEY.token(exp=int(time.time()) - 5))
        with pytest.raises(errors.UnauthenticatedError):
            async with asyncio.timeout(30):
                await anext(client.watch(an_id()))


class TestWatch:
    async def test_leaving_the_loop_ends_the_stream(
        self, database: str, connect: NewClient
    ) -> None:
        """At the server, which wakes and remembers nobody who has left."""
        async with serving(database) as server:
            client = connect(server.port)
            session_id = await session_of(client)
            async for event in client.watch(session_id):
                if kind(event) == "caught_up":
                    assert server._watch_hub.watcher_count == 1
                    break
            await until(lambda: server._watch_hub.watcher_count == 0)

    @only_asyncio
    @pytest.mark.parametrize("waiting", [True, False])
    async def test_cancelling_the_task_ends_the_stream(
        self, database: str, connect: NewClient, waiting: bool
    ) -> None:
        """Whether it waits for an event or handles one."""

        async def watch() -> None:
            async for event in client.watch(session_id):
                if kind(event) == "caught_up":
                    caught_up.set()
                    if not waiting:
                        await asyncio.sleep(60)

        async with serving(database) as server:
            client, caught_up = connect(server.port), asyncio.Event()
            session_id = await session_of(client)
            task = asyncio.create_task(watch())
            await caught_up.wait()
            assert server._watch_hub.watcher_count == 1
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server._watch_hub.watcher_count == 0)

    @only_asyncio
    async def test_timeout_of_the_caller_is_its_own(self, client: AsyncChatTicketClient) -> None:
        """Not taken for silence."""
        session_id = await session_of(client)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(watch_all(client, session_id), 0.3)

    async def test_slow_consumer_loses_nothing(
        self, database: str, connect: NewClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The server ends a stream that nobody reads; the watch resumes."""
        caplog.set_level("INFO", "chat_ticket.client")
        async with serving(database, stream_write_timeout_seconds=0.3) as server:
            client = connect(server.port)
            session_id = await session_of(client)
            for number in range(10):  # more than gRPC keeps for who does not read
                batch = [
                    r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content=f"{number} {i} " * 700)
                    for i in range(200)
                ]
                request = BatchCreateChatMessagesRequest(session_id=session_id, messages=batch)
                await client.messages.BatchCreateChatMessages(request)
            sequences: list[int] = []
            kinds: list[str] = []
            async with asyncio.timeout(30):
                async for event in client.watch(session_id):
                    kinds.append(kind(event))
                    sequences += [m.sequence for m in event.messages_created.messages]
                    if len(kinds) == 1:
                        await asyncio.sleep(2)
                    if kind(event) == "caught_up":
                        break
        assert "SLOW_READER" in caplog.text
        assert sequences == list(range(1, 2001))
        assert kinds.count("session") == 1

    async def test_place_among_the_streams_is_waited_for(
        self, database: str, connect: NewClient
    ) -> None:
        """A refusal that the server says will pass is no end."""
        async with serving(database, quotas={"session_streams": 1}) as server:
            client = connect(server.port)
            session_id = await session_of(client)
            first = client.watch(session_id)
            await anext(first)
            second = asyncio.ensure_future(anext(client.watch(session_id)))
            await asyncio.sleep(0.5)
            assert not second.done()
            await first.aclose()
            async with asyncio.timeout(10):
                assert kind(await second) == "session"

    async def test_what_happened_meanwhile_is_told_once(
        self, database: str, connect: NewClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A change of status as the session, again; no second session or caught_up otherwise.

        And a server that drains is not asked again before the second that it asks for.
        """
        caplog.set_level("INFO", "chat_ticket.client")
        port, told = free_port(), []
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            session_id = await session_of(elsewhere)
            events = client.watch(session_id)

            async def hear(last: str) -> None:
                async with asyncio.timeout(20):
                    while not told or kind(told[-1]) != last:
                        told.append(await anext(events))

            async with serving(database, port=port):
                await hear("caught_up")
            change = UpdateChatSessionRequest(session=r.ChatSession(id=session_id))
            change.session.status = r.CHAT_SESSION_STATUS_RESOLVED
            change.update_mask.paths.append("status")
            await elsewhere.sessions.UpdateChatSession(change)
            await say(elsewhere, session_id)
            async with serving(database, port=port):
                await hear("messages_created")
            await elsewhere.sessions.DeleteChatSession(
                DeleteChatSessionRequest(session_id=session_id)
            )
            async with serving(database, port=port):
                await hear("session_deleted")
                with pytest.raises(StopAsyncIteration):
                    await anext(events)
        assert [kind(event) for event in told] == [
            "session",
            "caught_up",
            "session",
            "messages_created",
            "session_deleted",
        ]
        assert [event.revision for event in told] == [0, 0, 0, 2, 2]
        pauses = re.findall(r"in ([\d.]+) s: DRAINING", caplog.text)
        assert pauses
        assert all(float(pause) >= 1 for pause in pauses)

    async def test_position_moves_over_a_break(self, database: str, connect: NewClient) -> None:
        """By what does not show: the status went there and back. It is told as a heartbeat.

        At once, and not by the next heartbeat of the server.
        """
        port, told = free_port(), []
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            session_id = await session_of(elsewhere)
            events = client.watch(session_id)
            async with serving(database, port=port):
                told += [await anext(events), await anext(events)]
            for status in (r.CHAT_SESSION_STATUS_RESOLVED, r.CHAT_SESSION_STATUS_ACTIVE):
                change = UpdateChatSessionRequest(session=r.ChatSession(id=session_id))
                change.session.status = status
                change.update_mask.paths.append("status")
                await elsewhere.sessions.UpdateChatSession(change)
            async with serving(database, port=port), asyncio.timeout(10):
                told.append(await anext(events))
            await events.aclose()
        assert [kind(event) for event in told] == ["session", "caught_up", "heartbeat"]
        assert [event.revision for event in told] == [0, 0, 2]

    async def test_session_created_again_is_another_one(
        self, database: str, connect: NewClient
    ) -> None:
        """Which must not be; but when it is, the one that was watched is gone."""
        port, session_id = free_port(), an_id()
        async with serving(database) as other:
            client, elsewhere = connect(port), connect(other.port)
            await session_of(elsewhere, id=session_id)
            events = client.watch(session_id)
            async with serving(database, port=port):
                assert kind(await anext(events)) == "session"
                assert kind(await anext(events)) == "caught_up"
            request = DeleteChatSessionRequest(session_id=session_id)
            await elsewhere.sessions.DeleteChatSession(request)
            await session_of(elsewhere, id=session_id)
            async with serving(database, port=port), asyncio.timeout(20):
                assert kind(await anext(events)) == "session_deleted"

    async def test_closed_client_ends_it(self, database: str, connect: NewClient) -> None:
        """Soon, and not by going on for ever."""
        async with serving(database) as server:
            client = connect(server.port)
            session_id = await session_of(client)
            events = client.watch(session_id)
            await anext(events)
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.1)
            await client.close()
            async with asyncio.timeout(10):
                with pytest.raises((asyncio.CancelledError, grpc.aio.UsageError, ValueError)):
                    await waiting
