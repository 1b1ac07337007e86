"""`watch` and lists of the Python client on a database that loses changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio
from support.client_calls import NewClient, create_message, create_session_id, event_kind
from support.restores import restore, restoring
from support.server import Server, serving

from chat_ticket import errors
from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    DeleteChatMessageRequest,
    ListChatMessagesRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest, WatchChatSessionResponse


@pytest_asyncio.fixture(scope="module")
async def polling_server(database: str) -> AsyncIterator[Server]:
    """Nobody notifies it of a restore."""
    async with serving(database, watch_poll_interval_seconds=0.1) as server:
        yield server


@pytest_asyncio.fixture
async def polling_client(polling_server: Server, connect: NewClient) -> AsyncChatTicketClient:
    return connect(polling_server.port)


async def session_of(client: AsyncChatTicketClient, session_id: str) -> r.ChatSession:
    request = GetChatSessionRequest(session_id=session_id)
    return (await client.sessions.GetChatSession(request)).session


async def read_until(
    watch: AsyncIterator[WatchChatSessionResponse], last: str
) -> list[WatchChatSessionResponse]:
    events: list[WatchChatSessionResponse] = []
    async with asyncio.timeout(20):
        while not events or event_kind(events[-1]) != last:
            events.append(await anext(watch))
    return events


async def test_watch_tells_what_a_restore_has_undone(
    polling_client: AsyncChatTicketClient, database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """By ordinary events at the position before, then it goes on. It warns once."""
    client = polling_client
    session_id = await create_session_id(client)
    watch = client.watch(session_id)
    for content in ("changed", "deleted"):
        await create_message(client, session_id, content)
    backup = await session_of(client, session_id)
    await create_message(client, session_id, "lost")
    messages = [message async for message in client.messages_of(session_id)]
    changed, deleted, lost = (message.id for message in messages)
    update = UpdateChatMessageRequest(message=r.ChatMessage(id=changed, metadata_json="{}"))
    update.update_mask.paths.append("metadata_json")
    await client.messages.UpdateChatMessage(update)
    before = (await read_until(watch, "caught_up"))[-1]
    await client.messages.DeleteChatMessage(DeleteChatMessageRequest(message_id=deleted))
    before = (await read_until(watch, "message_deleted"))[-1]

    with restoring(database, backup) as connection:
        connection.execute(
            "UPDATE chat_messages SET revision = 1, metadata = NULL WHERE id = %s", [changed]
        )
        connection.execute("DELETE FROM chat_message_tombstones WHERE message_id = %s", [deleted])
        insert_again(connection, messages[1])
    *corrections, shared = await read_until(watch, "heartbeat")
    assert {(event.revision, event.epoch) for event in corrections} == {
        (before.revision, before.epoch)
    }
    gone, updated, again = corrections
    assert gone.message_deleted.message_id == lost
    assert (updated.message_updated.id, updated.message_updated.revision) == (changed, 1)
    assert [message.id for message in again.messages_created.messages] == [deleted]
    assert (shared.revision, shared.epoch) == (backup.revision, backup.epoch)

    await create_message(client, session_id, "after the restore")
    [created] = await read_until(watch, "messages_created")
    assert [message.sequence for message in created.messages_created.messages] == [3]
    await watch.aclose()
    [warning] = [entry for entry in caplog.records if entry.levelname == "WARNING"]
    assert "HISTORY_CHANGED" in warning.getMessage()


def insert_again(connection: Any, message: r.ChatMessage) -> None:
    connection.execute("SET LOCAL session_replication_role = replica")
    connection.execute(
        "INSERT INTO chat_messages SELECT (jsonb_populate_record(m, jsonb_build_object("
        "'id', %(id)s::text, 'sequence', 2, 'revision', 2))).* FROM chat_messages m"
        " WHERE session_id = %(session_id)s AND sequence = 1",
        {"id": message.id, "session_id": message.session_id},
    )


async def test_position_of_an_earlier_process_is_the_callers(
    client: AsyncChatTicketClient, database: str
) -> None:
    """The error says where it can go on. The same holds for a list."""
    session_id = await create_session_id(client)
    await create_message(client, session_id)
    backup = await session_of(client, session_id)
    await create_message(client, session_id)
    stored = await session_of(client, session_id)
    restore(database, backup)
    await create_message(client, session_id)
    current = await session_of(client, session_id)

    with pytest.raises(errors.HistoryChangedError) as caught:
        await anext(client.watch(session_id, stored.revision, epoch=stored.epoch))
    assert (caught.value.revision, caught.value.epoch) == (backup.revision, current.epoch)
    watch = client.watch(session_id, caught.value.revision, epoch=caught.value.epoch)
    assert [e.revision for e in await read_until(watch, "caught_up")] == [1, 2, 2]
    await watch.aclose()

    request = ListChatMessagesRequest(
        session_id=session_id, after_sequence=stored.revision, epoch=stored.epoch
    )
    with pytest.raises(errors.HistoryChangedError) as caught:
        async for _ in client.messages.ListChatMessages(request):
            pass
    assert caught.value.revision == backup.revision


async def test_a_stream_without_an_epoch_is_told_too(
    client: AsyncChatTicketClient, database: str
) -> None:
    """The first stream of a watch sends none. It has one when the changes are lost."""
    session_id = await create_session_id(client)
    await create_message(client, session_id, "kept")
    backup = await session_of(client, session_id)
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
