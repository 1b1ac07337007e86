"""The state of a message, and the ids of drafts. Plain SQL stands in for what writes drafts."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.database import raise_on_insert
from support.messages import (
    batches,
    create_batch,
    get_message,
    session_with_messages,
    set_metadata,
    user_message,
)
from support.process import command
from support.sessions import get_revision
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CHAT_MESSAGE_ORDER_ASC,
    CHAT_MESSAGE_ORDER_DESC,
    ListChatMessagesRequest,
    ListChatMessagesResponse,
)

COMPLETE = r.CHAT_MESSAGE_STATE_COMPLETE
INCOMPLETE = r.CHAT_MESSAGE_STATE_INCOMPLETE
STOPPED = r.CHAT_MESSAGE_STATE_STOPPED
IN_DATABASE = {COMPLETE: None, INCOMPLETE: "incomplete", STOPPED: "stopped"}


async def set_state(database: str, message: r.ChatMessage, state: int) -> r.ChatMessage:
    """The message with another state, which it gets by SQL."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(
            "UPDATE chat_messages SET state = %s WHERE id = %s", (IN_DATABASE[state], message.id)
        )
    changed = r.ChatMessage()
    changed.CopyFrom(message)
    changed.state = state  # type: ignore[assignment]
    return changed


async def messages_of_all_states(api: Api, database: str, session_id: str) -> list[r.ChatMessage]:
    """A message of each state, without any other field that is optional and with all of them."""
    created = []
    for state in IN_DATABASE:
        for fields in ({}, {"language_code": "de", "metadata_json": "{}"}):
            message = await api.message(session_id, **fields)
            created.append(await set_state(database, message, state))
    return created


async def open_draft(database: str, tenant: str, session_id: str) -> str:
    """Insert a draft by SQL; returns its id."""
    draft_id = an_id()
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        await connection.execute(
            "INSERT INTO chat_drafts (tenant_id, id, session_id, role, expires_at)"
            " VALUES (%s, %s, %s, 'user', now() + interval '1 hour')",
            (tenant, draft_id, session_id),
        )
    return draft_id


