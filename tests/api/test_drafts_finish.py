"""How a draft is finished: its state, metadata and attachments, and what is refused."""

import asyncio
from typing import Any

import pytest
from grpc import StatusCode
from support.attachments import delete_attachment, get_attachment, list_all_attachments
from support.client import Api, a_file, an_id, refused
from support.drafts import (
    COMPLETE,
    INCOMPLETE,
    STOPPED,
    DraftStream,
    get_draft,
    list_drafts,
    start_finished,
    writing,
)
from support.messages import get_message, sequences
from support.sessions import get_revision


async def refused_finish(stream: DraftStream, **finish: Any) -> dict[str, str]:
    """Finish with what is not valid. Returns the violations."""
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await stream.finish(**finish)
    return refusal.fields


class TestState:
    @pytest.mark.parametrize("state", [COMPLETE, INCOMPLETE])
    async def test_state_that_a_writer_may_give(self, api: Api, state: Any) -> None:
        """The message has it, also when it is read later."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("text")
            message = await stream.finish(state=state)
        assert (message.state, message.content) == (state, "text")
        assert await get_message(api, message.id) == message

    @pytest.mark.parametrize("state", [STOPPED, 3, -1])
    async def test_other_state_is_rejected(self, api: Api, state: Any) -> None:
        """STOPPED is what others do. The draft stays open, and is finished by the next stream."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("text")
            fields = await refused_finish(stream, state=state)
        assert fields == {"finish.state": "neither COMPLETE nor INCOMPLETE"}
        async with writing(api, session.id, stream.draft_id) as again:
            assert (await again.finish()).content == "text"

    @pytest.mark.parametrize("state", [COMPLETE, INCOMPLETE])
    async def test_empty_draft_is_dropped(self, api: Api, state: Any) -> None:
        """There is no message, whatever the finish has, and the session is as before."""
        session = await api.session()
        async with writing(api, session.id, metadata_json='{"a": 1}') as stream:
            await stream.append("")
            message = await stream.finish(state=state, attachments=[a_file()])
        assert not message.id
        assert await list_drafts(api, session.id) == []
        assert await get_revision(api, session.id) == 0
        with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
            await get_message(api, stream.draft_id)

    async def test_blank_text_is_text(self, api: Api) -> None:
        """Only a draft without a byte is empty."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("\n")
            assert (await stream.finish()).content == "\n"

    async def test_end_of_the_requests_is_no_finish(self, api: Api) -> None:
        """A caller that breaks off in an orderly way is told, and what it sent is kept."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("text")
            await stream.call.done_writing()
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await stream.until_error()
        assert refusal.fields == {"finish": "required as the last request"}
        assert (await get_draft(api, stream.draft_id)).content == "text"

    async def test_nothing_is_read_after_the_finish(self, api: Api) -> None:
        """It is the last request: what follows is neither stored nor refused."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("text")
            await stream.send(finish={"state": INCOMPLETE})
            await stream.append(" more")
            await stream.send(finish={})
            message = (await stream.until("finished")).finished.message
        assert (message.content, message.state) == ("text", INCOMPLETE)


class TestMetadata:
    async def test_metadata_of_the_finish_replaces_that_of_the_start(self, api: Api) -> None:
        """It is not merged."""
        session = await api.session()
        async with writing(api, session.id, metadata_json='{"a": 1}') as stream:
            await stream.append("x")
            message = await stream.finish(metadata_json='{"bb":1,"c":2.0,"bb":3}')
        assert message.metadata_json == '{"c": 2.0, "bb": 3}'
        assert await get_message(api, message.id) == message

    async def test_empty_metadata_keeps_that_of_the_start(self, api: Api) -> None:
        """An empty object, however, is metadata."""
        session = await api.session()
        for finish, kept in (("", '{"a": 1}'), ("{}", "{}")):
            async with writing(api, session.id, metadata_json='{"a": 1}') as stream:
                await stream.append("x")
                message = await stream.finish(metadata_json=finish)
            assert message.metadata_json == kept
            assert await get_message(api, message.id) == message

    @pytest.mark.parametrize("text", ["[]", "{", '{"a": "\\u0000"}', '{"a": NaN}'])
    async def test_metadata_that_is_rejected(self, api: Api, text: str) -> None:
        """By the rules of messages, at the start and at the finish. The draft stays open."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            async with writing(api, session.id, metadata_json=text):
                pass
        assert list(refusal.fields) == ["start.draft.metadata_json"]
        async with writing(api, session.id) as stream:
            await stream.append("x")
            assert list(await refused_finish(stream, metadata_json=text)) == [
                "finish.metadata_json"
            ]
        assert (await get_draft(api, stream.draft_id)).content == "x"


