"""WatchChatSession: the changes after a revision, then every change as it happens."""

import asyncio
import random
import re
from typing import Any, LiteralString

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.messages import create_batch, delete_message, set_metadata, user_message
from support.server import serving
from support.sessions import ARCHIVED, RESOLVED, get_session, set_status
from support.tickets import unlink
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import DeleteChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import GetChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
)
from chat_ticket_svc.store import group_commit, message_listing, messages, session_changes


class TestHistory:
    async def test_session_then_messages_then_caught_up(self, api: Api) -> None:
        """The session is the first event, at the requested position; caught_up ends the history."""
        session = await api.session()
        first = await api.message(session.id, attachments=[a_file()])
        second = await api.message(session.id, metadata_json="{}")
        async with watching(api, session.id) as watcher:
            event = await watcher.next()
            assert (event.revision, event.session.revision) == (0, 2)
            event = await watcher.next()
            assert list(event.messages_created.messages) == [first, second]
            assert event.revision == 2
            assert (await watcher.next()).HasField("caught_up")
            assert watcher.revision == 2

    async def test_empty_session(self, api: Api) -> None:
        """The session and caught_up, at revision 0."""
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert watcher.kinds == ["session", "caught_up"]
            assert watcher.revision == 0

    async def test_long_history_comes_in_pages(self, api: Api) -> None:
        """The first page is small, none over 500, every message once and in order."""
        session = await api.session()
        for _ in range(3):
            await create_batch(api, session.id, [user_message("x")] * 500)
        async with watching(api, session.id) as watcher:
            await watcher.next()
            sizes = []
            while (event := await watcher.next()).HasField("messages_created"):
                sizes.append(len(event.messages_created.messages))
            assert sizes == [32, 64, 128, 256, 500, 500, 20]
            assert watcher.created == list(range(1, 1501))

    async def test_large_messages_come_in_smaller_pages(self, api: Api) -> None:
        """A response stays under the 4 MiB that callers accept."""
        session = await api.session()
        for _ in range(12):
            await api.message(session.id, "x" * 256 * 1024)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert watcher.created == list(range(1, 13))

    async def test_resume_at_any_revision(self, api: Api) -> None:
        """Whatever the revision, a watcher that resumes there misses and repeats nothing."""
        session = await api.session()
        messages = [await api.message(session.id, metadata_json='{"n": 0}') for _ in range(4)]
        await set_metadata(api, messages[0].id, '{"n": 1}')
        await delete_message(api, messages[1].id)
        await api.attachment(messages[2].id)
        await set_status(api, session.id, RESOLVED)
        await api.message(session.id)
        await delete_message(api, messages[3].id)
        last = (await get_session(api, session.id)).revision
        assert last == 10
        for after in range(last + 1):
            async with watching(api, session.id, after) as watcher:
                # What a client that stopped at this revision held.
                watcher.messages = {m.id: m for m in messages if m.sequence <= after}
                first = await watcher.next()
                assert first.revision == after
                assert first.HasField("session")
                await watcher.until("caught_up")
                assert all(sequence > after for sequence in watcher.created)
                if after >= 6:
                    watcher.messages.pop(messages[1].id, None)
                if after >= 7:
                    request = GetChatMessageRequest(message_id=messages[2].id)
                    watcher.messages[messages[2].id] = (
                        await api.messages.GetChatMessage(request)
                    ).message
                if after >= 5:
                    request = GetChatMessageRequest(message_id=messages[0].id)
                    watcher.messages[messages[0].id] = (
                        await api.messages.GetChatMessage(request)
                    ).message
                if after >= 10:
                    watcher.messages.pop(messages[3].id, None)
                await assert_same_state(api, watcher, session.id)

    async def test_history_has_changes_and_deletions_in_order(self, api: Api) -> None:
        """After a revision: what was created, changed and deleted since, by revision."""
        session = await api.session()
        one, two, three = [await api.message(session.id) for _ in range(3)]
        await set_metadata(api, two.id, "{}")  # revision 4
        await delete_message(api, one.id)  # 5
        four = await api.message(session.id)  # 6
        await set_metadata(api, three.id, "{}")  # 7
        async with watching(api, session.id, after=3) as watcher:
            watcher.messages = {two.id: two, three.id: three}
            await watcher.next()
            events = [await watcher.next() for _ in range(4)]
        assert [event.revision for event in events] == [4, 5, 6, 7]
        assert events[0].message_updated.id == two.id
        assert events[1].message_deleted.message_id == one.id
        assert [m.id for m in events[2].messages_created.messages] == [four.id]
        assert events[3].message_updated.id == three.id

    async def test_message_that_changed_twice_comes_once(self, api: Api) -> None:
        """At its newest revision. Until then the watcher has it as it was before both changes."""
        session = await api.session()
        one, two = await api.message(session.id), await api.message(session.id)
        await set_metadata(api, one.id, '{"a": 3}')
        await set_metadata(api, two.id, '{"a": 4}')
        await set_metadata(api, one.id, '{"a": 5}')
        async with watching(api, session.id, after=2) as watcher:
            watcher.messages = {one.id: one, two.id: two}
            await watcher.until_revision(4)
            assert watcher.messages[one.id] == one
            assert watcher.messages[two.id].metadata_json == '{"a": 4}'
            await watcher.until("caught_up")
            assert watcher.kinds == ["session", "message_updated", "message_updated", "caught_up"]
            await assert_same_state(api, watcher, session.id)


