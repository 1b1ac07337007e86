"""Stopping a draft: what becomes of it, what its writer learns, and races with the writer."""

import asyncio

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.drafts import (
    COMPLETE,
    INCOMPLETE,
    STOPPED,
    get_draft,
    leave_draft,
    list_drafts,
    start_finished,
    stop_draft,
    write_message,
    writing,
)
from support.messages import ASSISTANT, delete_message, get_message, sequences
from support.sessions import delete_session, get_revision, get_session
from support.watching import assert_same_state, watching


class TestStop:
    async def test_message_has_what_is_durable(self, api: Api) -> None:
        """The message is STOPPED, and has the fields of the draft. It is a message like any."""
        session = await api.session()
        await api.message(session.id)
        fields = {"metadata_json": '{"a": 1}', "language_code": "de"}
        async with (
            watching(api, session.id) as watcher,
            writing(api, session.id, **fields) as stream,
        ):
            await watcher.until("caught_up")
            await stream.write("größer ")
            message = await stop_draft(api, stream.draft_id)
            assert (await watcher.until("messages_created")).messages_created.messages[0] == message
            await assert_same_state(api, watcher, session.id)
        assert (message.id, message.content) == (stream.draft_id, "größer ")
        assert (message.state, message.role) == (STOPPED, ASSISTANT)
        assert {name: getattr(message, name) for name in fields} == fields
        assert (message.sequence, message.revision) == (2, 2)
        assert await get_message(api, message.id) == message
        assert (await get_session(api, session.id)).update_time == message.create_time

    async def test_empty_draft_is_dropped(self, api: Api) -> None:
        """There is no message. Its writer hears it without one, and a repeat finds nothing."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            assert not (await stop_draft(api, stream.draft_id)).id
            assert not (await stream.until_stopped()).id
        assert await list_drafts(api, session.id) == []
        assert await get_revision(api, session.id) == 0
        with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND"):
            await stop_draft(api, stream.draft_id)

    async def test_repeat_returns_the_message(self, api: Api, another_server: Api) -> None:
        """From any server, as often as it is asked for."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "x")
        message = await stop_draft(another_server, draft_id)
        assert await stop_draft(api, draft_id) == message
        assert await stop_draft(another_server, draft_id) == message
        assert await get_revision(api, session.id) == 1

    @pytest.mark.parametrize("state", [COMPLETE, INCOMPLETE])
    async def test_draft_that_is_finished_already(self, api: Api, state: int) -> None:
        """The message is returned as it is: nobody stops what is finished."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.append("x")
            message = await stream.finish(state=state)
        assert await stop_draft(api, message.id) == message
        assert await get_message(api, message.id) == message

    async def test_id_of_a_message_that_was_no_draft(self, api: Api) -> None:
        """The message is returned: from the outside it is the same."""
        message = await api.message((await api.session()).id)
        assert await stop_draft(api, message.id) == message

    async def test_unknown_id(self, api: Api, other: Api) -> None:
        """Of nothing, of another tenant's draft, of a deleted message and of a deleted session."""
        session, theirs = await api.session(), await other.session()
        deleted = await write_message(api, session.id)
        await delete_message(api, deleted.id)
        foreign = await leave_draft(other, theirs.id, "x")
        gone = await api.session()
        with_session = await leave_draft(api, gone.id, "x")
        await delete_session(api, gone.id)
        for draft_id in (an_id(), foreign, deleted.id, with_session):
            with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND") as refusal:
                await stop_draft(api, draft_id)
            assert refusal.details["ResourceInfo"].resource_name == draft_id
        assert (await get_draft(other, foreign)).content == "x"


