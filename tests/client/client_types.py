"""What the types of chat_ticket.client say to who uses it; read by mypy (make typecheck), not run.

A mistake that is not found makes its `type: ignore` an unused one, which is an error.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import assert_type

from chat_ticket.client import AsyncChatTicketClient, ChatTicketClient
from chat_ticket.errors import ChatTicketError, Resource, Violation
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, ListChatMessagesResponse
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    CreateChatSessionResponse,
    GetChatSessionRequest,
    GetChatSessionResponse,
    WatchChatSessionResponse,
    WatchChatSessionsResponse,
)
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_ROLE_USER,
    CHAT_SESSION_STATUS_ACTIVE,
    ChatMessage,
)


async def token() -> str:
    return ""


async def numbers() -> AsyncIterator[int]:
    yield 1


async def right(client: AsyncChatTicketClient, error: ChatTicketError) -> None:
    AsyncChatTicketClient("localhost:50051", token=token)
    got = await client.sessions.GetChatSession(GetChatSessionRequest())
    assert_type(got, GetChatSessionResponse)
    request = CreateChatSessionRequest()
    created = await client.retry(client.sessions.CreateChatSession, request)
    assert_type(created, CreateChatSessionResponse)
    async for batch in client.messages.ListChatMessages(ListChatMessagesRequest()):
        assert_type(batch, ListChatMessagesResponse)
    events = client.watch("id", 7)
    assert_type(events, AsyncGenerator[WatchChatSessionResponse, None])
    async for event in events:
        assert event.WhichOneof("event") != "messages_created"
    responses = client.follow_sessions(statuses=[CHAT_SESSION_STATUS_ACTIVE], labels={"a": "b"})
    assert_type(responses, AsyncGenerator[WatchChatSessionsResponse, None])
    async with client.write("id", role=CHAT_MESSAGE_ROLE_USER, exclusive=True) as draft:
        async for number in draft.until_stopped(numbers()):
            assert_type(number, int)
        assert_type(await draft.finish(metadata={"tokens": 3}), ChatMessage | None)
    assert_type(error.violations, tuple[Violation, ...])
    assert_type(error.resource, Resource | None)
    assert_type(error.retry_seconds, float | None)


async def wrong(client: AsyncChatTicketClient, error: ChatTicketError) -> None:
    AsyncChatTicketClient("localhost:50051", token=7)  # type: ignore[arg-type]
    AsyncChatTicketClient("localhost:50051", tennant="acme")  # type: ignore[call-arg]
    await client.sessions.GetChatSession(CreateChatSessionRequest())  # type: ignore[arg-type]
    _ = (await client.sessions.GetChatSession(GetChatSessionRequest())).sesion  # type: ignore[attr-defined]
    _ = client.sessions.GetChatSesion  # type: ignore[attr-defined]
    _ = client.sessions.GetChatSession(GetChatSessionRequest()).session  # type: ignore[attr-defined]
    request = GetChatSessionRequest()
    await client.retry(client.sessions.CreateChatSession, request)  # type: ignore[arg-type]
    await client.watch("id")  # type: ignore[misc]
    async for event in client.watch("id", "7"):  # type: ignore[arg-type]
        assert event.WhichOneof("event") != "mesages_created"  # type: ignore[comparison-overlap]
    client.follow_sessions(statuses=["ACTIVE"])  # type: ignore[list-item]
    client.write("id", role="user")  # type: ignore[arg-type]
    _ = error.reasons  # type: ignore[attr-defined]


def right_without_asyncio(client: ChatTicketClient) -> None:
    ChatTicketClient("localhost:50051", token=lambda: "")
    got = client.sessions.GetChatSession(GetChatSessionRequest())
    assert_type(got, GetChatSessionResponse)
    created = client.retry(client.sessions.CreateChatSession, CreateChatSessionRequest())
    assert_type(created, CreateChatSessionResponse)
    for batch in client.messages.ListChatMessages(ListChatMessagesRequest()):
        assert_type(batch, ListChatMessagesResponse)
    _ = client.write  # type: ignore[attr-defined]
    events = client.watch("id", 7, include_drafts=True)
    assert_type(events, Generator[WatchChatSessionResponse, None, None])
    responses = client.follow_sessions("cursor", has_ticket=True)
    assert_type(responses, Generator[WatchChatSessionsResponse, None, None])


def wrong_without_asyncio(client: ChatTicketClient) -> None:
    ChatTicketClient("localhost:50051", token=token)  # type: ignore[arg-type]
    client.sessions.GetChatSession(CreateChatSessionRequest())  # type: ignore[arg-type]
    _ = client.sessions.GetChatSession(GetChatSessionRequest()).sesion  # type: ignore[attr-defined]
    request = GetChatSessionRequest()
    client.retry(client.sessions.CreateChatSession, request)  # type: ignore[arg-type]
    client.watch("id", "7")  # type: ignore[arg-type]
