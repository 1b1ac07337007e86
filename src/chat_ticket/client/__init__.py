"""Clients of the chat ticket service: `AsyncChatTicketClient` for asyncio, and `ChatTicketClient`.

    async with AsyncChatTicketClient("localhost:50051", tenant="acme") as client:
        await client.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
        async for event in client.watch(session_id):
            ...

    with ChatTicketClient("localhost:50051", tenant="acme") as client:
        client.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
        for event in client.watch(session_id):
            ...

Both have the same methods and make the same promises; `write` alone is for asyncio only. Requests
and responses are the messages of `chat_ticket.v1`; the comments in its .proto files are the API
reference. Failed calls raise the exceptions of `chat_ticket.errors`.
"""

from chat_ticket.client._async import AsyncChatTicketClient
from chat_ticket.client._channel import channel_options
from chat_ticket.client._drafts import ChatDraftWriter
from chat_ticket.client._resume import ResumeState
from chat_ticket.client._retry import RETRYABLE_CODES, is_retryable
from chat_ticket.client._sync import ChatTicketClient

__all__ = [
    "RETRYABLE_CODES",
    "AsyncChatTicketClient",
    "ChatDraftWriter",
    "ChatTicketClient",
    "ResumeState",
    "channel_options",
    "is_retryable",
]
