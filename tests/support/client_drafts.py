"""What a client of the tests sees of a session with drafts."""

import asyncio
from typing import Any

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_draft_pb2 import ListChatDraftsRequest
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest


async def messages_in(client: AsyncChatTicketClient, session_id: str) -> list[r.ChatMessage]:
    request = ListChatMessagesRequest(session_id=session_id)
    batches = client.messages.ListChatMessages(request)
    return [message async for batch in batches for message in batch.messages]


async def outcomes_in(client: AsyncChatTicketClient, session_id: str) -> list[tuple[str, Any]]:
    """The content and the state of each message."""
    return [(message.content, message.state) for message in await messages_in(client, session_id)]


async def drafts_in(client: AsyncChatTicketClient, session_id: str) -> list[str]:
    """The durable content of the open drafts."""
    response = await client.drafts.ListChatDrafts(ListChatDraftsRequest(session_id=session_id))
    return [draft.content for draft in response.drafts]


async def content_becomes(client: AsyncChatTicketClient, session_id: str, content: str) -> None:
    async with asyncio.timeout(10):
        while await drafts_in(client, session_id) != [content]:
            await asyncio.sleep(0.02)
