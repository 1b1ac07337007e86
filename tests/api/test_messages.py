"""Chat messages through the API: create, batch, get, update, delete. Streams have their own."""

import asyncio
import json

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.messages import (
    ASSISTANT,
    KIB,
    USER,
    create_batch,
    delete_message,
    get_message,
    set_metadata,
    user_message,
)
from support.sessions import get_revision

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
    SearchChatMessagesRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, GetChatSessionRequest


class TestCreate:
    async def test_message_is_stored_as_sent(self, api: Api) -> None:
        """Content, role, metadata and attachments come back; sequence is the new revision."""
        session = await api.session()
        text = " \ttwo\r\nlines, é 日本 \u202e \U0001f600 \\0 %s "
        message = await api.message(
            session.id,
            text,
            role=ASSISTANT,
            metadata_json='{"b": 1, "a": [true, null]}',
            attachments=[a_file(file_name="1.png"), a_file(file_name="2.png")],
        )
        assert (message.content, message.role) == (text, ASSISTANT)
        assert (message.session_id, message.sequence, message.revision) == (session.id, 1, 1)
        assert json.loads(message.metadata_json) == {"a": [True, None], "b": 1}
        assert [file.file_name for file in message.attachments] == ["1.png", "2.png"]
        assert {file.message_id for file in message.attachments} == {message.id}
        assert await get_message(api, message.id) == message

    async def test_times_follow_the_sequence(self, api: Api) -> None:
        """A message is created after the one before it, and the session's update_time moves."""
        session = await api.session()
        first = await api.message(session.id, attachments=[a_file()] * 3)
        second = await api.message(session.id)
        now = (
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id))
        ).session
        times = [
            session.update_time,
            first.create_time,
            *(file.create_time for file in first.attachments),
            second.create_time,
        ]
        in_order = [time.ToNanoseconds() for time in times]
        assert in_order == sorted(set(in_order))
        assert now.update_time == second.create_time
        assert now.revision == 2

    async def test_archived_session_takes_messages(self, api: Api) -> None:
        """An archived session rejects only new tickets."""
        session = await api.session(status=r.CHAT_SESSION_STATUS_ARCHIVED)
        assert (await api.message(session.id)).sequence == 1

    async def test_absent_and_foreign_parent_session_get_the_same_error(
        self, api: Api, other: Api
    ) -> None:
        """A message belongs to a session of the same tenant, and a failed create stores nothing."""
        theirs = await other.session()
        for session_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND") as refusal:
                await api.message(session_id)
            assert refusal.text == f"chat session {session_id} does not exist"
        assert await get_revision(other, theirs.id) == 0

    async def test_every_violation_is_reported_at_once(self, api: Api) -> None:
        """Missing and wrong fields are reported together."""
        request = CreateChatMessageRequest(
            session_id="?",
            message=r.ChatMessage(id="?", metadata_json="[]", attachments=[a_file(file_url="?")]),
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.CreateChatMessage(request)
        assert refusal.fields == {
            "session_id": "not a UUID",
            "message.id": "not a UUID",
            "message.role": "required",
            "message.content": "required",
            "message.metadata_json": "not a JSON object",
            "message.attachments[0].file_url": "not a URL",
        }

    @pytest.mark.parametrize("role", [0, 3])
    async def test_role_is_user_or_assistant(self, api: Api, role: int) -> None:
        """Unspecified and unknown numbers are not roles."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, role=role)
        assert list(refusal.fields) == ["message.role"]

    @pytest.mark.parametrize("letter", ["a", "é", "\U0001f600"])
    async def test_content_is_limited_to_256_kib_of_utf8(self, api: Api, letter: str) -> None:
        """The limit counts bytes: at it is stored, one more byte is rejected."""
        session = await api.session()
        text = letter * (256 * KIB // len(letter.encode()))
        assert (await api.message(session.id, text)).content == text
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, text + "x")
        assert refusal.fields == {"message.content": "262,145 bytes of UTF-8, at most 262,144"}

    async def test_too_long_list_is_rejected_without_validating_its_items(self, api: Api) -> None:
        """4 MiB hold two million empty messages: the count is checked before what they are."""
        session = await api.session()
        many = 300_000
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, attachments=[r.ChatAttachment()] * many)
        assert refusal.fields == {"message.attachments": "300,000 elements, at most 20"}
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.SearchChatMessages(
                SearchChatMessagesRequest(query="x", roles=[USER] * many)
            )
        assert refusal.fields == {"roles": "300,000 elements, at most 20"}
        request = UpdateChatMessageRequest(
            message=r.ChatMessage(id=an_id()), update_mask=FieldMask(paths=[""] * many)
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        assert refusal.fields == {"update_mask": "300,000 elements, at most 20"}

    async def test_nul_is_rejected(self, api: Api) -> None:
        """PostgreSQL cannot store it, so it never gets there."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, "a\0b")
        assert refusal.fields == {"message.content": "contains a NUL character"}
        assert await get_revision(api, session.id) == 0

    async def test_attachments_are_limited_to_20(self, api: Api) -> None:
        """20 are stored, 21 rejected."""
        session = await api.session()
        message = await api.message(session.id, attachments=[a_file()] * 20)
        assert len(message.attachments) == 20
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, attachments=[a_file()] * 21)
        assert list(refusal.fields) == ["message.attachments"]


