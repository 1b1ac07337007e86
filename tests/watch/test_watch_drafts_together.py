"""Many followers of drafts: they share each read, and miss nothing whatever fails."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.drafts import leave_draft, stop_draft, writing
from support.messages import create_batch, user_message
from support.process import server_process
from support.server import serving
from support.watching import Watcher, assert_same_state, following, watching

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket_svc import errors
from chat_ticket_svc.services import session_page, shown_drafts, watch_stream
from chat_ticket_svc.store import draft_following

# So small that the server soon waits for a client that does not read.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]


@pytest.fixture
async def unpolled(start_server: Any, database: str) -> Api:
    """A client of a server that does not poll, so that every wake is a write's."""
    return await start_server(database, watch_poll_interval_seconds=3600)  # type: ignore[no-any-return]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """For each read, the lengths of all drafts that were known before."""
    read, done = draft_following.read, []

    async def counted(db: Any, followed: Any, **named: Any) -> Any:
        done.append([known.length for each in followed for known in each.known.values()])
        return await read(db, followed, **named)

    monkeypatch.setattr(draft_following, "read", counted)
    return done


@contextlib.asynccontextmanager
async def followers(api: Api, session_id: str, count: int) -> AsyncIterator[list[Watcher]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(following(api, session_id)) for _ in range(count)]


@contextlib.asynccontextmanager
async def following_slowly(api: Api, session_id: str, after: int = 0) -> AsyncIterator[Watcher]:
    """A follower that receives one large event and then keeps the server waiting."""
    async with grpc.aio.insecure_channel(api.address, options=SMALL_WINDOW) as channel:
        yield Watcher(
            ChatSessionServiceStub(channel).WatchChatSession(
                WatchChatSessionRequest(
                    session_id=session_id, after_revision=after, include_drafts=True
                ),
                metadata=[("x-tenant-id", api.tenant)],
            )
        )


