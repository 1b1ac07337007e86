"""`watch` of the Python client on a database that loses changes while the stream is open."""

from contextlib import aclosing

from support.client_calls import create_message, create_session_id, event_kind
from support.restores import restore

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest


async def test_a_stream_without_an_epoch_is_told_too(
    client: AsyncChatTicketClient, database: str
) -> None:
    """The first stream of a watch sends none. It has one when the changes are lost."""
    session_id = await create_session_id(client)
    await create_message(client, session_id, "kept")
    get = GetChatSessionRequest(session_id=session_id)
    backup = (await client.sessions.GetChatSession(get)).session
    await create_message(client, session_id, "lost")
    messages: dict[str, str] = {}
    revisions = []
    async with aclosing(client.watch(session_id)) as events:
        async for event in events:
            revisions.append(event.revision)
            for message in event.messages_created.messages:
                messages[message.id] = message.content
            messages.pop(event.message_deleted.message_id, None)
            if event_kind(event) == "caught_up":
                restore(database, backup)
                await create_message(client, session_id, "new")
                await create_message(client, session_id, "newer")
            if "newer" in messages.values():
                break
    assert list(messages.values()) == ["kept", "new", "newer"]
    assert revisions[-1] == 3
    assert 1 in revisions[2:], "the revision that is shared"
