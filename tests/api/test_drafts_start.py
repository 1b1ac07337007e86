"""How drafts begin: what `start` needs, whose ids are taken, exclusive drafts and their number."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.drafts import (
    Start,
    a_start,
    get_draft,
    leave_draft,
    list_drafts,
    start_finished,
    stop_draft,
    unstarted,
    write_message,
    writing,
)
from support.messages import ASSISTANT, USER, delete_message, get_message
from support.quotas import refusal_of
from support.sessions import delete_session, get_revision

from chat_ticket.v1 import resources_pb2 as r

EXISTS = StatusCode.ALREADY_EXISTS


async def begin(api: Api, session_id: str, draft_id: str = "", **fields: Any) -> str:
    """Begin a draft, and leave it. Returns its id."""
    async with writing(api, session_id, draft_id, **fields) as stream:
        return stream.draft_id


async def send_first(api: Api, *requests: dict[str, Any]) -> None:
    """Send these requests. Raises the error that they get."""
    async with unstarted(api) as stream:
        for request in requests:
            await stream.send(**request)
        await stream.until_error()


class TestRequest:
    async def test_every_violation_is_reported_at_once(self, api: Api) -> None:
        """Missing and wrong fields are reported together."""
        start = Start(
            session_id="?",
            draft=r.ChatDraft(id="?", metadata_json="[]", language_code="?"),
            expected_revision=-1,
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await send_first(api, {"start": start})
        assert refusal.fields == {
            "start.session_id": "not a UUID",
            "start.draft.id": "not a UUID",
            "start.draft.role": "required",
            "start.draft.language_code": "not a BCP 47 language tag such as de-AT",
            "start.draft.metadata_json": "not a JSON object",
            "start.expected_revision": "integer -1, at least 0",
        }

    async def test_empty_start(self, api: Api) -> None:
        """The id is required, unlike that of a message: without it nobody could resume."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await send_first(api, {"start": Start()})
        assert refusal.fields == {
            "start.session_id": "required",
            "start.draft.id": "required",
            "start.draft.role": "required",
        }

    async def test_unknown_role(self, api: Api) -> None:
        """A number that is no role."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await begin(api, session.id, role=3)
        assert refusal.fields == {"start.draft.role": "unknown enum value 3"}

    @pytest.mark.parametrize("first", [{"append": {"text": "x"}}, {"finish": {}}, {}])
    async def test_first_request_is_start(self, api: Api, first: dict[str, Any]) -> None:
        """Nothing else, nor an empty request."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await send_first(api, first)
        assert refusal.fields == {"start": "required in the first request"}

    async def test_stream_without_a_request(self, api: Api) -> None:
        """A caller that ends the stream at once is told what is missing."""
        async with unstarted(api) as stream:
            await stream.call.done_writing()
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.next()
        assert refusal.fields == {"start": "required in the first request"}

    async def test_second_start(self, api: Api) -> None:
        """Only the first request begins a draft. What came before stays."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("text")
            await stream.send(start=a_start(session.id, an_id()))
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert list(refusal.fields) == ["start"]
        assert [draft.content for draft in await list_drafts(api, session.id)] == ["text"]

    async def test_empty_request(self, api: Api) -> None:
        """A request that is neither an append nor a finish."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.send()
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert list(refusal.fields) == ["append", "finish"], "each field of a oneof that is missing"

    async def test_start_that_never_comes(self, start_server: Any, database: str) -> None:
        """A stream that only waits ends, also when it has a deadline of its own."""
        api = await start_server(database, unary_timeout_seconds=0.2)
        for call in ({}, {"timeout": None}):
            async with unstarted(api, **call) as stream:
                with refused(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"):
                    await stream.next(timeout=5)

    async def test_output_only_fields_are_ignored(self, api: Api) -> None:
        """A draft as GetChatDraft returns it can be sent."""
        session = await api.session()
        async with writing(api, session.id, content="ignored", length=7) as stream:
            assert (stream.offset, (await get_draft(api, stream.draft_id)).content) == (0, "")


class TestFields:
    async def test_language_and_metadata_become_those_of_the_message(self, api: Api) -> None:
        """As for a message: the code as sent, the metadata as jsonb."""
        session = await api.session()
        message = await write_message(
            api, session.id, language_code="de-AT", metadata_json='{"bb":1,"a":2.0,"bb":3}'
        )
        assert (message.language_code, message.metadata_json) == ("de-AT", '{"a": 2.0, "bb": 3}')
        assert await get_message(api, message.id) == message

    async def test_draft_that_is_taken_over_keeps_its_metadata(self, api: Api) -> None:
        """Whatever the later start says."""
        session = await api.session()
        async with writing(api, session.id, metadata_json='{"a": 1}') as stream:
            await stream.write("x")
        async with writing(api, session.id, stream.draft_id, metadata_json='{"b": 2}') as again:
            assert (await again.finish()).metadata_json == '{"a": 1}'


class TestSession:
    async def test_absent_and_foreign_session_get_the_same_error(
        self, api: Api, other: Api
    ) -> None:
        """A draft belongs to a session of the same tenant."""
        theirs = await other.session()
        for session_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND") as refusal:
                await begin(api, session_id)
            assert refusal.text == f"chat session {session_id} does not exist"
        assert await list_drafts(other, theirs.id) == []

    async def test_expected_revision(self, api: Api) -> None:
        """The draft begins only if the session is still there; 0 is a revision too."""
        session = await api.session()
        async with writing(api, session.id, expected_revision=0) as stream:
            assert stream.revision == 0
        await api.message(session.id)
        for revision in (0, 2):
            with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
                await begin(api, session.id, expected_revision=revision)
        await begin(api, session.id, expected_revision=1)
        await begin(api, session.id)  # unset: not checked
        assert len(await list_drafts(api, session.id)) == 3

    async def test_expected_revision_of_a_draft_that_is_taken_over(self, api: Api) -> None:
        """Not checked: the session has moved on since the draft began, and so it may."""
        session = await api.session()
        draft_id = await begin(api, session.id, expected_revision=0)
        await api.message(session.id)
        async with writing(api, session.id, draft_id, expected_revision=0) as stream:
            assert stream.revision == 1
            await stream.write("x")
            message = await stream.finish()
        assert await start_finished(api, session.id, draft_id, expected_revision=0) == message


class TestIds:
    async def test_id_of_another_draft(self, api: Api) -> None:
        """Of another session, or with another role, author or language code. The draft is not
        harmed.
        """
        session, elsewhere = await api.session(), await api.session()
        same = {"language_code": "de", "author": r.ChatMessageAuthor(id="bot")}
        async with writing(api, session.id, **same) as stream:
            for session_id, fields in (
                (elsewhere.id, same),
                (session.id, same | {"role": USER}),
                (session.id, same | {"language_code": "fr"}),
                (session.id, same | {"language_code": ""}),
                (session.id, same | {"author": None}),
                (session.id, same | {"author": r.ChatMessageAuthor(id="Bot")}),
                (session.id, same | {"author": r.ChatMessageAuthor(id="bot", kind=1)}),
            ):
                with refused(EXISTS, "CHAT_DRAFT_ALREADY_EXISTS") as refusal:
                    await begin(api, session_id, stream.draft_id, **fields)
                assert refusal.details["ResourceInfo"].resource_name == stream.draft_id
            await stream.write("still mine")

    async def test_id_of_another_message(self, api: Api) -> None:
        """Of another session, or with another role, author or language code; or of a deleted
        message.
        """
        session, elsewhere = await api.session(), await api.session()
        same = {"language_code": "de", "author": r.ChatMessageAuthor(kind=2)}
        message = await api.message(session.id, role=ASSISTANT, **same)
        deleted = await api.message(session.id, role=ASSISTANT)
        await delete_message(api, deleted.id)
        for message_id, session_id, fields in (
            (message.id, elsewhere.id, same),
            (message.id, session.id, same | {"role": USER}),
            (message.id, session.id, same | {"language_code": "fr"}),
            (message.id, session.id, same | {"language_code": ""}),
            (message.id, session.id, same | {"author": None}),
            (message.id, session.id, same | {"author": r.ChatMessageAuthor(kind=3)}),
            (deleted.id, session.id, {}),
            (deleted.id, elsewhere.id, {}),
        ):
            with refused(EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS") as refusal:
                await begin(api, session_id, message_id, **fields)
            assert refusal.details["ResourceInfo"].resource_name == message_id
        assert await list_drafts(api, session.id) == []

    async def test_id_of_a_message_that_was_no_draft(self, api: Api) -> None:
        """It is the message that the writer wanted to write: it is returned."""
        session = await api.session()
        message = await api.message(session.id, role=ASSISTANT, attachments=[a_file()])
        assert await start_finished(api, session.id, message.id) == message

    async def test_id_of_another_tenant(self, api: Api, other: Api) -> None:
        """Ids are those of a tenant: both have a draft of the same id."""
        draft_id = an_id()
        mine, theirs = await api.session(), await other.session()
        await leave_draft(api, mine.id, "mine", draft_id)
        await leave_draft(other, theirs.id, "theirs", draft_id)
        assert (await stop_draft(api, draft_id)).content == "mine"
        assert (await get_draft(other, draft_id)).content == "theirs"

    async def test_id_of_a_draft_that_was_dropped(self, api: Api) -> None:
        """Nothing is left of it: the id is free, in another session too."""
        session, elsewhere = await api.session(), await api.session()
        draft_id = await begin(api, session.id)
        await stop_draft(api, draft_id)
        assert (await write_message(api, elsewhere.id, "x", draft_id)).session_id == elsewhere.id

    async def test_id_of_a_draft_whose_session_was_deleted(self, api: Api) -> None:
        """Of an open draft nothing is left; the id of a message of that session is free as well."""
        session, elsewhere = await api.session(), await api.session()
        draft_id = await leave_draft(api, session.id, "x")
        await delete_session(api, session.id)
        assert (await write_message(api, elsewhere.id, "x", draft_id)).session_id == elsewhere.id


async def race(*attempts: Callable[[], Awaitable[object]]) -> list[object]:
    """What each of these returns or raises, all at once."""
    return await asyncio.gather(*(attempt() for attempt in attempts), return_exceptions=True)


class TestNumber:
    async def test_exclusive_draft(self, api: Api) -> None:
        """It begins only if the session has no other, which is named. Others may follow it."""
        session, elsewhere = await api.session(), await api.session()
        await begin(api, elsewhere.id)
        first = await begin(api, session.id, exclusive=True)
        with refused(EXISTS, "DRAFT_OPEN") as refusal:
            await begin(api, session.id, exclusive=True)
        assert refusal.details["ResourceInfo"].resource_name == first
        assert refusal.details["ResourceInfo"].resource_type == "chat_draft"
        await begin(api, session.id)
        # Not checked for a draft that is taken over.
        await begin(api, session.id, first, exclusive=True)
        for draft in await list_drafts(api, session.id):
            await stop_draft(api, draft.id)
        await begin(api, session.id, exclusive=True)

    async def test_exclusive_drafts_that_begin_at_once(self, api: Api) -> None:
        """Of two workers with the same question one gets it, and the other learns who has it."""
        for _ in range(20):
            session = await api.session()
            results = await race(*[lambda: begin(api, session.id, exclusive=True)] * 2)
            [winner] = [result for result in results if isinstance(result, str)]
            [error] = [result for result in results if not isinstance(result, str)]
            refusal = refusal_of(error)  # type: ignore[arg-type]
            assert refusal.info.reason == "DRAFT_OPEN"
            assert refusal.details["ResourceInfo"].resource_name == winner

    async def test_ninth_draft(self, api: Api) -> None:
        """A session has at most 8 open drafts, however many begin at once; another has its own."""
        session, elsewhere = await api.session(), await api.session()
        results = await race(*[lambda: begin(api, session.id)] * 12)
        ids = [result for result in results if isinstance(result, str)]
        assert len(ids) == 8
        for error in results:
            if not isinstance(error, str):
                refusal = refusal_of(error)  # type: ignore[arg-type]
                assert refusal.code is StatusCode.FAILED_PRECONDITION
                assert refusal.info.reason == "TOO_MANY_DRAFTS"
                [violation] = refusal.details["PreconditionFailure"].violations
                assert violation.subject == f"chat_sessions/{session.id}"
        await begin(api, elsewhere.id)
        await begin(api, session.id, ids[0])  # taking over adds none
        await stop_draft(api, ids[0])
        await begin(api, session.id)
        with refused(StatusCode.FAILED_PRECONDITION, "TOO_MANY_DRAFTS"):
            await begin(api, session.id)

    async def test_draft_moves_no_revision(self, api: Api) -> None:
        """A race of drafts leaves the session as it was."""
        session = await api.session()
        await race(*[lambda: begin(api, session.id, exclusive=True)] * 4)
        assert await get_revision(api, session.id) == 0