class TestOnce:
    async def test_piece_is_read_and_made_an_event_once(
        self, unpolled: Api, reads: list[list[int]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many follow, and only what is new."""
        api = unpolled
        session = await api.session()
        built, build = list[int](), shown_drafts.FollowedDraft.text_after

        def text_after(draft: Any, length: int) -> str:
            built.append(length)
            return build(draft, length)

        monkeypatch.setattr(shown_drafts.FollowedDraft, "text_after", text_after)
        async with (
            followers(api, session.id, 20) as watchers,
            writing(api, session.id) as writer,
        ):
            await asyncio.gather(*(each.until("draft") for each in watchers))
            for text in ("a", "ab", "abc", "abcd"):
                await writer.write("abcd"[writer.offset])
                await asyncio.gather(
                    *(each.until_draft(writer.draft_id, text) for each in watchers)
                )
            assert built == [0, 1, 2, 3]
            reads.clear()
            await writer.write("e")
            await asyncio.gather(*(each.until_draft(writer.draft_id, "abcde") for each in watchers))
            assert reads == [[4]]

    async def test_drafts_of_many_sessions_are_read_together(
        self, unpolled: Api, reads: list[list[int]]
    ) -> None:
        """What changes while a read is in flight is read by the next one."""
        api = unpolled
        sessions = [await api.session() for _ in range(30)]
        async with contextlib.AsyncExitStack() as stack:
            pairs = [
                (
                    await stack.enter_async_context(following(api, session.id)),
                    await stack.enter_async_context(writing(api, session.id)),
                )
                for session in sessions
            ]
            await asyncio.gather(*(watcher.until("draft") for watcher, _ in pairs))
            reads.clear()
            await asyncio.gather(*(writer.append("text") for _, writer in pairs))
            await asyncio.gather(
                *(watcher.until_draft(writer.draft_id, "text") for watcher, writer in pairs)
            )
            assert len(reads) < len(pairs) / 2

    async def test_nothing_is_read_for_those_who_follow_no_drafts(
        self, unpolled: Api, reads: list[list[int]]
    ) -> None:
        """Watchers without drafts cause no read of drafts."""
        api = unpolled
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            async with writing(api, session.id) as writer:
                await writer.write("text")
                message = await writer.finish()
            await watcher.until_revision(message.sequence)
        assert reads == []


class TestSlowFollower:
    async def test_gets_one_larger_piece(self, database: str, tenant: str) -> None:
        """It reads nothing while others read each piece. Then it misses nothing."""
        async with serving(
            database, stream_write_timeout_seconds=60, watch_poll_interval_seconds=3600
        ) as server:
            api = Api(f"127.0.0.1:{server.port}", tenant)
            session = await api.session()
            large = await api.message(session.id, "x" * 100_000)
            async with (
                api,
                following(api, session.id) as quick,
                following_slowly(api, session.id) as slow,
                writing(api, session.id) as writer,
            ):
                await slow.until("caught_up")
                pieces = [f"{n} " * 2_000 for n in range(100, 130)]
                for n, piece in enumerate(pieces, 1):
                    await writer.write(piece)
                    await quick.until_draft(writer.draft_id, "".join(pieces[:n]))
                await slow.until_draft(writer.draft_id, "".join(pieces))
                assert quick.kinds.count("draft_appended") >= 25
                assert slow.kinds.count("draft_appended") < 20
                message = await writer.finish()
                await slow.until_revision(message.sequence)
                assert slow.created == [large.sequence, message.sequence]
                await assert_same_state(api, slow, session.id)


class TestAcrossServers:
    async def test_servers_see_each_others_drafts(self, two_clients: tuple[Api, Api]) -> None:
        """Begun and written on one, taken over and stopped on the other. No poll runs here."""
        one, two = two_clients
        session = await one.session()
        async with following(one, session.id) as here, following(two, session.id) as there:
            async with writing(two, session.id) as writer:
                await writer.write("from two, ")
                for each in (here, there):
                    await each.until_draft(writer.draft_id, "from two, ")
                async with writing(one, session.id, writer.draft_id) as successor:
                    await successor.write("from one")
                    for each in (here, there):
                        await each.until_draft(writer.draft_id, "from two, from one")
                    message = await stop_draft(two, writer.draft_id)
            for each in (here, there):
                await each.until_revision(message.sequence)
                assert each.kinds[-2:] == ["draft_ended", "messages_created"]
                await assert_same_state(one, each, session.id)

    async def test_poll_replaces_notify(
        self, fresh_database: str, cluster: Any, tenant: str
    ) -> None:
        """With NOTIFY suppressed entirely, a follower still gets everything."""
        # Notifications do not cross databases, and each server has another one for them.
        elsewhere = [cluster.create(), cluster.create()]
        poll = {"CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": "0.2"}
        with (
            server_process(fresh_database, DATABASE_LISTEN_URL=elsewhere[0], **poll) as first,
            server_process(fresh_database, DATABASE_LISTEN_URL=elsewhere[1], **poll) as second,
        ):
            async with Api(first.address, tenant) as one, Api(second.address, tenant) as two:
                session = await one.session()
                async with (
                    following(one, session.id) as watcher,
                    writing(two, session.id) as writer,
                ):
                    for n in range(1, 4):
                        await writer.write("x")
                        await watcher.until_draft(writer.draft_id, "x" * n)
                    message = await writer.finish()
                    await watcher.until_revision(message.sequence)
                    async with writing(two, session.id) as writer:
                        await watcher.until("draft")
                        await writer.finish()
                    await watcher.until("draft_ended")
        for url in elsewhere:
            cluster.drop(url)


class TestFaults:
    async def test_failed_read_ends_the_streams_that_wait_for_it(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those that have caught up, and those that have not. They resume, and miss nothing."""
        api = unpolled
        session = await api.session()
        draft_id = await leave_draft(api, session.id, "one ")
        async with followers(api, session.id, 3) as watchers:

            async def read(*_: Any, **__: Any) -> Any:
                raise errors.UnavailableError("gone", reason="DATABASE_UNAVAILABLE")

            with monkeypatch.context() as patched:
                patched.setattr(draft_following, "read", read)
                async with writing(api, session.id, draft_id) as writer:
                    await writer.write("two")
                for each in watchers:
                    with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
                        await each.next()
                with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
                    async with following(api, session.id):
                        pass
        async with following(api, session.id) as watcher:
            assert watcher.drafts == {draft_id: b"one two"}

    async def test_shutdown_ends_followers(self, database: str, tenant: str) -> None:
        """Also those that wait for the drafts before caught_up."""
        async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
            session = await api.session()
            async with following(api, session.id) as watcher:
                server._watch_hub.drain()
                with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                    await watcher.next()

    async def test_shutdown_ends_followers_that_catch_up(
        self, database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
            session = await api.session()

            async def read(*_: Any, **__: Any) -> Any:
                server._watch_hub.drain()
                await asyncio.sleep(3600)

            monkeypatch.setattr(draft_following, "read", read)
            with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                async with following(api, session.id):
                    pass

    async def test_shutdown_between_the_history_and_its_drafts(
        self, database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
            session = await api.session()

            async def read_history(*arguments: Any) -> Any:
                page = await session_page.read_page(*arguments)
                server._watch_hub.drain()
                return page

            async def read_drafts(*_: Any, **__: Any) -> Any:
                await asyncio.sleep(3600)

            monkeypatch.setattr(watch_stream, "read_page", read_history)
            monkeypatch.setattr(draft_following, "read", read_drafts)
            with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                async with following(api, session.id):
                    pass

    async def test_text_that_a_failover_has_lost_is_replaced(
        self, unpolled: Api, database: str
    ) -> None:
        """The draft is sent whole again when its writer goes on from less, or from other text."""
        api = unpolled
        session = await api.session()

        def replace(text: str) -> None:
            with psycopg.connect(database) as connection:
                connection.execute(
                    "DELETE FROM chat_draft_pieces WHERE draft_id = %s AND start_offset > 0",
                    [draft_id],
                )
                connection.execute(
                    "UPDATE chat_draft_pieces SET content = %s WHERE draft_id = %s",
                    [text, draft_id],
                )
                connection.execute(
                    "UPDATE chat_drafts SET length = %s WHERE id = %s", [len(text), draft_id]
                )

        async with following(api, session.id) as watcher:
            draft_id = await leave_draft(api, session.id, "one text")
            await watcher.until_draft(draft_id, "one text")
            for text in ("another text", "less"):
                replace(text)
                async with writing(api, session.id, draft_id) as writer:
                    await watcher.until_draft(draft_id, text)
                    assert watcher.kinds[-1] == "draft"
            async with writing(api, session.id, draft_id) as writer:
                await writer.write(", but more")
                await watcher.until_draft(draft_id, "less, but more")
                # Before the writer has noticed, and so with the same fencing token.
                replace("again")
                await api.message(session.id)
                await watcher.until_draft(draft_id, "again")

    async def test_followers_that_leave_leave_nothing(self, database: str, tenant: str) -> None:
        """What nobody follows is not read, polled for or kept in memory."""
        async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
            session = await api.session()
            async with watching(api, session.id) as plain:
                await plain.until("caught_up")
                [session_hub] = server._watch_hub._session_hubs.values()
                async with following(api, session.id):
                    assert session_hub.draft_feed is not None
                async with asyncio.timeout(5):
                    while session_hub.draft_feed is not None:
                        await asyncio.sleep(0.02)

    async def test_random_schedule(self, start_server: Any, database: str) -> None:
        """Writers and followers on two servers, all of which break off at any time.

        Each follower checks every event: no gap, no repeat, and each message just after its draft.
        """
        chance = random.Random(11)
        written: dict[str, str] = {}
        done = asyncio.Event()

        async def write(session_id: str) -> None:
            for _ in range(6):
                draft_id, text, is_open = an_id(), "", True
                while is_open:
                    async with writing(chance.choice(apis), session_id, draft_id) as writer:
                        assert writer.offset == len(text.encode()), "what is acknowledged is there"
                        for _ in range(chance.randrange(9)):
                            piece = chance.choice("aé漢") * chance.choice([1, 20, 9_000])
                            await writer.write(piece)
                            text += piece
                            await asyncio.sleep(chance.random() / 100)
                        how = chance.choice(["break", "stop", "finish", "finish"])
                        if how == "stop":
                            await stop_draft(chance.choice(apis), draft_id)
                        elif how == "finish":
                            await writer.finish()
                        is_open = how == "break"
                written[draft_id] = text

        async def ask(session_id: str) -> None:
            for _ in range(30):
                await create_batch(chance.choice(apis), session_id, [user_message("question")] * 2)
                await asyncio.sleep(chance.random() / 20)

        async def follow(number: int, session_id: str) -> None:
            watcher = Watcher(None)
            while not done.is_set():
                api, after = chance.choice(apis), max(0, watcher.revision)
                is_slow = number % 3 == 0
                async with (
                    following_slowly(api, session_id, after)
                    if is_slow
                    else watching(api, session_id, after, include_drafts=True)
                ) as stream:
                    watcher.resume(stream)
                    for _ in range(chance.randrange(2, 60)):
                        if done.is_set():
                            break
                        await watcher.next()
                        if is_slow:
                            await asyncio.sleep(chance.random() / 30)
            async with watching(
                apis[0], session_id, max(0, watcher.revision), include_drafts=True
            ) as last:
                watcher.resume(last)
                await watcher.until("caught_up")
            assert watcher.drafts == {}
            await assert_same_state(apis[0], watcher, session_id)
            for message_id, message in watcher.messages.items():
                assert message.content == written.get(message_id, "question")
            created.update(watcher.messages)

        created = set[str]()
        # They never poll, and nobody waits long for a heartbeat at the end.
        settings = {"watch_poll_interval_seconds": 3600, "watch_heartbeat_seconds": 0.5}
        apis = [await start_server(database, **settings) for _ in range(2)]
        sessions = [(await apis[0].session()).id for _ in range(2)]
        follows = [asyncio.create_task(follow(number, sessions[number % 2])) for number in range(8)]
        await asyncio.gather(
            *(write(session_id) for session_id in sessions for _ in range(3)),
            *(ask(session_id) for session_id in sessions),
        )
        done.set()
        await asyncio.gather(*follows)
        assert {draft_id for draft_id, text in written.items() if text} <= created
