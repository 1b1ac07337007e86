"""The exceptions of the Python client, and the calls that it retries."""

import asyncio
import contextlib
import pickle
import re
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from support.client import a_file, an_id
from support.client_calls import NewClient, create_message, create_session_id, only_asyncio
from support.client_servers import free_port
from support.server import serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient, channel_options
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import CreateChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    ListChatMessagesRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    UpdateChatSessionRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateChatTicketRequest,
    CreateTicketRequest,
    UpdateTicketRequest,
)
from chat_ticket_svc.server import Server


class TestErrors:
    async def test_violations_are_all_there(self, client: AsyncChatTicketClient) -> None:
        """Each with its field."""
        request = CreateChatSessionRequest(session=r.ChatSession(id="x", status=77))  # type: ignore[arg-type]
        with pytest.raises(errors.InvalidArgumentError) as caught:
            await client.sessions.CreateChatSession(request)
        error = caught.value
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert error.reason == "INVALID_ARGUMENT"
        assert {violation.field for violation in error.violations} == {
            "session.id",
            "session.status",
        }
        assert error.message in str(error)
        assert error.retry_seconds is None
        assert isinstance(error.__cause__, grpc.RpcError)

    async def test_every_status_has_its_exception(self, client: AsyncChatTicketClient) -> None:
        """With the reason of docs/reference/errors.md."""
        session_id, sessions, tickets = (
            await create_session_id(client),
            client.sessions,
            client.tickets,
        )
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

    async def test_errors_of_grpc_itself_have_no_reason(
        self, client_class: type[AsyncChatTicketClient]
    ) -> None:
        """For example of a server that accepts the connection and does not answer."""
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
        quotas = {"tenant_calls_per_second": 0.1, "tenant_burst": 3}
        async with serving(database, quotas=quotas) as server:
            client = connect(server.port)
            session_id = await create_session_id(client)
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

    def test_details_of_other_types_are_available(self) -> None:
        """As the Any that carried them. Details that cannot be parsed are dropped."""
        timestamp = any_pb2.Any()
        timestamp.Pack(Timestamp(seconds=7))
        broken = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
        status = status_pb2.Status(code=5, message="gone", details=[timestamp, broken])
        for data, details in [
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
            assert found.details == details
            copy = pickle.loads(pickle.dumps(found))
            assert (type(copy), copy.details) == (errors.NotFoundError, details)

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
            await create_session_id(connect(free_port()))
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
            await create_session_id(client, id="x")
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
    async def test_call_has_the_metadata_and_status_of_grpc(
        self, client: AsyncChatTicketClient
    ) -> None:
        """The stubs are gRPC's: a call has its status and metadata, and takes more metadata."""
        request = ListChatSessionsRequest()
        call = client.sessions.ListChatSessions(request, metadata=[("x-other", "1")])  # type: ignore[arg-type]
        assert not (await call).sessions
        assert await call.code() is grpc.StatusCode.OK

    @only_asyncio
    async def test_cancelled_task_ends_its_call(self, client: AsyncChatTicketClient) -> None:
        """By asyncio.CancelledError, which is no error of a call."""
        session_id = await create_session_id(client)
        for _ in range(20):
            task = asyncio.create_task(create_message(client, session_id))
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
    async def test_retry_continues_until_the_server_is_up(
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

    async def test_retry_stops_at_its_timeout_with_the_last_error(self, connect: NewClient) -> None:
        """By the last error: what refused the attempt, or that it was cut off by the timeout."""
        client = connect(free_port())
        request = DeleteChatSessionRequest(session_id=an_id())
        with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)):
            await client.retry(client.sessions.DeleteChatSession, request, timeout=0.5)

    async def test_retry_ends_in_time_when_nothing_answers(self, connect: NewClient) -> None:
        """Each attempt is bounded by what is left, whoever makes the call."""
        with socket.create_server(("127.0.0.1", 0)) as silent:
            client = connect(silent.getsockname()[1], timeout=60)
            async with asyncio.timeout(20):
                for method in (
                    client.sessions.ListChatSessions,
                    lambda request: client.sessions.ListChatSessions(request),
                ):
                    with pytest.raises(errors.DeadlineExceededError):
                        await client.retry(method, ListChatSessionsRequest(), timeout=0.5)

    async def test_first_failure_is_logged_at_once(
        self, connect: NewClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Once, and not each attempt."""
        client = connect(free_port())
        with pytest.raises(errors.UnavailableError):
            await client.retry(
                client.sessions.DeleteChatSession,
                DeleteChatSessionRequest(session_id=an_id()),
                timeout=1,
            )
        [record] = [record for record in caplog.records if record.name == "chat_ticket.client"]
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith("DeleteChatSession: attempt 1 failed, retrying for 1")
        assert "UNAVAILABLE" in record.getMessage()

    @pytest.mark.parametrize(
        ("request_", "field"),
        [
            (CreateChatSessionRequest(), "session.id"),
            (CreateChatMessageRequest(message=r.ChatMessage(content="hello")), "message.id"),
            (
                BatchCreateChatMessagesRequest(
                    messages=[r.ChatMessage(id=an_id()), r.ChatMessage()]
                ),
                "messages[1].id",
            ),
            (CreateChatAttachmentRequest(attachment=a_file()), "attachment.id"),
            (CreateChatTicketRequest(ticket_id=an_id()), "chat_ticket_id"),
            (CreateChatTicketRequest(ticket=r.Ticket(title="help")), "chat_ticket_id"),
            (CreateTicketRequest(ticket=r.Ticket(title="help")), "ticket.id"),
            (UpdateChatSessionRequest(session=r.ChatSession(etag="7")), "session.etag"),
            (UpdateChatMessageRequest(message=r.ChatMessage(etag="7")), "message.etag"),
            (UpdateTicketRequest(ticket=r.Ticket(etag="7")), "ticket.etag"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    async def test_what_is_not_safe_to_repeat_is_not_sent(
        self, connect: NewClient, request_: Any, field: str
    ) -> None:
        """A create without ids could create twice; an etag could only mismatch after a success."""

        def sent(_: Any) -> Awaitable[Any]:
            pytest.fail("sent")

        with pytest.raises(ValueError, match=f"^{re.escape(field)}: "):
            await connect(free_port()).retry(sent, request_)

    async def test_conditional_writes_that_find_themselves_are_repeated(
        self, client: AsyncChatTicketClient
    ) -> None:
        """Their first attempt succeeds here, and its answer is lost."""
        session_id, message_id, link_id = an_id(), an_id(), an_id()
        session = r.ChatSession(id=session_id)
        await client.sessions.CreateChatSession(CreateChatSessionRequest(session=session))

        async def retry(method: Callable[[Any], Awaitable[Any]], request: Any) -> Any:
            answers = []

            async def lose_first(request: Any) -> Any:
                answers.append(await method(request))
                if len(answers) == 1:
                    raise errors.UnavailableError(grpc.StatusCode.UNAVAILABLE, "lost")
                return answers[-1]

            answer = await client.retry(lose_first, request)
            assert answers == [answer] * 2
            return answer

        message = r.ChatMessage(id=message_id, role=r.CHAT_MESSAGE_ROLE_USER, content="hello")
        create = CreateChatMessageRequest(
            session_id=session_id, message=message, expected_revision=0
        )
        created = await retry(client.messages.CreateChatMessage, create)
        assert created.message.sequence == 1
        merge = UpdateChatMessageRequest(
            message=r.ChatMessage(id=message_id),
            metadata_merge_json='{"rating": 5}',
            expected_revision=1,
        )
        merged = await retry(client.messages.UpdateChatMessage, merge)
        assert merged.message.revision == 2
        link = CreateChatTicketRequest(
            session_id=session_id,
            chat_ticket_id=link_id,
            ticket=r.Ticket(title="help"),
            expected_revision=2,
        )
        assert (await retry(client.tickets.CreateChatTicket, link)).chat_ticket.id == link_id

    async def test_permanent_errors_are_not_retried(self, client: AsyncChatTicketClient) -> None:
        """A permanent error is raised at once."""
        calls = 0

        def counted(request: GetChatSessionRequest) -> Awaitable[Any]:
            nonlocal calls
            calls += 1
            return client.sessions.GetChatSession(request)

        with pytest.raises(errors.NotFoundError):
            await client.retry(counted, GetChatSessionRequest(session_id=an_id()))
        assert calls == 1

    async def test_quota_is_waited_for(
        self, database: str, connect: NewClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As long as the server asks for."""
        monkeypatch.setattr("chat_ticket_svc.access.quotas.MAX_WAIT_SECONDS", 0)
        quotas = {"tenant_calls_per_second": 20, "tenant_burst": 1}
        async with serving(database, quotas=quotas) as server:
            client = connect(server.port)
            request = ListChatSessionsRequest()
            await asyncio.gather(
                *(client.retry(client.sessions.ListChatSessions, request) for _ in range(10))
            )
