"""Drafts through the API: writing one, reading it, and what it is to everything else."""

from typing import Any

import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.drafts import (
    COMPLETE,
    get_draft,
    leave_draft,
    list_drafts,
    stop_draft,
    write_message,
    writing,
)
from support.messages import (
    ASSISTANT,
    USER,
    batches,
    delete_message,
    get_message,
    sequences,
    set_metadata,
)
from support.process import command
from support.search import search
from support.sessions import ARCHIVED, delete_session, get_revision, get_session, set_status
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest, UpdateChatSessionRequest


class TestWrite:
    async def test_draft_becomes_a_message_of_its_id(self, api: Api) -> None:
        """The responses are `started`, `written` and `finished`, and the stream ends with OK."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            assert (stream.offset, stream.revision) == (0, 0)
            await stream.write("Hello")
            await stream.append(", ")
            await stream.append("world")
            message = await stream.finish()
        assert stream.written == len("Hello, world"), "all was acknowledged before the finish"
        assert (message.id, message.session_id) == (stream.draft_id, session.id)
        assert (message.content, message.role) == ("Hello, world", ASSISTANT)
        assert (message.state, message.sequence, message.revision) == (COMPLETE, 1, 1)
        assert await get_message(api, message.id) == message
        assert await list_drafts(api, session.id) == []

    async def test_started_has_the_revision_of_the_session(self, api: Api) -> None:
        """Of a session that has messages, when the draft begins and when it is taken over."""
        session = await api.session()
        await api.message(session.id)
        async with writing(api, session.id) as stream:
            assert stream.revision == 1
            await api.message(session.id)
            async with writing(api, session.id, stream.draft_id) as again:
                assert again.revision == 2

    async def test_what_is_acknowledged_is_durable(self, api: Api, database: str) -> None:
        """Another connection to the database sees it at once."""
        session = await api.session()
        async with (
            writing(api, session.id) as stream,
            await psycopg.AsyncConnection.connect(database, autocommit=True) as connection,
        ):
            for number in range(20):
                await stream.write(f"{number} ")
                cursor = await connection.execute(
                    "SELECT d.length, string_agg(p.content, '' ORDER BY p.start_offset)"
                    "  FROM chat_drafts d JOIN chat_draft_pieces p ON p.draft_id = d.id"
                    " WHERE d.id = %s GROUP BY d.length",
                    [stream.draft_id],
                )
                text = "".join(f"{n} " for n in range(number + 1))
                assert await cursor.fetchone() == (len(text), text)

    async def test_writer_need_not_wait(self, api: Api) -> None:
        """Appends and the finish are sent at once; the message has all of them in order."""
        session = await api.session()
        words = [f"word {number} é " for number in range(500)]
        async with writing(api, session.id) as stream:
            for word in words:
                await stream.append(word)
            message = await stream.finish()
        assert message.content == "".join(words)
        assert stream.written == len(message.content.encode())

    async def test_drafts_are_written_side_by_side(self, api: Api) -> None:
        """Each becomes a message of its own, in the order in which they are finished."""
        session = await api.session()
        async with (
            writing(api, session.id, role=USER) as one,
            writing(api, session.id, role=ASSISTANT) as two,
        ):
            for number in range(5):
                await one.write(f"one {number} ")
                await two.write(f"two {number} ")
            second = await two.finish()
            first = await one.finish()
        assert (second.sequence, second.role) == (1, ASSISTANT)
        assert (first.sequence, first.role) == (2, USER)
        assert first.content == "one 0 one 1 one 2 one 3 one 4 "
        assert second.content == first.content.replace("one", "two")

    async def test_session_that_is_archived(self, api: Api) -> None:
        """A draft begins in it, goes on when it becomes so, and is finished."""
        session = await api.session(status=r.CHAT_SESSION_STATUS_ARCHIVED)
        assert (await write_message(api, session.id)).sequence == 1
        session = await api.session()
        async with writing(api, session.id) as stream:
            await set_status(api, session.id, ARCHIVED)
            await stream.write("on")
            assert (await stream.finish()).content == "on"


class TestRead:
    async def test_get_returns_an_open_draft(self, api: Api) -> None:
        """With its content so far, whose length is in bytes, and when its writer counts as lost."""
        session = await api.session()
        fields = {"role": USER, "metadata_json": '{"b": 1}', "language_code": "de-AT"}
        async with writing(api, session.id, **fields) as stream:
            empty = await get_draft(api, stream.draft_id)
            assert (empty.content, empty.length) == ("", 0)
            await stream.write("größer \U0001f600")
            draft = await get_draft(api, stream.draft_id)
        assert (draft.id, draft.session_id) == (stream.draft_id, session.id)
        assert (draft.content, draft.length) == ("größer \U0001f600", 13)
        assert {name: getattr(draft, name) for name in fields} == fields
        assert draft.create_time == empty.create_time
        lease = empty.expire_time.ToNanoseconds() - empty.create_time.ToNanoseconds()
        assert 59e9 < lease < 61e9
        assert draft.expire_time.ToNanoseconds() > empty.expire_time.ToNanoseconds()

    async def test_ids_in_upper_case(self, api: Api) -> None:
        """Requests may use upper case; responses have lower case."""
        session = await api.session()
        draft_id = an_id()
        async with writing(api, session.id.upper(), draft_id.upper()) as stream:
            await stream.write("x")
            assert (await get_draft(api, draft_id.upper())).id == draft_id
            assert [draft.id for draft in await list_drafts(api, session.id.upper())] == [draft_id]
            message = await stop_draft(api, draft_id.upper())
        assert (message.id, message.session_id) == (draft_id, session.id)

    async def test_draft_that_is_not_open(self, api: Api) -> None:
        """One that never was, was finished or was dropped: NOT_FOUND, as for an id of a message."""
        session = await api.session()
        finished = await write_message(api, session.id)
        dropped = await leave_draft(api, session.id)
        await stop_draft(api, dropped)
        plain = await api.message(session.id)
        for draft_id in (an_id(), finished.id, dropped, plain.id):
            with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND") as refusal:
                await get_draft(api, draft_id)
            assert refusal.details["ResourceInfo"].resource_name == draft_id

    async def test_list_has_the_open_drafts_oldest_first(self, api: Api) -> None:
        """As GetChatDraft returns them, of this session only."""
        session, elsewhere = await api.session(), await api.session()
        assert await list_drafts(api, session.id) == []
        ids = [await leave_draft(api, session.id, f"text {number}") for number in range(4)]
        await leave_draft(api, elsewhere.id)
        await stop_draft(api, ids.pop(1))
        drafts = await list_drafts(api, session.id)
        assert drafts == [await get_draft(api, draft_id) for draft_id in ids]
        assert [draft.content for draft in drafts] == ["text 0", "text 2", "text 3"]

    async def test_list_of_no_session(self, api: Api) -> None:
        """NOT_FOUND, also when the session had drafts."""
        session = await api.session()
        await leave_draft(api, session.id, "x")
        await delete_session(api, session.id)
        for session_id in (session.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await list_drafts(api, session_id)

    async def test_ids_that_are_none(self, api: Api) -> None:
        """Each method checks its id."""
        for call, field in (
            (get_draft, "draft_id"),
            (stop_draft, "draft_id"),
            (list_drafts, "session_id"),
        ):
            for value, description in (("", "required"), ("?", "not a UUID")):
                with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                    await call(api, value)
                assert refusal.fields == {field: description}


class TestNoMessage:
    async def test_draft_moves_nothing(self, api: Api) -> None:
        """The session is the same while a draft begins, grows and is dropped, its etag included."""
        await api.session()
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("some text")
            assert await get_session(api, session.id) == session
            await stop_draft(api, await leave_draft(api, session.id))
            assert await get_session(api, session.id) == session
            page = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=1))
            assert [each.id for each in page.sessions] == [session.id]
            request = UpdateChatSessionRequest(
                session=r.ChatSession(
                    id=session.id, etag=session.etag, status=r.CHAT_SESSION_STATUS_RESOLVED
                ),
                update_mask=FieldMask(paths=["status"]),
            )
            await api.sessions.UpdateChatSession(request)
            assert (await stream.finish()).revision == 2

    async def test_draft_is_in_nothing_that_has_messages(self, api: Api, database: str) -> None:
        """Neither in the list, nor the search, nor the export."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("xylophone")
            assert [each.messages for each in await batches(api, session.id) if each.messages] == []
            assert await search(api, "xylophone") == []
            exported = (
                await command("export", "--tenant", api.tenant, DATABASE_URL=database)
            ).output
            assert session.id in exported
            assert stream.draft_id not in exported

    async def test_draft_cannot_be_used_as_a_message(self, api: Api) -> None:
        """To the methods of messages there is no message with its id."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("x")
            for call in (
                get_message(api, stream.draft_id),
                set_metadata(api, stream.draft_id, "{}"),
                delete_message(api, stream.draft_id),
                api.attachment(stream.draft_id),
            ):
                with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                    await call
            assert (await stream.finish()).revision == 1

    async def test_finished_draft_is_a_message_like_any_other(
        self, api: Api, database: str
    ) -> None:
        """It is listed, watched, found and exported, and can be changed and deleted."""
        session = await api.session()
        await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            message = await write_message(api, session.id, "a xylophone", metadata_json='{"a": 1}')
            assert (await watcher.next()).messages_created.messages[0] == message
            await assert_same_state(api, watcher, session.id)
        assert await sequences(api, session.id) == [1, 2]
        assert [hit.message_id for hit in await search(api, "xylophone")] == [message.id]
        exported = (await command("export", "--tenant", api.tenant, DATABASE_URL=database)).output
        assert message.id in exported
        changed = await get_session(api, session.id)
        assert (changed.revision, changed.update_time) == (2, message.create_time)
        assert changed.etag != session.etag
        assert (await set_metadata(api, message.id, '{"a": 2}')).revision == 3
        await api.attachment(message.id, file_name="later.png")
        await delete_message(api, message.id)
        assert await sequences(api, session.id) == [1]

    @pytest.mark.parametrize(
        "changed", [{}, {"content": "other"}, {"role": USER}], ids=["same", "text", "role"]
    )
    async def test_create_with_the_id_of_a_finished_draft(
        self, api: Api, changed: dict[str, Any]
    ) -> None:
        """What is equal is a repeat, as for every message."""
        session = await api.session()
        message = await write_message(api, session.id, "hello")
        fields = {"id": message.id, "content": "hello", "role": ASSISTANT, **changed}
        if not changed:
            assert await api.message(session.id, **fields) == message
        else:
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                await api.message(session.id, **fields)
        assert await get_revision(api, session.id) == 1

    async def test_create_with_the_id_of_an_open_draft(self, api: Api) -> None:
        """Refused, with and without attachments, and the draft is not harmed."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("x")
            for fields in ({}, {"attachments": [a_file()]}):
                with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                    await api.message(session.id, "x", id=stream.draft_id, role=ASSISTANT, **fields)
                assert refusal.details["ResourceInfo"].resource_name == stream.draft_id
            assert (await stream.finish()).sequence == 1