class TestRepeat:
    async def test_repeat_returns_the_stored_message(self, api: Api) -> None:
        """The same id and content is one message, even after other appends."""
        session = await api.session()
        fields = {"id": an_id(), "metadata_json": '{"a":1.0}', "attachments": [a_file()]}
        first = await api.message(session.id, **fields)
        await api.message(session.id)
        assert await api.message(session.id, **fields) == first
        assert await get_revision(api, session.id) == 2

    @pytest.mark.parametrize(
        "changed",
        [
            {"content": "other"},
            {"role": ASSISTANT},
            {"metadata_json": ""},
            {"metadata_json": '{"a": 1}'},
            {"attachments": []},
            {"attachments": [a_file(file_name="other")]},
            {"attachments": [a_file(id=an_id())]},
        ],
        ids=["content", "role", "no metadata", "1 for 1.0", "no file", "file name", "file id"],
    )
    async def test_other_content_is_rejected(self, api: Api, changed: dict[str, object]) -> None:
        """An id cannot be used again with other content."""
        session = await api.session()
        fields: dict[str, object] = {
            "id": an_id(),
            "content": "hello",
            "metadata_json": '{"a": 1.0}',
            "attachments": [a_file()],
        }
        first = await api.message(session.id, **fields)  # type: ignore[arg-type]
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
            await api.message(session.id, **{**fields, **changed})  # type: ignore[arg-type]
        assert refusal.details["ResourceInfo"].resource_name == first.id
        assert await get_message(api, first.id) == first
        assert await get_revision(api, session.id) == 1

    async def test_other_session_is_rejected(self, api: Api) -> None:
        """An id is one message of the tenant, not one per session."""
        session, elsewhere = await api.session(), await api.session()
        message = await api.message(session.id)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            await api.message(elsewhere.id, id=message.id)

    async def test_changed_message_is_returned_as_it_is_now(self, api: Api) -> None:
        """Metadata is compared only while the message is unchanged."""
        session = await api.session()
        message_id = an_id()
        await api.message(session.id, id=message_id, metadata_json='{"a": 1}')
        changed = await set_metadata(api, message_id, '{"a": 2}')
        assert await api.message(session.id, id=message_id, metadata_json='{"a": 1}') == changed
        with refused(StatusCode.ALREADY_EXISTS):
            await api.message(session.id, "other", id=message_id)

    async def test_id_of_a_deleted_message_is_not_used_again(self, api: Api) -> None:
        """A late repeat does not bring a deleted message back, here or in another session."""
        session, elsewhere = await api.session(), await api.session()
        message = await api.message(session.id)
        await delete_message(api, message.id)
        for session_id in (session.id, elsewhere.id):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
                await api.message(session_id, id=message.id)

    async def test_sixteen_concurrent_repeats_are_one_message(self, api: Api) -> None:
        """One call stores it, and all calls return it."""
        session = await api.session()
        message_id = an_id()
        answers = await asyncio.gather(
            *(api.message(session.id, id=message_id, metadata_json="{}") for _ in range(16))
        )
        assert all(answer == answers[0] for answer in answers)
        assert await get_revision(api, session.id) == 1

    async def test_existing_attachment_id_is_rejected(self, api: Api) -> None:
        """A message does not take over another message's attachment."""
        session = await api.session()
        file_id = an_id()
        await api.message(session.id, attachments=[a_file(id=file_id)])
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS") as refusal:
            await api.message(session.id, attachments=[a_file(), a_file(id=file_id)])
        assert refusal.details["ResourceInfo"].resource_name == file_id
        assert await get_revision(api, session.id) == 1

    async def test_same_id_in_two_tenants_is_two_messages(self, api: Api, other: Api) -> None:
        """Ids of one tenant reveal nothing to another."""
        message_id = an_id()
        mine = await api.message((await api.session()).id, "mine", id=message_id)
        theirs = await other.message((await other.session()).id, "theirs", id=message_id)
        assert await get_message(api, message_id) == mine
        assert await get_message(other, message_id) == theirs