class TestAttachments:
    async def test_attachments_are_those_of_the_message(self, api: Api) -> None:
        """In order, with the ids that the caller chose, at times of their own."""
        session = await api.session()
        file_id = an_id()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            message = await stream.finish(
                attachments=[a_file(id=file_id, file_name="1.png"), a_file(file_name="2.png")]
            )
        assert [file.file_name for file in message.attachments] == ["1.png", "2.png"]
        assert message.attachments[0].id == file_id
        assert {file.message_id for file in message.attachments} == {message.id}
        assert await get_message(api, message.id) == message
        assert await get_attachment(api, file_id) == message.attachments[0]

    async def test_every_violation_is_reported_at_once(self, api: Api) -> None:
        """The draft stays open."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            fields = await refused_finish(
                stream,
                state=STOPPED,
                metadata_json="[]",
                attachments=[a_file(file_url="?"), a_file(id="?", file_type="")],
            )
        assert fields == {
            "finish.state": "neither COMPLETE nor INCOMPLETE",
            "finish.metadata_json": "not a JSON object",
            "finish.attachments[0].file_url": "not a URL",
            "finish.attachments[1].id": "not a UUID",
            "finish.attachments[1].file_type": "required",
        }
        assert (await get_draft(api, stream.draft_id)).content == "x"

    async def test_attachments_are_limited_to_20(self, api: Api) -> None:
        """20 are stored, 21 rejected, and so is an id that is there twice."""
        session = await api.session()
        file_id = an_id()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            fields = await refused_finish(stream, attachments=[a_file()] * 21)
            assert list(fields) == ["finish.attachments"]
        async with writing(api, session.id, stream.draft_id) as stream:
            fields = await refused_finish(stream, attachments=[a_file(id=file_id)] * 2)
            assert list(fields) == ["finish.attachments[1].id"]
        async with writing(api, session.id, stream.draft_id) as stream:
            assert len((await stream.finish(attachments=[a_file()] * 20)).attachments) == 20

    async def test_taken_attachment_id(self, api: Api) -> None:
        """Refused as with a message. The draft stays open and whole, and is finished without it."""
        session = await api.session()
        taken = await api.attachment((await api.message(session.id)).id)
        async with writing(api, session.id) as stream:
            await stream.append("x")
            with refused(StatusCode.ALREADY_EXISTS, "CHAT_ATTACHMENT_ALREADY_EXISTS") as refusal:
                await stream.finish(attachments=[a_file(), a_file(id=taken.id)])
            assert refusal.details["ResourceInfo"].resource_name == taken.id
        assert await sequences(api, session.id) == [1]
        async with writing(api, session.id, stream.draft_id) as again:
            assert (await again.finish()).content == "x"
        assert await list_all_attachments(api, message_id=stream.draft_id) == []

    async def test_url_that_is_not_accessible(self, start_server: Any, database: str) -> None:
        """FAILED_PRECONDITION. The draft stays open, and is finished without the attachment."""
        api = await start_server(database, attachment_url_check=True)
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            with refused(
                StatusCode.FAILED_PRECONDITION, "ATTACHMENT_URL_NOT_ACCESSIBLE"
            ) as refusal:
                await stream.finish(attachments=[a_file(file_url="https://127.0.0.1/a")])
        assert refusal.text == "file_url not accessible: attachment 1 of the request"
        assert await sequences(api, session.id) == []
        async with writing(api, session.id, stream.draft_id) as again:
            assert (await again.finish()).content == "x"


class TestRepeat:
    @pytest.mark.parametrize("state", [COMPLETE, INCOMPLETE])
    async def test_start_after_the_finish_returns_the_message(self, api: Api, state: Any) -> None:
        """A caller that did not learn the outcome does the same again, as often as it likes."""
        session = await api.session()
        fields = {"metadata_json": '{"a": 1}', "language_code": "de"}
        async with writing(api, session.id, **fields) as stream:
            await stream.append("x")
            message = await stream.finish(
                state=state, metadata_json='{"b": 2}', attachments=[a_file()]
            )
        for changed in ({}, {"exclusive": True}, {"metadata_json": ""}, {"expected_revision": 7}):
            repeated = await start_finished(
                api, session.id, stream.draft_id, **{**fields, **changed}
            )
            assert repeated == message
        assert await get_revision(api, session.id) == 1

    async def test_message_is_returned_as_it_is_now(self, api: Api) -> None:
        """As with a repeated create."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            message = await stream.finish(attachments=[a_file()])
        await delete_attachment(api, message.attachments[0].id)
        assert await start_finished(api, session.id, message.id) == await get_message(
            api, message.id
        )


async def test_drafts_that_are_finished_at_once(api: Api, another_server: Api) -> None:
    """On one server or two: one message each, at sequences of their own."""
    session = await api.session()

    async def write(number: int) -> int:
        async with writing((api, another_server)[number % 2], session.id) as stream:
            await stream.append(f"text {number}")
            message = await stream.finish()
            assert message.content == f"text {number}"
            return message.sequence

    done = []
    for _ in range(5):
        done += await asyncio.gather(*(write(number) for number in range(8)))
    assert sorted(done) == list(range(1, 41))
    assert await sequences(api, session.id) == sorted(done)
    assert await get_revision(api, session.id) == 40
