"""The feed of a tenant: what wakes it, what holds it up, what its followers share, how they end."""

import asyncio
import contextlib
import gc
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from support.authority import key_set
from support.client import Api, refused
from support.database import execute
from support.feeds import Feed, caught_up_feed, following_feed, position_of, until_xmin_passes
from support.jwt_server import KEY, SETTINGS
from support.server import serving
from support.sessions import RESOLVED, delete_session, set_status
from support.tickets import SOLVED, create_ticket, delete_ticket, update_ticket

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket_svc import errors
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.store import change_feed as store_change_feed
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch import change_feed

pytestmark = pytest.mark.usefixtures("feed_turn")

# So small that the server soon waits for a client that does not read.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]

# So long that only a notification can arrive sooner.
NO_POLL = 3600


@pytest.fixture
async def unpolled(start_server: Any, database: str) -> Api:
    """A client of a server that does not poll, so that every wake is a write's."""
    return await start_server(database, watch_poll_interval_seconds=NO_POLL)  # type: ignore[no-any-return]


class TestWakes:
    async def test_change_through_another_server_is_told(self, unpolled: Api, api: Api) -> None:
        """Every kind of write notifies the servers, as none of them has to poll."""
        async with caught_up_feed(unpolled) as feed:

            async def is_told(kind: str, change: Awaitable[Any], subject: str = "") -> Any:
                feed.told.clear()
                result = await change
                await feed.until(kind, subject or result.id)
                return result

            session = await is_told("session", api.session())
            await is_told("session", api.message(session.id), session.id)
            await is_told("session", set_status(api, session.id, RESOLVED))
            link = await is_told("session", api.escalate(session.id), session.id)
            await is_told("ticket", update_ticket(api, link.ticket_id, status=SOLVED))
            await is_told("session_deleted", delete_session(api, session.id), session.id)
            ticket = await is_told("ticket", create_ticket(api))
            await is_told("ticket", update_ticket(api, ticket.id, title="Another"))
            await is_told("ticket_deleted", delete_ticket(api, ticket.id), ticket.id)

    async def test_change_that_nobody_notifies_of_is_told(
        self, start_server: Any, database: str
    ) -> None:
        """One by plain SQL: the poll finds it."""
        api = await start_server(database, watch_poll_interval_seconds=0.2)
        session = await api.session()
        async with caught_up_feed(api) as feed:
            await feed.settle(api)
            execute(
                database,
                "UPDATE chat_sessions SET title = 'by SQL', revision = revision + 1"
                f" WHERE id = '{session.id}'",
            )
            await feed.until("session", session.id)
            assert feed.sessions[session.id].title == "by SQL"