class TestLive:
    @pytest.fixture
    async def unpolled(self, start_server: Any, database: str) -> Api:
        """A client of a server that does not poll: only a write wakes a watcher."""
        return await start_server(database, watch_poll_interval_seconds=3600)  # type: ignore[no-any-return]

    async def test_every_kind_of_change_arrives(self, unpolled: Api) -> None:
        """Messages, batches, metadata, attachments, deletions, status, ticket: as they happen."""
        api = unpolled
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")

            message = await api.message(session.id, "live")
            event = await watcher.next()
            assert list(event.messages_created.messages) == [message]
            assert event.revision == 1

            await create_batch(api, session.id, [user_message("a"), user_message("b")])
            event = await watcher.next()
            assert [m.content for m in event.messages_created.messages] == ["a", "b"]
            assert event.revision == 3

            changed = await set_metadata(api, message.id, '{"a": 1}')
            assert (await watcher.next()).message_updated == changed

            attachment = await api.attachment(message.id)
            event = await watcher.next()
            assert list(event.message_updated.attachments) == [attachment]

            request = DeleteChatAttachmentRequest(attachment_id=attachment.id)
            await api.attachments.DeleteChatAttachment(request)
            assert not (await watcher.next()).message_updated.attachments

            await delete_message(api, message.id)
            assert (await watcher.next()).message_deleted.message_id == message.id

            assert (await set_status(api, session.id, ARCHIVED)).revision == 8
            event = await watcher.next()
            assert event.session.status == ARCHIVED
            await set_status(api, session.id, RESOLVED)
            assert (await watcher.next()).session.status == RESOLVED

            link = await api.escalate(session.id)
            assert (await watcher.next()).session.has_ticket
            assert (await watcher.next()).ticket == link
            await unlink(api, link.id)
            assert not (await watcher.next()).session.has_ticket
            assert (await watcher.next()).ticket == r.ChatTicket()
            assert watcher.kinds.count("caught_up") == 1

            await api.message(session.id)
            await watcher.next()
            await assert_same_state(api, watcher, session.id)

    async def test_deletion_of_the_session_ends_the_stream(self, unpolled: Api) -> None:
        """The stream delivers session_deleted and ends with OK."""
        api = unpolled
        session = await api.session()
        await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session.id))
            assert (await watcher.next()).HasField("session_deleted")
            await watcher.end()
            assert await watcher._call.code() is StatusCode.OK

    async def test_quiet_stream_carries_heartbeats(self, start_server: Any, database: str) -> None:
        """In band, at the position of the stream."""
        api = await start_server(database, watch_heartbeat_seconds=0.2)
        session = await api.session()
        await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            for _ in range(2):
                event = await watcher.next()
                assert event.HasField("heartbeat")
                assert event.revision == 1

    async def test_no_op_updates_do_not_delay_heartbeats(
        self, start_server: Any, database: str
    ) -> None:
        """Heartbeats depend on what the client receives, not on what the server does."""
        api = await start_server(database, watch_heartbeat_seconds=0.3)
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")

            async def write() -> None:
                while True:
                    await set_status(api, session.id, r.CHAT_SESSION_STATUS_ACTIVE)
                    await asyncio.sleep(0.05)

            writing = asyncio.create_task(write())
            event = await watcher.next(timeout=5)
            writing.cancel()
            assert event.HasField("heartbeat")

    async def test_other_sessions_are_not_delivered(self, api: Api, other: Api) -> None:
        """Not other sessions of the tenant, and not another tenant's session of the same id."""
        session = await api.session()
        elsewhere = await api.session()
        theirs = await other.session(id=session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            await api.message(elsewhere.id)
            await other.message(theirs.id)
            mine = await api.message(session.id)
            event = await watcher.next()
            assert [m.id for m in event.messages_created.messages] == [mine.id]

    async def test_many_watchers_under_concurrent_writers(self, api: Api) -> None:
        """Started at any time, each gets every message once, in order, and the same state."""
        session = await api.session()
        seed = random.Random(7)

        async def write(count: int) -> None:
            for n in range(count):
                message = await api.message(session.id, f"{n}")
                match seed.randrange(5):
                    case 0:
                        await set_metadata(api, message.id, '{"x": 1}')
                    case 1:
                        await delete_message(api, message.id)
                    case 2:
                        await set_status(api, session.id, seed.choice([1, 2, 3]))

        async def watch(delay: float) -> None:
            await asyncio.sleep(delay)
            async with watching(api, session.id) as watcher:
                await watcher.until("caught_up")
                await finished.wait()
                await watcher.until_revision((await get_session(api, session.id)).revision)
                await assert_same_state(api, watcher, session.id)

        finished = asyncio.Event()
        watchers = [asyncio.create_task(watch(n * 0.05)) for n in range(8)]
        await asyncio.gather(*(write(25) for _ in range(6)))
        finished.set()
        await asyncio.gather(*watchers)

    async def test_position_advances_over_changes_without_an_event(
        self, start_server: Any, database: str, tenant: str
    ) -> None:
        """A watcher reaches every revision: also one whose change is undone, without a wait."""
        api = await start_server(database, watch_poll_interval_seconds=0.1)
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            changed = await set_status(api, session.id, RESOLVED)
            assert (await watcher.next()).revision == changed.revision
            with psycopg.connect(database) as connection:
                connection.execute(
                    "UPDATE chat_sessions SET revision = revision + 2 WHERE tenant_id = %s",
                    [tenant],
                )
            event = await watcher.next(timeout=5)
            assert (event.WhichOneof("event"), event.revision) == ("heartbeat", 3)

    async def test_history_that_was_reset_ends_the_stream(
        self, start_server: Any, database: str, tenant: str
    ) -> None:
        """A watcher beyond the session's revision has another history: OUT_OF_RANGE."""
        api = await start_server(database, watch_poll_interval_seconds=0.1)
        session = await api.session()
        for _ in range(3):
            await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            with psycopg.connect(database) as connection:
                for sql in (
                    "DELETE FROM chat_messages WHERE tenant_id = %s AND sequence > 1",
                    "UPDATE chat_sessions SET revision = 1 WHERE tenant_id = %s",
                ):
                    connection.execute(sql, [tenant])
            with refused(StatusCode.OUT_OF_RANGE, "REVISION_OUT_OF_RANGE"):
                await watcher.next(timeout=5)

    async def test_session_created_again_is_another_one(
        self, start_server: Any, database: str, tenant: str
    ) -> None:
        """An id that is used again, as it may be once it is forgotten, carries no watcher over."""
        api = await start_server(database, watch_poll_interval_seconds=0.1)
        session = await api.session()
        await api.message(session.id)
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            with psycopg.connect(database) as connection:
                for sql in (
                    "DELETE FROM chat_sessions WHERE tenant_id = %(t)s",
                    "DELETE FROM chat_session_tombstones WHERE tenant_id = %(t)s",
                    "INSERT INTO chat_sessions (tenant_id, id, revision) VALUES (%(t)s, %(id)s, 9)",
                ):
                    connection.execute(sql, {"t": tenant, "id": session.id})
            assert (await watcher.next(timeout=5)).HasField("session_deleted")
            await watcher.end()


class TestRefusals:
    async def test_absent_and_foreign_are_not_found(self, api: Api, other: Api) -> None:
        """A session of another tenant cannot be watched."""
        theirs = await other.session()
        for session_id in (theirs.id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                async with watching(api, session_id) as watcher:
                    await watcher.next()

    async def test_revision_from_the_future(self, api: Api) -> None:
        """OUT_OF_RANGE: the client has seen a different history."""
        session = await api.session()
        await api.message(session.id)
        async with watching(api, session.id, after=1) as watcher:
            await watcher.until("caught_up")
        with refused(StatusCode.OUT_OF_RANGE, "REVISION_OUT_OF_RANGE"):
            async with watching(api, session.id, after=2) as watcher:
                await watcher.next()

    async def test_bad_fields_are_rejected_together(self, api: Api) -> None:
        """A malformed id and a negative revision."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            async with watching(api, "x", after=-1) as watcher:
                await watcher.next()
        assert set(refusal.fields) == {"session_id", "after_revision"}

    async def test_slow_reader_is_disconnected(self, start_server: Any, database: str) -> None:
        """RESOURCE_EXHAUSTED after the write timeout; the client resumes."""
        api = await start_server(database, stream_write_timeout_seconds=0.3)
        session = await api.session()
        for _ in range(10):
            await create_batch(api, session.id, [user_message("x" * 5000)] * 200)
        async with watching(api, session.id) as watcher:
            await watcher.next()
            await asyncio.sleep(1)
            with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
                await watcher.end()

    async def test_shutdown_ends_watches_with_unavailable(self, database: str, tenant: str) -> None:
        """UNAVAILABLE at once, not at the end of the drain."""
        async with serving(database, drain_seconds=30) as server:
            api = Api(f"127.0.0.1:{server.port}", tenant)
            session = await api.session()
            async with api, watching(api, session.id) as watcher:
                await watcher.until("caught_up")
                stopping = asyncio.create_task(server.stop())
                with refused(StatusCode.UNAVAILABLE, "DRAINING") as refusal:
                    await watcher.next(timeout=5)
                assert "RetryInfo" in refusal.details
                await stopping

    async def test_cancellation_frees_everything(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Cancelled streams leave no watcher and no connection behind."""
        api = await start_server(fresh_database, pool_size=1)
        session = await api.session()
        for _ in range(20):
            async with watching(api, session.id) as watcher:
                await watcher.next()
        assert (await api.message(session.id)).sequence == 1
        with psycopg.connect(fresh_database) as connection:
            [busy] = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND state <> 'idle' AND pid <> pg_backend_pid()"
            ).fetchone() or (None,)
        assert busy == 0


async def test_page_uses_the_indexes(api: Api, database: str) -> None:
    """New, changed and deleted messages are each found by their index."""
    session = await api.session()
    for _ in range(4):
        await create_batch(api, session.id, [user_message("x")] * 500)
    params = {
        "tenant_id": api.tenant,
        "session_id": session.id,
        "after": 1900,
        "limit": 32,
        "bytes": messages.PAGE_BYTES,
    }
    async with await psycopg.AsyncConnection.connect(database) as connection:
        await connection.execute("ANALYZE chat_messages")
        cursor = await connection.execute(f"EXPLAIN {session_changes.PAGE}", params)
        plan = "\n".join(row[0] for row in await cursor.fetchall())
    assert "idx_chat_messages_session" in plan
    assert "idx_chat_messages_changed" in plan
    assert "Seq Scan on chat_messages" not in plan


@pytest.mark.parametrize(
    "statement", [session_changes.PAGE, group_commit.APPEND_BATCH, message_listing.LIST_ASC]
)
def test_plans_made_on_an_empty_database_use_the_indexes(
    fresh_database: str, statement: LiteralString
) -> None:
    """The plans stay as the tables fill: PostgreSQL makes new ones only after an analyze."""
    names: dict[str, int] = {}
    numbered = re.sub(
        r"%\((\w+)\)s", lambda name: f"${names.setdefault(name[1], len(names) + 1)}", statement
    )
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(f"PREPARE statement AS {numbered}")  # type: ignore[arg-type]
        nulls = ", ".join("NULL" for _ in names)
        rows = connection.execute(f"EXPLAIN EXECUTE statement ({nulls})").fetchall()  # type: ignore[arg-type]
    plan = "\n".join(row[0] for row in rows)
    assert "on chat_messages m" in plan
    assert "Seq Scan on chat_messages" not in plan
    assert "Join Filter" not in plan  # which compares each row with each


@pytest.mark.parametrize("pages", [1, 3])
async def test_deleted_while_history_is_read(api: Api, pages: int) -> None:
    """A session deleted between two pages ends the stream with session_deleted."""
    session = await api.session()
    for _ in range(6):
        await create_batch(api, session.id, [user_message("x" * 20_000)] * 100)
    async with watching(api, session.id) as watcher:
        for _ in range(pages):
            await watcher.next()
        await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session.id))
        await watcher.until("session_deleted")
        await watcher.end()
        assert "caught_up" not in watcher.kinds