class TestBatch:
    async def test_one_sequence_each_in_order(self, api: Api) -> None:
        """A batch is appended as one unit and in order, after the existing messages."""
        session = await api.session()
        await api.message(session.id)
        created = await create_batch(api, session.id, [user_message(str(n)) for n in range(500)])
        assert [sequence for _, sequence in created] == list(range(2, 502))
        assert [(await get_message(api, created[n][0])).content for n in (0, 250, 499)] == [
            "0",
            "250",
            "499",
        ]
        assert await get_revision(api, session.id) == 501

    async def test_batch_has_consecutive_sequences(self, api: Api) -> None:
        """The messages of concurrent batches do not mix."""
        session = await api.session()
        batches = await asyncio.gather(
            *(create_batch(api, session.id, [user_message("x")] * 20) for _ in range(8))
        )
        runs = sorted([sequence for _, sequence in created] for created in batches)
        assert [sequence for run in runs for sequence in run] == list(range(1, 161))
        assert all(run == list(range(run[0], run[0] + 20)) for run in runs)

    async def test_attachments_and_metadata_reach_their_message(self, api: Api) -> None:
        """Attachments and metadata belong to their message."""
        session = await api.session()
        messages = [
            user_message("0", attachments=[a_file(file_name="a"), a_file(file_name="b")]),
            user_message("1", metadata_json='{"n": 1}'),
            user_message("2", attachments=[a_file(file_name="c")]),
        ]
        created = await create_batch(api, session.id, messages)
        stored = [await get_message(api, message_id) for message_id, _ in created]
        assert [[f.file_name for f in m.attachments] for m in stored] == [["a", "b"], [], ["c"]]
        assert [m.metadata_json for m in stored] == ["", '{"n": 1}', ""]

    async def test_one_bad_message_rejects_the_batch(self, api: Api) -> None:
        """The violation names the index; nothing is written."""
        session = await api.session()
        messages = [
            user_message("fine"),
            user_message(""),
            user_message("fine"),
            user_message("x", metadata_json="?"),
        ]
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, messages)
        assert set(refusal.fields) == {"messages[1].content", "messages[3].metadata_json"}
        assert await get_revision(api, session.id) == 0

    @pytest.mark.parametrize("count", [0, 501])
    async def test_limited_to_500(self, api: Api, count: int) -> None:
        """An empty batch and one of 501 are rejected."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, [user_message("x")] * count)
        assert list(refusal.fields) == ["messages"]

    async def test_attachments_are_limited_for_the_request(self, api: Api) -> None:
        """20 in total, over all messages."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, [user_message("x", attachments=[a_file()] * 7)] * 3)
        assert refusal.fields == {"messages": "21 attachments, at most 20"}

    async def test_same_id_twice_is_rejected(self, api: Api) -> None:
        """A batch cannot hold a message twice. Each repetition is named, in either case."""
        session, message = await api.session(), user_message("x", id=an_id())
        upper = user_message("x", id=message.id.upper())
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, [user_message("x"), message, upper, message])
        assert refusal.fields == {
            "messages[2].id": "the same id as messages[1].id",
            "messages[3].id": "the same id as messages[1].id",
        }

    async def test_same_attachment_id_twice_is_rejected(self, api: Api) -> None:
        """In one message, and in two of a batch."""
        session, file = await api.session(), a_file(id=an_id())
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.message(session.id, attachments=[file, file])
        assert refusal.fields == {
            "message.attachments[1].id": "the same id as message.attachments[0].id"
        }
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, [user_message("a", attachments=[file])] * 2)
        assert refusal.fields == {
            "messages[1].attachments[0].id": "the same id as messages[0].attachments[0].id"
        }

    async def test_repeat_returns_what_is_stored(self, api: Api) -> None:
        """Sixteen repeats at once are one batch."""
        session = await api.session()
        messages = [user_message(str(n), id=an_id()) for n in range(10)]
        answers = await asyncio.gather(
            *(create_batch(api, session.id, messages) for _ in range(16))
        )
        assert all(answer == answers[0] for answer in answers)
        assert await get_revision(api, session.id) == 10

    async def test_any_other_existing_id_is_rejected_by_index(self, api: Api) -> None:
        """Some ids stored and some new, or one with other content: nothing is written."""
        session = await api.session()
        messages = [user_message(str(n), id=an_id()) for n in range(4)]
        await create_batch(api, session.id, messages[:3])
        different = [*messages[:2], user_message("different", id=messages[2].id)]
        for attempt, index in ((messages, "0"), (messages[::-1], "1"), (different, "2")):
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                await create_batch(api, session.id, attempt)
            assert refusal.info.metadata["index"] == index
        assert await get_revision(api, session.id) == 3

    async def test_violations_of_a_full_batch_fit_into_the_error(self, api: Api) -> None:
        """500 bad messages fail with as many violations as fit; the others are counted."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_batch(api, session.id, [r.ChatMessage()] * 500)
        violations = refusal.details["BadRequest"].field_violations
        assert violations[0].field == "messages[0].role"
        assert all(violation.field for violation in violations)
        assert 50 < len(violations) <= 100
        assert refusal.info.metadata == {"omitted_violations": str(1000 - len(violations))}


class TestUpdate:
    async def test_metadata_is_replaced(self, api: Api) -> None:
        """The revision moves; content, sequence and time do not."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"a": 1}')
        changed = await set_metadata(api, message.id, '{"b": 2}')
        assert (changed.metadata_json, changed.revision) == ('{"b": 2}', 2)
        message.metadata_json, message.revision, message.etag = changed.metadata_json, 2, "2"
        assert changed == message == await get_message(api, message.id)
        assert await get_revision(api, session.id) == 2

    async def test_empty_removes_it(self, api: Api) -> None:
        """Metadata can be taken away."""
        message = await api.message((await api.session()).id, metadata_json="{}")
        assert (await set_metadata(api, message.id, "")).metadata_json == ""

    async def test_equal_metadata_changes_nothing(self, api: Api) -> None:
        """A repeat of an update increments nothing."""
        session = await api.session()
        message = await api.message(session.id, metadata_json='{"a": 1}')
        assert await set_metadata(api, message.id, ' {"a":1}') == message
        assert await get_revision(api, session.id) == 1

    @pytest.mark.parametrize("paths", [["content"], ["metadata_json", "role"], ["metadata"]])
    async def test_nothing_else_can_change(self, api: Api, paths: list[str]) -> None:
        """Any other field is rejected."""
        message = await api.message((await api.session()).id)
        request = UpdateChatMessageRequest(
            message=r.ChatMessage(id=message.id, content="x"), update_mask=FieldMask(paths=paths)
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.messages.UpdateChatMessage(request)
        assert list(refusal.fields) == ["update_mask"]

    async def test_long_error_fits_into_trailers(self, api: Api) -> None:
        """Whatever the caller wrote, the real status arrives: trailers stay under 8 KiB."""
        request = UpdateChatMessageRequest(
            message=r.ChatMessage(id="\U0001f600" * 1000),
            update_mask=FieldMask(paths=["\U0001f600" * 97] * 20),
        )
        for _ in range(20):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await api.messages.UpdateChatMessage(request)
            assert "update_mask" in refusal.fields

    async def test_absent_and_foreign_are_not_found(self, api: Api, other: Api) -> None:
        """Nobody changes or reads another tenant's message."""
        theirs = await other.message((await other.session()).id)
        for message_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await set_metadata(api, message_id, "{}")
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await get_message(api, message_id)
        assert await get_message(other, theirs.id) == theirs


class TestDelete:
    async def test_message_and_attachments_go(self, api: Api) -> None:
        """The revision moves; a repeat is NOT_FOUND."""
        session = await api.session()
        message = await api.message(session.id, attachments=[a_file()])
        await delete_message(api, message.id)
        for attempt in (get_message, delete_message):
            with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
                await attempt(api, message.id)
        assert await get_revision(api, session.id) == 2

    async def test_foreign_message_stays(self, api: Api, other: Api) -> None:
        """Nobody deletes another tenant's message."""
        theirs = await other.message((await other.session()).id)
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await delete_message(api, theirs.id)
        assert await get_message(other, theirs.id) == theirs

    async def test_deleting_a_session_deletes_its_messages(self, api: Api) -> None:
        """Deleting a session deletes its messages."""
        session = await api.session()
        message = await api.message(session.id)
        await delete_message(api, (await api.message(session.id)).id)
        await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session.id))
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await get_message(api, message.id)