@pytest.mark.holds_up_feeds
class TestLongTransactions:
    async def test_change_is_held_up_until_older_transactions_have_ended(
        self, unpolled: Api, database: str
    ) -> None:
        """Even if they write in another database. Then it is told within a second."""
        api = unpolled
        async with (
            caught_up_feed(api) as feed,
            await psycopg.AsyncConnection.connect(database, dbname="postgres") as elsewhere,
        ):
            before = await api.session()
            await elsewhere.execute("SELECT pg_current_xact_id()")
            await feed.until("session", before.id)
            # A transaction of another test may be older. Until it ends, `held_up` would be told
            # with what that one holds up.
            await until_xmin_passes(database, await position_of(database, before.id))
            await asyncio.sleep(2 * change_feed.MAX_RETRY_SECONDS)
            held_up = await api.session()
            told = asyncio.create_task(feed.until("session", held_up.id))
            await asyncio.sleep(0.5)
            assert not told.done()
            await elsewhere.rollback()
            await until_xmin_passes(database, await position_of(database, held_up.id))
            async with asyncio.timeout(1):
                await told

    async def test_change_that_is_committed_late_is_not_skipped(
        self, unpolled: Api, database: str
    ) -> None:
        """A transaction that began before others and ends after them. Nobody notifies of it.

        Neither a stream that is open nor one that resumes after a cursor of that time misses it.
        """
        api = unpolled
        late, other = await api.session(), await api.session()
        async with caught_up_feed(api) as feed:
            await feed.settle(api)
            async with await psycopg.AsyncConnection.connect(database) as writer:
                await writer.execute(
                    "UPDATE chat_sessions SET title = 'late', revision = revision + 1"
                    " WHERE id = %s",
                    [late.id],
                )
                await api.message(other.id)
                async with following_feed(api) as from_now:
                    response = await from_now.next()
                await writer.commit()
            await feed.until("session", late.id)
            await feed.until("session", other.id)
        assert feed.sessions[late.id].title == "late"
        async with caught_up_feed(api, response.cursor) as resumed:
            assert resumed.sessions[late.id].title == "late"

    async def test_stream_catches_up_with_what_was_committed_before_it_began(
        self, unpolled: Api, database: str
    ) -> None:
        """Although an older transaction is open: `caught_up` waits for that."""
        api = unpolled
        async with await psycopg.AsyncConnection.connect(database) as writer:
            await writer.execute("SELECT pg_current_xact_id()")
            session = await api.session()
            async with following_feed(api, from_beginning=True) as feed:
                caught_up = asyncio.create_task(feed.until("caught_up"))
                await asyncio.sleep(0.3)
                assert not caught_up.done()
                await writer.rollback()
                await caught_up
                assert ("session", session.id) in feed.told

    async def test_poll_does_not_wait_for_it(self) -> None:
        """Otherwise one old transaction would let the feeds of all tenants read all the time."""
        place = store_change_feed.Place(1)
        reads = asyncio.Queue[None]()

        async def read(_: store_change_feed.Place) -> store_change_feed.Page:
            reads.put_nowait(None)
            return store_change_feed.Page(place, place, [], "epoch", 1, 2, None)

        feed = change_feed.ChangeFeed(place, read)
        try:
            feed.poll()
            await reads.get()
            await asyncio.sleep(0.05)
            assert reads.empty()
            feed.wake(has_changed=True)
            for _ in range(3):
                await asyncio.wait_for(reads.get(), 5)
        finally:
            await feed.stop()