class TestState:
    async def test_created_message_is_complete(self, api: Api, database: str) -> None:
        """The state in a request is ignored, and takes no space in the database."""
        session = await api.session()
        created = await api.message(session.id, state=STOPPED)
        assert created.state == COMPLETE
        assert (await get_message(api, created.id)).state == COMPLETE
        # One alone is appended by the group commit, others are not.
        ids = [an_id() for _ in range(2)]
        await create_batch(api, session.id, [user_message("x", id=i, state=STOPPED) for i in ids])
        for message_id in ids:
            assert (await get_message(api, message_id)).state == COMPLETE
        async with await psycopg.AsyncConnection.connect(database) as connection:
            rows = await connection.execute(
                "SELECT count(*) FROM chat_messages WHERE tenant_id = %s AND state IS NULL",
                [api.tenant],
            )
            assert await rows.fetchone() == (3,)

    async def test_get(self, api: Api, database: str) -> None:
        """Each state is returned."""
        session = await api.session()
        for message in await messages_of_all_states(api, database, session.id):
            assert await get_message(api, message.id) == message

    async def test_list(self, api: Api, database: str) -> None:
        """Byte for byte, as the list writes the wire format itself; COMPLETE takes no byte."""
        session = await api.session()
        created = await messages_of_all_states(api, database, session.id)
        call = api.channel.unary_stream("/chat_ticket.v1.ChatMessageService/ListChatMessages")
        request = ListChatMessagesRequest(session_id=session.id).SerializeToString()
        [data] = [data async for data in call(request, metadata=[("x-tenant-id", api.tenant)])]
        response = ListChatMessagesResponse.FromString(data)
        assert list(response.messages) == created
        assert response.SerializeToString() == data

    @pytest.mark.parametrize("order", [CHAT_MESSAGE_ORDER_ASC, CHAT_MESSAGE_ORDER_DESC])
    @pytest.mark.parametrize("content", ["x", "x" * 3000])
    async def test_every_page_of_a_list(
        self, api: Api, database: str, order: int, content: str
    ) -> None:
        """The first page and later ones, in either order, by role, of small and large messages."""
        session_id = await session_with_messages(api, 70, content)
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
            await connection.execute(
                "UPDATE chat_messages SET state = CASE sequence %% 3 WHEN 1 THEN 'incomplete'"
                " WHEN 2 THEN 'stopped' END WHERE session_id = %s",
                [session_id],
            )
        for roles in ([], [r.CHAT_MESSAGE_ROLE_USER]):
            pages = await batches(api, session_id, order=order, roles=roles)
            assert len(pages) > 1
            listed = [message for page in pages for message in page.messages]
            assert len(listed) == (35 if roles else 70)
            assert all(message.state == message.sequence % 3 for message in listed)

    async def test_watch(self, api: Api, database: str) -> None:
        """Messages that were created before and that are updated come with their state."""
        session = await api.session()
        created = await messages_of_all_states(api, database, session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert list(watcher.messages.values()) == created
            for message in created:
                await set_metadata(api, message.id, '{"rated": 5}')
                event = await watcher.until("message_updated")
                assert event.message_updated.state == message.state
            await assert_same_state(api, watcher, session.id)

    async def test_repeated_create_returns_the_stored_state(self, api: Api, database: str) -> None:
        """The state is not compared: a request has none."""
        session = await api.session()
        for message in await messages_of_all_states(api, database, session.id):
            repeated = await api.message(
                session.id,
                id=message.id,
                language_code=message.language_code,
                metadata_json=message.metadata_json,
            )
            assert repeated == message
        assert await get_revision(api, session.id) == 6

    async def test_update_keeps_the_state(self, api: Api, database: str) -> None:
        """The state never changes."""
        session = await api.session()
        for message in await messages_of_all_states(api, database, session.id):
            updated = await set_metadata(api, message.id, '{"rated": 5}')
            assert updated.state == message.state

    async def test_export(self, api: Api, database: str) -> None:
        """By name, as every enum; COMPLETE is left out."""
        session = await api.session()
        await messages_of_all_states(api, database, session.id)
        done = await command("export", "--tenant", api.tenant, DATABASE_URL=database)
        lines = [line for line in done.output.splitlines() if line.startswith('{"chatMessage"')]
        for state, name in (
            (INCOMPLETE, '"state":"CHAT_MESSAGE_STATE_INCOMPLETE"'),
            (STOPPED, '"state":"CHAT_MESSAGE_STATE_STOPPED"'),
        ):
            assert [name in line for line in lines] == [n // 2 == state for n in range(6)]
        assert not any("COMPLETE" in line for line in lines[:2])


class TestIdOfADraft:
    async def test_message_does_not_take_the_id_of_an_open_draft(
        self, api: Api, database: str
    ) -> None:
        """Not in the session of the draft, and not in another. Nothing is written."""
        session, elsewhere = await api.session(), await api.session()
        draft_id = await open_draft(database, api.tenant, session.id)
        for session_id in (session.id, elsewhere.id):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                await api.message(session_id, id=draft_id)
            assert refusal.text == f"id {draft_id} belongs to an open draft"
            assert refusal.details["ResourceInfo"].resource_type == "chat_message"
            assert refusal.details["ResourceInfo"].resource_name == draft_id
            assert refusal.info.metadata["index"] == "0"
            assert await get_revision(api, session_id) == 0

    async def test_batch_names_the_index(self, api: Api, database: str) -> None:
        """The first of the ids that belong to drafts. Nothing is written."""
        session = await api.session()
        drafts = [await open_draft(database, api.tenant, session.id) for _ in range(2)]
        messages = [user_message("x", id=i) for i in (an_id(), an_id(), *drafts)]
        for attempt, index in ((messages, 2), (messages[::-1], 0), (messages[1:3], 1)):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                await create_batch(api, session.id, attempt)
            assert refusal.text == f"id {attempt[index].id} belongs to an open draft"
            assert refusal.info.metadata["index"] == str(index)
        assert await get_revision(api, session.id) == 0

    async def test_others_of_the_same_statement_are_created(self, api: Api, database: str) -> None:
        """Only the create with the id of the draft is refused."""
        session = await api.session()
        draft_id = await open_draft(database, api.tenant, session.id)

        async def refused_create() -> None:
            with refused(StatusCode.ALREADY_EXISTS):
                await api.message(session.id, id=draft_id)

        await asyncio.gather(
            *(api.message(session.id) for _ in range(8)),
            refused_create(),
            *(api.message(session.id) for _ in range(8)),
        )
        assert await get_revision(api, session.id) == 16

    async def test_draft_that_is_gone_meanwhile(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """The create can be repeated when the draft was dropped after it was refused."""
        api = await start_server(fresh_database)
        session = await api.session()
        refuse = "RAISE 'x' USING ERRCODE = 'unique_violation', CONSTRAINT = 'chat_messages_pkey'"
        raise_on_insert(fresh_database, refuse, table="chat_messages")
        with refused(StatusCode.ABORTED, "CONTENTION") as refusal:
            await api.message(session.id, id=an_id())
        assert "RetryInfo" in refusal.details
