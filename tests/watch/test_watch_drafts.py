"""WatchChatSession with `include_drafts`: messages while they are written, and how they end."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id
from support.drafts import leave_draft, list_drafts, stop_draft, writing
from support.messages import KIB, delete_message
from support.sessions import RESOLVED, set_status
from support.watching import following, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket_svc.store import draft_following, session_changes


@pytest.fixture
async def unpolled(start_server: Any, database: str) -> Api:
    """A client of a server that does not poll: only a write wakes a watcher."""
    return await start_server(database, watch_poll_interval_seconds=3600)  # type: ignore[no-any-return]


class Gate:
    """Holds back what was read until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str):
        self._opened = asyncio.Event()
        self.reached = asyncio.Event()
        read = getattr(module, name)

        async def held(*arguments: Any, **named: Any) -> Any:
            found = await read(*arguments, **named)
            self.reached.set()
            await self._opened.wait()
            return found

        monkeypatch.setattr(module, name, held)

    def open(self) -> None:
        self._opened.set()


class TestWhileItIsWritten:
    async def test_text_comes_as_it_is_written_then_the_message(self, unpolled: Api) -> None:
        """The draft when it begins, each piece, the end, and just after it the message."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher, writing(api, session.id) as writer:
            draft = (await watcher.next()).draft
            assert [draft] == await list_drafts(api, session.id)
            assert (draft.id, draft.content) == (writer.draft_id, "")
            for text in ("The ", "answer é", "\n ist 42"):
                offset = writer.offset
                await writer.write(text)
                appended = (await watcher.next()).draft_appended
                assert (appended.draft_id, appended.offset, appended.text) == (
                    writer.draft_id,
                    offset,
                    text,
                )
            message = await writer.finish()
            assert (await watcher.next()).draft_ended.draft_id == message.id
            event = await watcher.next()
            assert list(event.messages_created.messages) == [message]
            assert event.revision == message.sequence
            assert watcher.ended_drafts[message.id].decode() == message.content

    async def test_who_does_not_ask_sees_messages_only(self, unpolled: Api) -> None:
        """Nothing of the draft, before the message or after it."""
        api = unpolled
        session = await api.session()
        await leave_draft(api, session.id, "another")
        async with (
            watching(api, session.id) as plain,
            following(api, session.id) as follower,
            writing(api, session.id) as writer,
        ):
            await writer.write("text")
            await follower.until_draft(writer.draft_id, "text")
            message = await writer.finish()
            await plain.until_revision(message.sequence)
            assert plain.kinds == ["session", "caught_up", "messages_created"]

    async def test_messages_go_on_beside_drafts(self, unpolled: Api) -> None:
        """Several drafts and messages of others: each in order, and each draft by itself."""
        api = unpolled
        session = await api.session()
        async with (
            following(api, session.id) as watcher,
            writing(api, session.id) as one,
            writing(api, session.id) as two,
        ):
            await one.write("1")
            question = await api.message(session.id, "a question")
            await two.write("2")
            await watcher.until_revision(question.sequence)
            await watcher.until_draft(one.draft_id, "1")
            await watcher.until_draft(two.draft_id, "2")
            message = await one.finish()
            await watcher.until_revision(message.sequence)
            await two.write("3")
            await watcher.until_draft(two.draft_id, "23")
            message = await two.finish()
            await watcher.until_revision(message.sequence)
            assert watcher.created == [1, 2, 3]
            assert watcher.drafts == {}

    async def test_draft_that_is_taken_over_goes_on(self, unpolled: Api) -> None:
        """Followers see no difference: it is not sent as a whole again."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher:
            draft_id = await leave_draft(api, session.id, "from one, ")
            await watcher.until_draft(draft_id, "from one, ")
            async with writing(api, session.id, draft_id) as writer:
                await writer.write("from another")
                await watcher.until_draft(draft_id, "from one, from another")
            assert watcher.kinds.count("draft") == 1

    async def test_other_sessions_and_tenants_are_not_shown(self, api: Api, other: Api) -> None:
        """Not another session of the tenant, and not another tenant's session of the same id."""
        session, elsewhere = await api.session(), await api.session()
        theirs = await other.session(id=session.id)
        async with following(api, session.id) as watcher:
            await leave_draft(api, elsewhere.id, "elsewhere")
            await leave_draft(other, theirs.id, "theirs")
            draft_id = await leave_draft(api, session.id, "mine")
            await watcher.until_draft(draft_id, "mine")
            assert set(watcher.drafts) == {draft_id}


