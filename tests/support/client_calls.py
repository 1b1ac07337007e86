"""Short calls by the Python client."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    WatchChatSessionResponse,
)

NewClient = Callable[..., AsyncChatTicketClient]


# A test of what only tasks can do, such as to be cancelled.
only_asyncio = pytest.mark.parametrize("client_class", [AsyncChatTicketClient], indirect=True)


async def create_session_id(client: AsyncChatTicketClient, **fields: Any) -> str:
    request = CreateChatSessionRequest(session=r.ChatSession(**fields))
    return (await client.sessions.CreateChatSession(request)).session.id


async def create_message(
    client: AsyncChatTicketClient, session_id: str, content: str = "hello"
) -> None:
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content=content)
    request = CreateChatMessageRequest(session_id=session_id, message=message)
    await client.messages.CreateChatMessage(request)


async def watch_all(client: AsyncChatTicketClient, session_id: str) -> None:
    async for _ in client.watch(session_id):
        pass


def event_kind(event: WatchChatSessionResponse) -> str:
    return event.WhichOneof("event") or ""


def contents_of(events: list[WatchChatSessionResponse]) -> list[str]:
    return [message.content for event in events for message in event.messages_created.messages]


async def until(condition: Callable[[], bool], timeout: float = 10) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.02)
