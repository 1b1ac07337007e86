"""Resuming a draft: on this server and another, against the writer before, and when it is over."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.drafts import (
    INCOMPLETE,
    STOPPED,
    DraftStream,
    a_start,
    get_draft,
    leave_draft,
    start_finished,
    stop_draft,
    unstarted,
    write_message,
    writing,
)
from support.messages import delete_message, sequences
from support.quotas import refusal_of

from chat_ticket_svc.server import Server
from chat_ticket_svc.store import draft_commit, drafts
from chat_ticket_svc.store.database import Database

TAKE_OVER = "UPDATE chat_drafts SET fencing_token = fencing_token + 1 WHERE id = %s"


@asynccontextmanager
async def connected(database: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A connection that commits each statement, and that tells no server what it has done."""
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        yield connection


async def assert_taken_over(stream: DraftStream) -> None:
    with refused(StatusCode.ABORTED, "DRAFT_TAKEN_OVER"):
        await stream.until_error()


@pytest.fixture(params=["same server", "another server"])
def resumer(request: pytest.FixtureRequest, api: Api, another_server: Api) -> Api:
    """A client of the server that the draft is resumed on."""
    return api if request.param == "same server" else another_server


class TestResume:
    async def test_writer_goes_on_where_it_was(self, api: Api, resumer: Api) -> None:
        """After its stream has broken: `started` has the length, in bytes."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "größer ")
        async with writing(resumer, session.id, draft_id) as stream:
            assert stream.offset == 9
            await stream.append("als")
            message = await stream.finish()
        assert (message.content, message.sequence) == ("größer als", 1)

    async def test_unacknowledged_text_is_sent_again(self, api: Api, resumer: Api) -> None:
        """From the length on; or all of it, as what is there is compared and not added again."""
        session = await api.session()
        text = " ".join(f"word {number} é" for number in range(200))
        for again_from_start in (True, False):
            async with writing(api, session.id) as stream:
                for start in range(0, len(text), 10):
                    await stream.append(text[start : start + 10])
                await stream.until("written")
            async with writing(resumer, session.id, stream.draft_id) as again:
                assert again.written >= stream.written
                rest = text.encode()[again.written :].decode()
                await again.append(*((text, 0) if again_from_start else (rest,)))
                assert (await again.finish()).content == text

    async def test_resume_renews_the_lease(self, api: Api) -> None:
        """A writer that is back has all its time again."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id)
        before = (await get_draft(api, draft_id)).expire_time.ToNanoseconds()
        async with writing(api, session.id, draft_id):
            assert (await get_draft(api, draft_id)).expire_time.ToNanoseconds() > before

    async def test_resume_again_and_again(self, api: Api, another_server: Api) -> None:
        """By one stream after the other, on both servers in turn."""
        session = await api.session()
        draft_id = an_id()
        for number in range(10):
            async with writing((api, another_server)[number % 2], session.id, draft_id) as stream:
                assert stream.offset == number
                await stream.write(str(number))
        async with writing(api, session.id, draft_id) as stream:
            assert (await stream.finish()).content == "0123456789"