class TestBegin:
    async def test_open_drafts_come_before_caught_up(self, unpolled: Api) -> None:
        """After the history, oldest first. A stream that resumes receives them again."""
        api = unpolled
        session = await api.session()
        message = await api.message(session.id)
        drafts = [await leave_draft(api, session.id, f"draft {n}") for n in range(3)]
        for after, history in ((0, ["messages_created"]), (message.sequence, [])):
            async with following(api, session.id, after) as watcher:
                assert watcher.kinds == ["session", *history, *["draft"] * 3, "caught_up"]
                assert list(watcher.drafts) == drafts
                assert [text.decode() for text in watcher.drafts.values()] == [
                    "draft 0",
                    "draft 1",
                    "draft 2",
                ]

    async def test_moves_no_position_before_caught_up(self, unpolled: Api) -> None:
        """A stream that resumes where only the session has changed: the draft comes before that."""
        api = unpolled
        session = await api.session()
        await set_status(api, session.id, RESOLVED)
        await leave_draft(api, session.id, "text")
        async with watching(api, session.id, include_drafts=True) as watcher:
            events = [await watcher.next() for _ in range(3)]
            assert watcher.kinds == ["session", "draft", "caught_up"]
            assert [event.revision for event in events] == [0, 0, 1]

    async def test_draft_that_nothing_announced_comes_before_caught_up(
        self, unpolled: Api, database: str
    ) -> None:
        """A stream reads the drafts itself, and does not rely on what others have read before."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id):
            draft_id = an_id()
            with psycopg.connect(database) as connection:
                connection.execute(
                    "INSERT INTO chat_drafts (tenant_id, id, session_id, role, expires_at)"
                    " VALUES (%s, %s, %s, 'user', now() + interval '1 hour')",
                    [api.tenant, draft_id, session.id],
                )
            async with following(api, session.id) as watcher:
                assert watcher.drafts == {draft_id: b""}

    async def test_whole_draft_has_all_fields(self, unpolled: Api) -> None:
        """As ListChatDrafts returns it."""
        api = unpolled
        session = await api.session()
        fields = {"metadata_json": '{"model": "m"}', "language_code": "de", "role": 1}
        async with writing(api, session.id, **fields) as writer:
            await writer.write("text")
            async with watching(api, session.id, include_drafts=True) as watcher:
                event = await watcher.until("draft")
                assert [event.draft] == await list_drafts(api, session.id)
                assert event.draft.metadata_json == '{"model": "m"}'

    async def test_large_drafts_come_whole(self, unpolled: Api) -> None:
        """Eight drafts of the largest size, to several streams at once, and what they get later."""
        api = unpolled
        session = await api.session()
        text = "é" * (128 * KIB - 5)
        drafts = [await leave_draft(api, session.id) for _ in range(8)]
        for draft_id in drafts:
            async with writing(api, session.id, draft_id) as writer:
                for start in range(0, len(text), 16 * KIB):
                    await writer.append(text[start : start + 16 * KIB])
                await writer.until_written(writer.offset)

        async def follow() -> None:
            async with following(api, session.id) as watcher:
                assert [draft.decode() for draft in watcher.drafts.values()] == [text] * 8
                ready.release()
                await watcher.until_draft(drafts[3], text + "end")

        ready = asyncio.Semaphore(0)
        followers = [asyncio.create_task(follow()) for _ in range(3)]
        for _ in followers:
            await ready.acquire()
        async with writing(api, session.id, drafts[3]) as writer:
            await writer.write("end")
            await asyncio.gather(*followers)


class TestEnd:
    async def test_stopped_draft_becomes_a_message(self, unpolled: Api) -> None:
        """The end comes, and then the message with its state."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher:
            draft_id = await leave_draft(api, session.id, "text")
            stopped = await stop_draft(api, draft_id)
            event = await watcher.until("messages_created")
            assert list(event.messages_created.messages) == [stopped]
            assert stopped.state == r.CHAT_MESSAGE_STATE_STOPPED
            assert watcher.kinds[-2] == "draft_ended"

    async def test_draft_of_a_lost_writer_becomes_a_message(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Nobody writes to it any more: the server ends it."""
        api = await start_server(fresh_database, draft_seconds=1, watch_poll_interval_seconds=3600)
        session = await api.session()
        async with following(api, session.id) as watcher:
            draft_id = await leave_draft(api, session.id, "text")
            [message] = (await watcher.until("messages_created")).messages_created.messages
            assert (message.id, message.state) == (draft_id, r.CHAT_MESSAGE_STATE_INCOMPLETE)
            assert watcher.kinds[-2] == "draft_ended"

    async def test_empty_draft_that_is_dropped_only_ends(self, unpolled: Api) -> None:
        """Without a message, and without a change of the position."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher, writing(api, session.id) as writer:
            await watcher.until("draft")
            await writer.finish()
            assert (await watcher.next()).draft_ended.draft_id == writer.draft_id
            await api.message(session.id)
            await watcher.until_revision(1)
            assert watcher.kinds[-3:] == ["draft", "draft_ended", "messages_created"]

    async def test_deletion_of_the_session_ends_its_drafts(self, unpolled: Api) -> None:
        """Each of them, and then the stream."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher:
            for text in ("one", "two"):
                await watcher.until_draft(await leave_draft(api, session.id, text), text)
            await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session.id))
            await watcher.until("session_deleted")
            assert watcher.kinds[-3:] == ["draft_ended", "draft_ended", "session_deleted"]
            await watcher.end()
            assert await watcher._call.code() is StatusCode.OK

    async def test_each_end_comes_just_before_its_message(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if several messages come at once. To others, they come in one event."""
        api = unpolled
        session = await api.session()
        async with (
            following(api, session.id) as watcher,
            following(api, session.id) as another,
            watching(api, session.id) as plain,
            writing(api, session.id) as one,
            writing(api, session.id) as two,
            writing(api, session.id) as three,
        ):
            await plain.until("caught_up")
            for writer in (one, two, three):
                await writer.write("text")
                for each in (watcher, another):
                    await each.until_draft(writer.draft_id, "text")
            gate = Gate(monkeypatch, session_changes, "page")
            await api.message(session.id)  # 1, which is read alone
            await gate.reached.wait()
            await one.finish()  # 2
            await api.message(session.id)  # 3
            await api.message(session.id)  # 4
            deleted = await two.finish()  # 5, and deleted by 7
            await three.finish()  # 6
            await delete_message(api, deleted.id)
            gate.open()
            for each in (watcher, another, plain):
                await each.until_revision(7)
                assert each.created == [1, 2, 3, 4, 6]
            assert plain.kinds[-2:] == ["messages_created", "message_deleted"]
            for each in (watcher, another):
                assert each.kinds[-7:] == [
                    "messages_created",  # 1
                    "draft_ended",
                    "messages_created",  # 2, 3 and 4
                    "draft_ended",
                    "messages_created",  # 6
                    "draft_ended",
                    "message_deleted",  # 7
                ]

    async def test_draft_is_not_shown_again_after_its_message(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However late the read arrives that still saw the draft."""
        api = unpolled
        session = await api.session()
        async with following(api, session.id) as watcher, writing(api, session.id) as writer:
            await watcher.until("draft")
            gate = Gate(monkeypatch, draft_following, "read")
            await writer.write("text")
            await gate.reached.wait()
            message = await writer.finish()
            await watcher.until_revision(message.sequence)
            gate.open()
            draft_id = await leave_draft(api, session.id, "next")
            await watcher.until_draft(draft_id, "next")
            assert set(watcher.ended_drafts) == {message.id}

    async def test_message_comes_right_after_the_end_however_late_it_is_read(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The drafts may be read sooner than the messages: one that is missing is still open."""
        api = unpolled
        session = await api.session()
        async with (
            following(api, session.id) as watcher,
            writing(api, session.id) as one,
            writing(api, session.id) as two,
        ):
            await one.write("one")
            await watcher.until_draft(one.draft_id, "one")
            gate = Gate(monkeypatch, session_changes, "page")
            message = await one.finish()
            await two.write("two")
            await watcher.until_draft(two.draft_id, "two")
            assert watcher.ended_drafts == {}
            gate.open()
            await watcher.until_revision(message.sequence)
            assert watcher.kinds[-2:] == ["draft_ended", "messages_created"]