class TestWriter:
    async def test_writer_hears_it_at_once(self, api: Api, another_server: Api) -> None:
        """On whatever server each of them is, with the message, and the stream ends with OK."""
        session = await api.session()
        for writer, stopper in (
            (api, api),
            (another_server, another_server),
            (another_server, api),  # told by the notification: this server does not poll
        ):
            async with writing(writer, session.id) as stream:
                await stream.write("x")
                message = await stop_draft(stopper, stream.draft_id)
                async with asyncio.timeout(1):
                    assert await stream.until_stopped() == message

    async def test_other_writers_of_the_session_go_on(self, api: Api, another_server: Api) -> None:
        """Only the draft that was stopped ends."""
        session = await api.session()
        async with writing(api, session.id) as one, writing(another_server, session.id) as two:
            await one.write("one")
            await stop_draft(another_server, one.draft_id)
            await one.until_stopped()
            await two.write("two")
            assert (await two.finish()).state == COMPLETE

    @pytest.mark.parametrize("offset", [None, 0], ids=["more", "repeat"])
    @pytest.mark.parametrize("state", ["stopped", "incomplete", None])
    async def test_append_of_a_writer_that_was_not_told(
        self, api: Api, database: str, state: str | None, offset: int | None
    ) -> None:
        """It gets what became of the draft, as soon as it sends something."""
        session = await api.session()
        async with writing(api, session.id) as stream:
            await stream.write("x")
            # As another server would, whose notification is lost.
            async with await psycopg.AsyncConnection.connect(database) as connection:
                await connection.execute("DELETE FROM chat_drafts WHERE id = %s", [stream.draft_id])
                if state is not None:
                    await connection.execute(
                        "INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision,"
                        " role, content, state) VALUES (%s, %s, %s, 1, 1, 'assistant', 'x', %s)",
                        [api.tenant, stream.draft_id, session.id, state],
                    )
                    await connection.execute(
                        "UPDATE chat_sessions SET revision = 1 WHERE id = %s", [session.id]
                    )
            await stream.append("x", offset)
            message = await stream.until_stopped()
        if state is None:
            assert not message.id
        else:
            assert message == await get_message(api, stream.draft_id)
            assert message.state == {"stopped": STOPPED, "incomplete": INCOMPLETE}[state]

    async def test_writer_that_resumes_too_late(self, api: Api) -> None:
        """It gets the message, as finished: it has nothing more to write."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "x")
        message = await stop_draft(api, draft_id)
        assert await start_finished(api, session.id, draft_id) == message


class TestRaces:
    async def test_stop_and_finish(self, api: Api, another_server: Api) -> None:
        """Exactly one message, and both callers see the same one."""
        for number in range(50):
            session = await api.session()
            async with writing(api, session.id) as stream:
                await stream.append("x")
                if number % 2:
                    await stream.until_written(1)
                await stream.send(finish={})
                stopper = (api, another_server)[number % 3 % 2]
                stopped = await stop_draft(stopper, stream.draft_id)
                while (response := await stream.next()).HasField("written"):
                    pass
                ended = response.finished if response.HasField("finished") else response.stopped
                message = ended.message
                await stream.assert_ended()
            assert message == stopped
            assert await get_revision(api, session.id) == (1 if message.id else 0)
            if message.id:
                assert await get_message(api, stream.draft_id) == message

    async def test_stops_at_once(self, api: Api, another_server: Api) -> None:
        """One of them makes the message, and all return it."""
        session = await api.session()
        for number in range(10):
            draft_id = await leave_draft(api, session.id, "x")
            first, *others = await asyncio.gather(
                *(stop_draft(by, draft_id) for by in (api, another_server) * 3)
            )
            assert all(message == first for message in others)
            assert (first.sequence, first.state) == (number + 1, STOPPED)
        assert await sequences(api, session.id) == list(range(1, 11))

    async def test_stop_while_text_is_written(self, api: Api, another_server: Api) -> None:
        """What was acknowledged is in the message, and nothing that the writer did not send."""
        session = await api.session()
        text = "".join(f"{number}é " for number in range(2000))
        for number in range(10):
            async with writing(api, session.id) as stream:

                async def send() -> None:
                    for start in range(0, len(text), 7):
                        await stream.append(text[start : start + 7])
                        await asyncio.sleep(0)

                sending = asyncio.create_task(send())
                await stream.until("written")
                await asyncio.sleep(0.002 * number)
                stopped = await stop_draft((api, another_server)[number % 2], stream.draft_id)
                assert await stream.until_stopped() == stopped
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            content = stopped.content.encode()
            assert len(content) >= stream.written > 0
            assert text.encode().startswith(content)
            assert await get_message(api, stream.draft_id) == stopped
        assert await list_drafts(api, session.id) == []

    async def test_stop_and_deletion_of_the_session(self, api: Api, another_server: Api) -> None:
        """The stop returns the message, or NOT_FOUND; nothing is left either way."""
        for _ in range(10):
            session = await api.session()
            draft_id = await leave_draft(api, session.id, "x")
            stopped, _ = await asyncio.gather(
                stop_draft(another_server, draft_id),
                delete_session(api, session.id),
                return_exceptions=True,
            )
            if isinstance(stopped, BaseException):
                with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND"):
                    raise stopped
            with refused(StatusCode.NOT_FOUND, "CHAT_DRAFT_NOT_FOUND"):
                await stop_draft(api, draft_id)