class TestFencing:
    async def test_writer_before_learns_it(self, api: Api, resumer: Api) -> None:
        """Soon and without sending anything, wherever the draft was taken over."""
        session = await api.session()
        async with writing(api, session.id) as old, writing(resumer, session.id, old.draft_id):
            async with asyncio.timeout(5):
                await assert_taken_over(old)

    async def test_writer_before_writes_no_more(self, api: Api, another_server: Api) -> None:
        """Also when no notification reaches it: here its server is not the one that is told."""
        session = await api.session()
        async with writing(another_server, session.id) as old:
            await old.write("old")
            async with writing(api, session.id, old.draft_id) as new:
                await old.append(" late")
                await new.append(" new")
                await assert_taken_over(old)
                assert (await new.finish()).content == "old new"

    @pytest.mark.parametrize(
        ("offset", "text"), [(None, " late"), (None, ""), (0, "old"), (0, "old!"), (1, "ld late")]
    )
    async def test_append_of_a_writer_that_was_not_told(
        self, api: Api, database: str, offset: int | None, text: str
    ) -> None:
        """However late it wakes: text, a renewal, or the repeat of what is there."""
        session = await api.session()
        async with writing(api, session.id) as old, connected(database) as connection:
            await old.write("old")
            lease = (await get_draft(api, old.draft_id)).expire_time
            await connection.execute(TAKE_OVER, [old.draft_id])
            # The writer after it has written already.
            await connection.execute(
                "INSERT INTO chat_draft_pieces (tenant_id, draft_id, start_offset, content)"
                " SELECT tenant_id, id, 3, ' new' FROM chat_drafts WHERE id = %s",
                [old.draft_id],
            )
            await connection.execute(
                "UPDATE chat_drafts SET length = 7 WHERE id = %s", [old.draft_id]
            )
            await old.append(text, offset)
            await assert_taken_over(old)
        draft = await get_draft(api, old.draft_id)
        assert (draft.content, draft.expire_time) == ("old new", lease)

    async def test_finish_of_a_writer_that_was_not_told(self, api: Api, database: str) -> None:
        """It finishes nothing: the draft is another's."""
        session = await api.session()
        async with writing(api, session.id) as old, connected(database) as connection:
            await old.write("old")
            await connection.execute(TAKE_OVER, [old.draft_id])
            with refused(StatusCode.ABORTED, "DRAFT_TAKEN_OVER"):
                await old.finish()
        assert (await get_draft(api, old.draft_id)).content == "old"

    async def test_draft_that_was_dropped_and_begins_again(
        self, api: Api, another_server: Api, database: str
    ) -> None:
        """It is another draft: a writer of the one before, which was not told, is fenced."""
        session = await api.session()
        async with writing(api, session.id) as old, connected(database) as connection:
            await connection.execute("DELETE FROM chat_drafts WHERE id = %s", [old.draft_id])
            async with writing(another_server, session.id, old.draft_id) as new:
                await old.append("old")
                await assert_taken_over(old)
                await new.append("new")
                assert (await new.finish()).content == "new"

    async def test_repeat_after_the_end_of_the_draft(self, api: Api, database: str) -> None:
        """A writer that was not told is told then: the text that follows is no gap."""
        session = await api.session()
        async with writing(api, session.id) as stream, connected(database) as connection:
            await stream.write("text")
            await connection.execute("DELETE FROM chat_drafts WHERE id = %s", [stream.draft_id])
            await stream.append("text and", 0)
            await stream.append(" more")
            assert not (await stream.until_stopped()).id

    async def test_append_in_flight_when_the_draft_is_taken_over(
        self, api: Api, database: str
    ) -> None:
        """Text that waits for a locked draft is written only if the draft is still its writer's."""
        session = await api.session()
        for statement, text in ((TAKE_OVER, ""), ("SELECT %s", " late")):
            async with (
                writing(api, session.id) as old,
                await psycopg.AsyncConnection.connect(database) as connection,
            ):
                await old.write("old")
                await connection.execute(
                    "SELECT FROM chat_drafts WHERE id = %s FOR UPDATE", [old.draft_id]
                )
                await old.append(" late")
                await asyncio.sleep(draft_commit.LOCKED_RETRY_SECONDS * 3)
                assert old.written == 3
                await connection.execute(statement, [old.draft_id])
                await connection.commit()
                if text:
                    await old.until_written(8)
                else:
                    await assert_taken_over(old)
                assert (await get_draft(api, old.draft_id)).content == "old" + text

    async def test_append_beside_that_of_the_next_writer(
        self, api: Api, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One statement has the text of both: only what was stored is acknowledged."""
        session = await api.session()
        commit = server._draft_commit
        write = commit._db.write_pipelined
        writes, released = asyncio.Event(), asyncio.Event()

        async def write_when_released(*arguments: Any) -> Any:
            writes.set()
            await released.wait()
            return await write(*arguments)

        async def check_nothing(_: object) -> None:
            """As if no notification arrived, and the poll was yet to come."""

        monkeypatch.setattr(commit, "_check_drafts", check_nothing)
        monkeypatch.setattr(commit._db, "write_pipelined", write_when_released)
        async with (
            writing(api, session.id) as other,
            writing(api, session.id) as old,
            writing(api, session.id, old.draft_id) as new,
        ):
            await other.append("other")
            await writes.wait()
            await old.append("old!")
            await new.append("new")
            while len(commit._dirty) < 2:
                await asyncio.sleep(0.005)
            released.set()
            await assert_taken_over(old)
            assert old.written == 0
            assert (await new.finish()).content == "new"

    async def test_locked_draft_holds_up_no_other(self, api: Api, database: str) -> None:
        """The text of other writers is added meanwhile."""
        session = await api.session()
        async with (
            writing(api, session.id) as locked,
            writing(api, session.id) as other,
            await psycopg.AsyncConnection.connect(database) as connection,
        ):
            await connection.execute(
                "SELECT FROM chat_drafts WHERE id = %s FOR UPDATE", [locked.draft_id]
            )
            await locked.append("waits")
            for number in range(10):
                await other.write(f"{number} ")
            assert locked.written == 0
            await connection.rollback()
            await locked.until_written(5)

    async def test_takeover_that_the_network_repeats(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A statement that comes late, after its server has given it up, fences nobody."""
        takeovers = []
        write: Any = Database.write

        async def recorded(db: Database, sql: Any, params: Any, *args: Any, **options: Any) -> Any:
            if sql is drafts.TAKE_OVER:
                takeovers.append((db, dict(params)))
            return await write(db, sql, params, *args, **options)

        monkeypatch.setattr(Database, "write", recorded)
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "old")
        async with writing(api, session.id, draft_id) as new:
            [(db, params)] = takeovers
            await write(db, drafts.TAKE_OVER, params, drafts.Lease, idempotent=True)
            await new.write(" new")
            assert (await new.finish()).content == "old new"

    async def test_streams_that_begin_at_once(self, api: Api, another_server: Api) -> None:
        """Of streams with the same start, on two servers, exactly one can write."""
        for _ in range(10):
            session = await api.session()
            draft_id = an_id()

            async def write(by: Api) -> str:
                # Each has text of its own, so that who wrote is seen.
                async with unstarted(by) as stream:
                    start = a_start(session.id, draft_id, exclusive=True)
                    await stream.send(start=start)
                    assert (await stream.next()).HasField("started")
                    await ready.wait()
                    text = an_id()
                    await stream.append(text, offset=0)
                    try:
                        await stream.until_written(len(text))
                    finally:
                        # Who finishes before would let the others hear that it is finished.
                        await decided.wait()
                    await stream.finish()
                    return text

            ready, decided = asyncio.Barrier(4), asyncio.Barrier(4)
            results = await asyncio.gather(
                *(write(by) for by in (api, another_server) * 2), return_exceptions=True
            )
            [winner] = [result for result in results if isinstance(result, str)]
            reasons = {
                refusal_of(result).info.reason
                for result in results
                if isinstance(result, BaseException)
            }
            assert reasons == {"DRAFT_TAKEN_OVER"}
            message = await start_finished(api, session.id, draft_id)
            assert (message.content, message.sequence) == (winner, 1)

    async def test_what_was_acknowledged_is_there_for_the_next(
        self, api: Api, another_server: Api
    ) -> None:
        """Writers that take the draft from each other while they write lose nothing."""
        session = await api.session()
        draft_id = an_id()
        text = "0123456789" * 200

        async def write_until_taken_over(stream: DraftStream) -> None:
            async def read() -> None:
                await assert_taken_over(stream)

            reading = asyncio.create_task(read())
            while not reading.done() and stream.offset < len(text):
                await stream.append(text[stream.offset : stream.offset + 1])
                await asyncio.sleep(0)
            await reading

        acknowledged = 0
        for number in range(8):
            by = (api, another_server)[number % 2]
            async with writing(by, session.id, draft_id) as stream:
                assert stream.written >= acknowledged
                task = asyncio.create_task(write_until_taken_over(stream))
                await asyncio.sleep(0.01)
                async with writing((api, another_server)[(number // 2) % 2], session.id, draft_id):
                    await task
                acknowledged = stream.written
        content = (await stop_draft(api, draft_id)).content
        assert len(content) >= acknowledged > 0
        assert content == text[: len(content)]


class TestTooLate:
    @pytest.mark.parametrize("how", ["complete", "incomplete", "stopped"])
    async def test_draft_that_was_ended_meanwhile(self, api: Api, resumer: Api, how: str) -> None:
        """The writer that resumes gets the message, as the only response."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "text")
        if how == "stopped":
            message = await stop_draft(api, draft_id)
        else:
            async with writing(api, session.id, draft_id) as stream:
                message = await stream.finish(state=INCOMPLETE if how == "incomplete" else 0)
        assert message.state == {"incomplete": INCOMPLETE, "stopped": STOPPED}.get(how, 0)
        assert await start_finished(resumer, session.id, draft_id) == message
        assert await sequences(api, session.id) == [1]

    async def test_empty_draft_that_was_ended_meanwhile(self, api: Api, resumer: Api) -> None:
        """Nothing is left of it, so the same start begins it anew."""
        session = await api.session()
        draft_id = await leave_draft(api, session.id)
        await stop_draft(api, draft_id)
        assert (await write_message(resumer, session.id, "text", draft_id)).content == "text"

    async def test_message_that_was_deleted_meanwhile(self, api: Api, resumer: Api) -> None:
        """Its id is not used again."""
        session = await api.session()
        message = await write_message(api, session.id)
        await delete_message(api, message.id)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_MESSAGE_ALREADY_EXISTS"):
            async with writing(resumer, session.id, message.id):
                pass

    async def test_start_that_races_with_the_finish(self, api: Api, another_server: Api) -> None:
        """It takes the draft over, so that the finish is fenced, or gets the message."""
        for number in range(20):
            session = await api.session()
            by = (api, another_server)[number % 2]
            async with writing(api, session.id) as stream, unstarted(by) as late:
                await stream.append("text")
                await late.send(start=a_start(session.id, stream.draft_id))
                finished, started = await asyncio.gather(
                    stream.finish(), late.next(), return_exceptions=True
                )
                assert not isinstance(started, BaseException)
                if isinstance(finished, BaseException):
                    assert refusal_of(finished).info.reason == "DRAFT_TAKEN_OVER"
                    await late.append("text", offset=0)
                    assert (await late.finish()).content == "text"
                else:
                    assert started.finished.message == finished
            assert await sequences(api, session.id) == [1]