class TestTogether:
    async def test_change_is_read_once_for_all_followers(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And made an event once for all that have the same filters."""
        api = unpolled
        converted: list[str] = []
        session_field = convert.session_field

        def session(tenant: bytes, row: Any) -> bytes:
            converted.append(row.id)
            return session_field(tenant, row)

        monkeypatch.setattr(convert, "session_field", session)
        created = await api.session(user_id="ann")
        async with contextlib.AsyncExitStack() as stack:
            feeds = [
                await stack.enter_async_context(caught_up_feed(api, user_id=user_id))
                for user_id in ("", "ann") * 10
            ]
            await asyncio.gather(*(feed.settle(api) for feed in feeds[:2]))
            converted.clear()
            await api.message(created.id)
            await asyncio.gather(*(feed.until("session", created.id) for feed in feeds))
        # Once each, and once for the filters of each of the two kinds of followers.
        assert converted.count(created.id) <= 3

    async def test_slow_follower_delays_no_other_and_misses_nothing(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Although the pages that it needs are kept no longer."""
        api = unpolled
        monkeypatch.setattr(change_feed, "MAX_KEPT_PAGES", 2)
        labels = {f"key-{n}": "x" * 255 for n in range(32)}
        async with (
            grpc.aio.insecure_channel(api.address, options=SMALL_WINDOW) as channel,
            caught_up_feed(api) as fast,
        ):
            call = ChatSessionServiceStub(channel).WatchChatSessions(
                WatchChatSessionsRequest(), metadata=[("x-tenant-id", api.tenant)]
            )
            slow = Feed(call)
            await slow.until("caught_up")
            created = []
            for _ in range(24):
                created.append((await api.session(labels=labels)).id)
                await fast.until("session", created[-1])
            for session_id in created:
                await slow.until("session", session_id)
            call.cancel()

    async def test_forged_cursor_harms_no_other_follower(self, unpolled: Api) -> None:
        """One from the future is no cursor of this history, and moves no other stream."""
        api = unpolled
        async with caught_up_feed(api) as feed:
            await feed.settle(api)
        digest, start, _, *rest = paging.decode(feed.cursor)
        for forged_start, end in (
            (2**62, None),
            (start, 2**62),
            (0, 2**62),
            (2**63 - 1, 2**63 - 1),
        ):
            forged = paging.encode(digest, forged_start, end, *rest)
            async with following_feed(api, forged) as forger:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await forger.next()
                async with caught_up_feed(api, feed.cursor) as honest:
                    for _ in range(2):
                        session = await api.session()
                        await honest.until("session", session.id, timeout=5)

    async def test_reads_of_many_followers_are_limited(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """More begin at once than may wait for a connection: their reads take turns."""
        api = await start_server(fresh_database, pool_size=2)
        async with contextlib.AsyncExitStack() as stack:
            feeds = [
                await stack.enter_async_context(following_feed(api, from_beginning=True))
                for _ in range(50)
            ]
            await asyncio.gather(*(feed.until("caught_up") for feed in feeds))
            session = await api.session()
            await asyncio.gather(*(feed.until("session", session.id) for feed in feeds))


class TestEnds:
    async def test_heartbeats_are_for_silence_only(self, start_server: Any, database: str) -> None:
        """They come in time after the last response, and a stream resumes after their cursor."""
        api = await start_server(database, watch_heartbeat_seconds=1)
        clock = asyncio.get_running_loop().time
        silences: list[tuple[str | None, float]] = []
        async with caught_up_feed(api) as feed:

            async def change() -> None:
                for _ in range(8):
                    await api.session()
                    await asyncio.sleep(0.15)

            changing = asyncio.create_task(change())
            while [kind for kind, _ in silences].count("heartbeat") < 2 or not changing.done():
                start = clock()
                [event, *_] = (await feed.next()).events
                silences.append((event.WhichOneof("event"), clock() - start))
        assert all(silence < 1.5 for _, silence in silences)
        assert all(silence > 0.5 for kind, silence in silences if kind == "heartbeat")
        session = await api.session()
        async with caught_up_feed(api, feed.cursor) as feed:
            assert feed.told == [("session", session.id), ("caught_up", "")]

    async def test_drain(self, database: str, api: Api, tenant: str) -> None:
        """Streams end with DRAINING at once, also one that begins then, and resume elsewhere."""
        async with serving(database, drain_seconds=30) as server:
            leaving = Api(f"127.0.0.1:{server.port}", tenant)
            async with leaving, caught_up_feed(leaving) as feed:
                stopping = asyncio.create_task(server.stop())
                async with asyncio.timeout(5):
                    with refused(StatusCode.UNAVAILABLE, "DRAINING") as refusal:
                        await feed.end()
                    assert "RetryInfo" in refusal.details
                    with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                        async with following_feed(leaving, feed.cursor) as again:
                            await again.end()
                session = await api.session()
                await stopping
        async with caught_up_feed(api, feed.cursor) as resumed:
            assert [*resumed.sessions] == [session.id]

    async def test_slow_reader(self, start_server: Any, database: str) -> None:
        """SLOW_READER. It resumes after what it has read."""
        api = await start_server(database, stream_write_timeout_seconds=0.3)
        labels = '{"key": "' + "x" * 255 + '"}'
        execute(
            database,
            f"INSERT INTO chat_sessions (tenant_id, labels) SELECT '{api.tenant}', '{labels}'"
            "  FROM generate_series(1, 2000)",
        )
        async with grpc.aio.insecure_channel(api.address, options=SMALL_WINDOW) as channel:
            call = ChatSessionServiceStub(channel).WatchChatSessions(
                WatchChatSessionsRequest(from_beginning=True),
                metadata=[("x-tenant-id", api.tenant)],
            )
            feed = Feed(call)
            await feed.next()
            await asyncio.sleep(1)
            with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
                while True:
                    await feed.next()
        assert len(feed.sessions) < 2000
        async with following_feed(api, feed.cursor) as resumed:
            resumed.sessions = feed.sessions
            await resumed.until("caught_up")
            assert len(resumed.sessions) == 2000

    async def test_credential_that_expires(
        self, start_server: Any, database: str, tenant: str, tmp_path: Path
    ) -> None:
        """UNAUTHENTICATED. A call with a new token resumes."""
        (tmp_path / "keys.json").write_bytes(key_set(KEY))
        jwks = str(tmp_path / "keys.json")
        address = (await start_server(database, **SETTINGS, jwks=jwks)).address
        token = KEY.token(exp=time.time() + 1.5)
        async with (
            Api(address, tenant, token=KEY.token()) as good,
            Api(address, tenant, token=token) as short,
        ):
            async with caught_up_feed(short) as feed:
                with refused(StatusCode.UNAUTHENTICATED, "CREDENTIAL_EXPIRED"):
                    await feed.end()
            session = await good.session()
            async with caught_up_feed(good, feed.cursor) as resumed:
                assert [*resumed.sessions] == [session.id]

    async def test_read_that_fails(self, unpolled: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """The streams end with its error. They resume, and nothing is lost."""
        api = unpolled
        async with caught_up_feed(api) as feed:
            await feed.settle(api)
            with monkeypatch.context() as patch:

                async def fetch_typed(*_: Any) -> Any:
                    raise errors.UnavailableError("gone", reason="DATABASE_UNAVAILABLE")

                patch.setattr(Database, "fetch_typed", fetch_typed)
                session = await api.session()
                with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
                    await feed.end()
        async with caught_up_feed(api, feed.cursor) as resumed:
            assert [*resumed.sessions] == [session.id]


async def cancel(api: Api) -> None:
    async with caught_up_feed(api):
        pass


async def cancel_at_once(api: Api) -> None:
    async with following_feed(api, from_beginning=True):
        await asyncio.sleep(0)


async def be_refused(api: Api) -> None:
    with refused(StatusCode.INVALID_ARGUMENT):
        async with following_feed(api, "x") as feed:
            await feed.end()


async def disconnect(api: Api) -> None:
    another = Api(api.address, api.tenant)
    stream = caught_up_feed(another)
    await stream.__aenter__()
    await another.channel.close()


@pytest.mark.parametrize(
    "leave",
    [cancel, cancel_at_once, be_refused, disconnect],
    ids=lambda leave: leave.__name__,
)
async def test_stream_leaves_nothing_in_the_server(database: str, tenant: str, leave: Any) -> None:
    """However it ends: no follower, no feed, no task and no page."""
    async with serving(database) as server:
        api = Api(f"127.0.0.1:{server.port}", tenant)
        async with api:
            session = await api.session()
            await leave(api)
            feeds = server._watch_hub.change_feeds

            async def until_nothing_is_left() -> None:
                async with asyncio.timeout(10):
                    while feeds.follower_count or feeds._feeds or feeds._stopping:
                        await asyncio.sleep(0.02)

            await until_nothing_is_left()
            tasks = len(asyncio.all_tasks())
            for _ in range(20):
                await leave(api)
            await until_nothing_is_left()
            async with asyncio.timeout(10):
                while len(asyncio.all_tasks()) > tasks + 5:
                    await asyncio.sleep(0.02)
            kept = (change_feed.ChangeFeed, change_feed.Follower, store_change_feed.Page)
            async with asyncio.timeout(10):
                while [each for each in gc.get_objects() if isinstance(each, kept)]:
                    gc.collect()
                    await asyncio.sleep(0.05)
            assert (await api.message(session.id)).sequence == 1
