"""A client for the tests: the stubs on a real channel, and how a refusal is looked at."""

import contextlib
import functools
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Self

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2_grpc

from chat_ticket.v1 import (
    chat_attachment_pb2_grpc,
    chat_draft_pb2_grpc,
    chat_message_pb2_grpc,
    chat_session_pb2_grpc,
    chat_ticket_pb2_grpc,
    resources_pb2,
)
from chat_ticket.v1.chat_attachment_pb2 import CreateChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import CreateChatTicketRequest

REQUEST_ID = "of-a-test"


class _Bound:
    """A stub whose every call carries the tenant, and a deadline that tests never meet."""

    def __init__(self, stub: Any, metadata: list[tuple[str, str]]):
        self._stub = stub
        self._metadata = metadata

    def __getattr__(self, name: str) -> Any:
        return functools.partial(getattr(self._stub, name), metadata=self._metadata, timeout=60)


class Api:
    """All services of a server, for one tenant; and short ways to make what tests are not about.

    Without a tenant the calls do not name one; with a token or credentials they carry those.
    """

    def __init__(
        self,
        address: str,
        tenant: str,
        *,
        token: str = "",
        credentials: grpc.ChannelCredentials | None = None,
        options: Sequence[tuple[str, Any]] = (),
    ):
        self.address = address
        self.tenant = tenant
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=options)
        # The same for all, so that answers can be compared: errors carry it.
        metadata = [("x-request-id", REQUEST_ID)]
        if tenant:
            metadata.append(("x-tenant-id", tenant))
        if token:
            metadata.append(("authorization", f"Bearer {token}"))
        self.sessions = _Bound(chat_session_pb2_grpc.ChatSessionServiceStub(self.channel), metadata)
        self.messages = _Bound(chat_message_pb2_grpc.ChatMessageServiceStub(self.channel), metadata)
        self.attachments = _Bound(
            chat_attachment_pb2_grpc.ChatAttachmentServiceStub(self.channel), metadata
        )
        self.drafts = _Bound(chat_draft_pb2_grpc.ChatDraftServiceStub(self.channel), metadata)
        self.tickets = _Bound(chat_ticket_pb2_grpc.ChatTicketServiceStub(self.channel), metadata)
        self.health = _Bound(health_pb2_grpc.HealthStub(self.channel), [])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def session(self, **fields: Any) -> resources_pb2.ChatSession:
        session = resources_pb2.ChatSession(**fields)
        response = await self.sessions.CreateChatSession(CreateChatSessionRequest(session=session))
        return response.session

    async def message(
        self,
        session_id: str,
        content: str = "hello",
        *,
        expected_revision: int | None = None,
        **fields: Any,
    ) -> resources_pb2.ChatMessage:
        fields.setdefault("role", resources_pb2.CHAT_MESSAGE_ROLE_USER)
        message = resources_pb2.ChatMessage(content=content, **fields)
        request = CreateChatMessageRequest(
            session_id=session_id, message=message, expected_revision=expected_revision
        )
        return (await self.messages.CreateChatMessage(request)).message

    async def attachment(self, message_id: str, **fields: Any) -> resources_pb2.ChatAttachment:
        request = CreateChatAttachmentRequest(message_id=message_id, attachment=a_file(**fields))
        return (await self.attachments.CreateChatAttachment(request)).attachment

    async def escalate(self, session_id: str, **fields: Any) -> resources_pb2.ChatTicket:
        if "ticket_id" not in fields:
            fields.setdefault("ticket", resources_pb2.Ticket(title="help"))
        request = CreateChatTicketRequest(session_id=session_id, **fields)
        return (await self.tickets.CreateChatTicket(request)).chat_ticket


def a_file(**fields: Any) -> resources_pb2.ChatAttachment:
    """An attachment with what it must have."""
    return resources_pb2.ChatAttachment(
        **{
            "file_url": "https://files.example/a.png",
            "file_name": "a.png",
            "file_type": "image/png",
            **fields,
        }
    )


def an_id() -> str:
    return str(uuid.uuid4())


class Refusal:
    """The status of a rejected call, with its details."""

    code: grpc.StatusCode
    text: str
    info: details_pb2.ErrorInfo

    def __init__(self) -> None:
        self.details: dict[str, Any] = {}

    def read(self, error: grpc.aio.AioRpcError) -> None:
        self.code = error.code()
        self.text = error.details() or ""
        status = status_pb2.Status()
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                status.ParseFromString(value)
        for packed in status.details:
            kind = getattr(details_pb2, packed.TypeName().rpartition(".")[2])
            message = kind()
            packed.Unpack(message)
            self.details[kind.__name__] = message
        assert status.code == self.code.value[0], "the rich status is that of the call"
        self.info = self.details["ErrorInfo"]
        assert self.info.domain == "chat-ticket-svc"

    @property
    def fields(self) -> dict[str, str]:
        """The description of each violated field."""
        bad_request = self.details.get("BadRequest", details_pb2.BadRequest())
        return {v.field: v.description for v in bad_request.field_violations}


@contextlib.contextmanager
def refused(code: grpc.StatusCode, reason: str | None = None) -> Iterator[Refusal]:
    """Expects the call inside to be rejected, with this status and reason."""
    refusal = Refusal()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield refusal
    assert caught.value.code() is code, f"{caught.value.code()}: {caught.value.details()}"
    refusal.read(caught.value)
    if reason is not None:
        assert refusal.info.reason == reason
