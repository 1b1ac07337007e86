"""A support chat from its first message to its ticket, by the Python client.

Start the service by `make run`, and then, in another terminal:

    .venv/bin/python examples/python/support_chat.py [ADDRESS]

ADDRESS is localhost:50051 by default. A program of your own needs the package chat-ticket-client:

    .venv/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist clients/python
    pip install dist/chat_ticket_client-0.1.0-py3-none-any.whl

To check its types, it also needs types-grpcio and types-protobuf.
"""

import asyncio
import json
import sys
import uuid

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.errors import FailedPreconditionError, InvalidArgumentError
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    DeleteChatSessionRequest,
    UpdateChatSessionRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import CreateChatTicketRequest, UpdateTicketRequest
from chat_ticket.v1.resources_pb2 import (
    CHAT_MESSAGE_ROLE_ASSISTANT,
    CHAT_MESSAGE_ROLE_USER,
    CHAT_SESSION_STATUS_RESOLVED,
    TICKET_STATUS_SOLVED,
    ChatMessage,
    ChatMessageRole,
    ChatSession,
    ChatSessionStatus,
    ChatTicket,
    Ticket,
)


def new_id() -> str:
    """The id of a new resource. A create that sets its id can safely be retried."""
    return str(uuid.uuid4())


async def create_session(client: AsyncChatTicketClient) -> str:
    session = ChatSession(id=new_id())
    request = CreateChatSessionRequest(session=session)
    await client.retry(client.sessions.CreateChatSession, request)
    print("created a session")
    return session.id


async def say(
    client: AsyncChatTicketClient,
    session_id: str,
    role: "ChatMessageRole.ValueType",
    content: str,
    metadata: object = None,
) -> None:
    # The id is chosen once, before the first attempt. Retries create no second message.
    message = ChatMessage(id=new_id(), role=role, content=content)
    if metadata is not None:
        message.metadata_json = json.dumps(metadata)
    request = CreateChatMessageRequest(session_id=session_id, message=message)
    await client.retry(client.messages.CreateChatMessage, request)


async def history(client: AsyncChatTicketClient, session_id: str) -> list[ChatMessage]:
    async def read(request: ListChatMessagesRequest) -> list[ChatMessage]:
        batches = client.messages.ListChatMessages(request)
        return [message async for batch in batches for message in batch.messages]

    return await client.retry(read, ListChatMessagesRequest(session_id=session_id))


async def watch(client: AsyncChatTicketClient, session_id: str) -> None:
    """Print what happens until the session is resolved.

    The stream resumes by itself when the server restarts. To resume after a restart of this
    program, store event.revision after each handled event, and pass it to client.watch().
    """
    end: int | None = None
    async for event in client.watch(session_id):
        match event.WhichOneof("event"):
            case "session":
                status = ChatSessionStatus.Name(event.session.status)
                print(f"  [watch] {status}, has ticket: {event.session.has_ticket}")
                if event.session.status == CHAT_SESSION_STATUS_RESOLVED:
                    # The session may be ahead of the events that lead to it.
                    end = event.session.revision
            case "messages_created":
                for message in event.messages_created.messages:
                    print(f"  [watch] message {message.sequence}: {message.content}")
            case "message_updated":
                print(f"  [watch] message {event.message_updated.sequence} has changed")
            case "message_deleted":
                print(f"  [watch] message {event.message_deleted.message_id} is gone")
            case "session_deleted":
                print("  [watch] the session is gone")
            case "caught_up" | "heartbeat" | None:
                pass
        if end is not None and event.revision >= end:
            return


async def escalate(client: AsyncChatTicketClient, session_id: str) -> ChatTicket:
    request = CreateChatTicketRequest(
        session_id=session_id,
        chat_ticket_id=new_id(),
        ticket=Ticket(id=new_id(), title="Where is my order?"),
    )
    chat_ticket = (await client.retry(client.tickets.CreateChatTicket, request)).chat_ticket
    print(f"opened the ticket {chat_ticket.ticket.title!r}")
    return chat_ticket


async def be_refused(client: AsyncChatTicketClient, session_id: str) -> None:
    try:
        await say(client, session_id, CHAT_MESSAGE_ROLE_USER, "", metadata=["not", "an", "object"])
    except InvalidArgumentError as error:
        print(f"refused: {error}")
        for violation in error.violations:
            print(f"  {violation.field}: {violation.description}")
    try:
        request = DeleteChatSessionRequest(session_id=session_id)
        await client.retry(client.sessions.DeleteChatSession, request)
    except FailedPreconditionError as error:
        print(f"refused: {error}")


async def resolve(client: AsyncChatTicketClient, session_id: str, ticket_id: str) -> None:
    solved = UpdateTicketRequest(ticket=Ticket(id=ticket_id, status=TICKET_STATUS_SOLVED))
    solved.update_mask.paths.append("status")
    await client.retry(client.tickets.UpdateTicket, solved)
    session = ChatSession(id=session_id, status=CHAT_SESSION_STATUS_RESOLVED)
    resolved = UpdateChatSessionRequest(session=session)
    resolved.update_mask.paths.append("status")
    await client.retry(client.sessions.UpdateChatSession, resolved)


async def main(address: str) -> None:
    # For a remote server add token=... and credentials=grpc.ssl_channel_credentials().
    async with AsyncChatTicketClient(address, tenant="acme") as client:
        session_id = await create_session(client)
        await say(client, session_id, CHAT_MESSAGE_ROLE_USER, "Where is my order?", {"via": "web"})
        await say(client, session_id, CHAT_MESSAGE_ROLE_ASSISTANT, "On its way.")
        for message in await history(client, session_id):
            role = ChatMessageRole.Name(message.role).removeprefix("CHAT_MESSAGE_ROLE_")
            print(f"{message.sequence} {role}: {message.content}")

        watching = asyncio.create_task(watch(client, session_id))
        await say(client, session_id, CHAT_MESSAGE_ROLE_USER, "For a month. Let me talk to you!")
        chat_ticket = await escalate(client, session_id)
        await be_refused(client, session_id)
        await resolve(client, session_id, chat_ticket.ticket_id)
        await watching
        print("resolved")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "localhost:50051"))
