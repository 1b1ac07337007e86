"""Many watchers of one session: they share each read, and none affects another."""

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, refused
from support.messages import create_batch, delete_message, set_metadata, user_message
from support.server import serving
from support.sessions import ARCHIVED, RESOLVED, set_status
from support.watching import Watcher, assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, WatchChatSessionRequest
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.services import convert
from chat_ticket_svc.store import session_changes
from chat_ticket_svc.watch.hub import WatchHub

# So small that the server soon waits for a client that does not read.
SMALL_WINDOW = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
LARGE = 100_000


@pytest.fixture
async def unpolled(start_server: Any, database: str) -> Api:
    """A client of a server that does not poll, so that every wake is a write's."""
    return await start_server(database, watch_poll_interval_seconds=3600)  # type: ignore[no-any-return]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The revisions after which pages were read, in order."""
    read, done = session_changes.page, []

    async def page(*arguments: Any, after: int, **named: Any) -> Any:
        found = await read(*arguments, after=after, **named)
        done.append(after)
        return found

    monkeypatch.setattr(session_changes, "page", page)
    return done


@contextlib.asynccontextmanager
async def caught_up(api: Api, session_id: str, count: int) -> AsyncIterator[list[Watcher]]:
    async with contextlib.AsyncExitStack() as stack:
        watchers = [
            await stack.enter_async_context(watching(api, session_id)) for _ in range(count)
        ]
        await asyncio.gather(*(watcher.until("caught_up") for watcher in watchers))
        yield watchers


@contextlib.asynccontextmanager
async def watching_slowly(api: Api, session_id: str, after: int = 0) -> AsyncIterator[Watcher]:
    """A watcher that receives one large event and then keeps the server waiting."""
    async with grpc.aio.insecure_channel(api.address, options=SMALL_WINDOW) as channel:
        yield Watcher(
            ChatSessionServiceStub(channel).WatchChatSession(
                WatchChatSessionRequest(session_id=session_id, after_revision=after),
                metadata=[("x-tenant-id", api.tenant)],
            )
        )


class TestOnce:
    async def test_change_is_read_and_made_an_event_once(
        self, unpolled: Api, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many watch, one write causes one read, and its message is converted once."""
        api = unpolled
        session = await api.session()
        convert_message, converted = convert.message, list[str]()

        def message(row: Any) -> r.ChatMessage:
            converted.append(row.content)
            return convert_message(row)

        monkeypatch.setattr(convert, "message", message)
        async with caught_up(api, session.id, 100) as watchers:
            for revision, content in enumerate(("one", "two"), 1):
                reads.clear()
                stored = await api.message(session.id, content)
                for event in await asyncio.gather(*(watcher.next() for watcher in watchers)):
                    assert list(event.messages_created.messages) == [stored]
                assert reads == [revision - 1]
        assert converted == ["one", "two"]

    async def test_every_kind_of_event_is_shared(self, unpolled: Api, reads: list[int]) -> None:
        """Sessions, changed and deleted messages, the end: the same for all, by one read each."""
        api = unpolled
        session = await api.session()
        message = await api.message(session.id)
        async with caught_up(api, session.id, 10) as watchers:
            reads.clear()
            for change in (
                lambda: set_status(api, session.id, RESOLVED),
                lambda: set_metadata(api, message.id, "{}"),
                lambda: delete_message(api, message.id),
                lambda: api.sessions.DeleteChatSession(
                    DeleteChatSessionRequest(session_id=session.id)
                ),
            ):
                await change()
                events = await asyncio.gather(*(watcher.next() for watcher in watchers))
                assert all(event == events[0] for event in events)
        assert reads == [1, 2, 3, 4]
        last = ["session", "message_updated", "message_deleted", "session_deleted"]
        assert all(watcher.kinds[-4:] == last for watcher in watchers)

    async def test_update_without_a_change_delivers_nothing(
        self, unpolled: Api, reads: list[int]
    ) -> None:
        """A write that changes nothing causes one read, and no more."""
        api = unpolled
        session = await api.session()
        async with caught_up(api, session.id, 10) as watchers:
            reads.clear()
            await set_status(api, session.id, r.CHAT_SESSION_STATUS_ACTIVE)
            while not reads:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # in which it is read, and not the message with it
            await api.message(session.id)
            await asyncio.gather(*(watcher.next() for watcher in watchers))
            assert reads == [0, 0]
            assert {watcher.kinds[-1] for watcher in watchers} == {"messages_created"}

    async def test_more_than_a_page_at_once(
        self, unpolled: Api, reads: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A change larger than a page is delivered in order, by several reads."""
        api = unpolled
        session = await api.session()
        async with caught_up(api, session.id, 10) as watchers:
            with monkeypatch.context() as patched:
                # As if another process had written, and its notifications arrived late.
                patched.setattr(WatchHub, "notify_changed", lambda *_: None)
                for _ in range(3):
                    await create_batch(api, session.id, [user_message("x")] * 400)
            reads.clear()
            await api.message(session.id)
            await asyncio.gather(*(watcher.until_revision(1201) for watcher in watchers))
            assert [after for after, _ in itertools.groupby(reads)] == [0, 500, 1000]
        assert all(watcher.created == list(range(1, 1202)) for watcher in watchers)

    async def test_read_counts_for_the_quota_of_its_tenant(
        self, start_server: Any, database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever has caused it, a read uses its own tenant's share of the connections."""
        api = await start_server(database, watch_poll_interval_seconds=0.1)
        read, tenants = session_changes.page, list[str | None]()

        async def page(*arguments: Any, **named: Any) -> Any:
            tenants.append(request_context.tenant_id_or_none())
            return await read(*arguments, **named)

        monkeypatch.setattr(session_changes, "page", page)
        session = await api.session()
        async with caught_up(api, session.id, 2) as watchers:
            with psycopg.connect(database) as connection:
                sql = "UPDATE chat_sessions SET revision = 1 WHERE tenant_id = %s"
                connection.execute(sql, [tenant])
            await asyncio.gather(*(watcher.next() for watcher in watchers))
        assert len(tenants) >= 3  # two that catch up, and what the poll has woken
        assert set(tenants) == {tenant}


class TestTogether:
    async def test_cancelled_watch_does_not_affect_others(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Not even the read in progress when it leaves, even if it was the first to wait for it."""
        api = unpolled
        session = await api.session()
        read, reading, go_on = session_changes.page, asyncio.Event(), asyncio.Event()

        async def page(*arguments: Any, **named: Any) -> Any:
            reading.set()
            await go_on.wait()
            return await read(*arguments, **named)

        async with caught_up(api, session.id, 5) as watchers:
            monkeypatch.setattr(session_changes, "page", page)
            await api.message(session.id)
            await reading.wait()
            for leaver in (watchers.pop(0), watchers.pop()):
                leaver._call.cancel()
            await asyncio.sleep(0.1)
            go_on.set()
            await asyncio.gather(*(watcher.until_revision(1) for watcher in watchers))

    async def test_failed_read_ends_the_watches_that_wait_for_it(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each with the error's status. They resume, and receive what they have missed."""
        api = unpolled
        session = await api.session()
        async with caught_up(api, session.id, 5) as watchers:

            async def page(*_: Any, **__: Any) -> Any:
                raise errors.UnavailableError("gone", reason="DATABASE_UNAVAILABLE")

            with monkeypatch.context() as patched:
                patched.setattr(session_changes, "page", page)
                await api.message(session.id)
                for each in watchers:
                    with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
                        await each.next()
        async with watching(api, session.id, after=0) as watcher:
            await watcher.until_revision(1)

    async def test_heartbeats_reach_all(self, start_server: Any, database: str) -> None:
        """Repeatedly: no watcher waits longer than the interval, whenever it joined."""
        api = await start_server(
            database, watch_poll_interval_seconds=3600, watch_heartbeat_seconds=0.5
        )
        session = await api.session()
        async with caught_up(api, session.id, 2) as early:
            await asyncio.sleep(0.3)
            async with caught_up(api, session.id, 2) as late:
                for _ in range(3):
                    async with asyncio.timeout(0.9):
                        events = await asyncio.gather(*(each.next() for each in early + late))
                    assert all(event.HasField("heartbeat") for event in events)

    async def test_slow_watcher_delays_no_other_and_loses_nothing(
        self, database: str, tenant: str, reads: list[int]
    ) -> None:
        """Pages are not kept for it: it reads on from its position."""
        count = 30
        async with serving(
            database, stream_write_timeout_seconds=60, watch_poll_interval_seconds=3600
        ) as server:
            api = Api(f"127.0.0.1:{server.port}", tenant)
            session = await api.session()
            async with (
                api,
                watching_slowly(api, session.id) as slow,
                caught_up(api, session.id, 3) as watchers,
            ):
                await slow.until("caught_up")
                reads.clear()
                for revision in range(1, count + 1):
                    await api.message(session.id, "x" * LARGE)
                    async with asyncio.timeout(2):
                        await asyncio.gather(
                            *(watcher.until_revision(revision) for watcher in watchers)
                        )
                    [session_hub] = server._watch_hub._session_hubs.values()
                    assert (
                        sum(group.next_page is not None for group in session_hub.groups.values())
                        <= 1
                    )
                assert reads == list(range(count))
                await slow.until_revision(count)
                assert slow.created == list(range(1, count + 1))
                await assert_same_state(api, slow, session.id)
                # Large pages are read twice: first with the small limit, then with the large one.
                assert count < len(reads) < count + 10
                # No page is kept that all watchers have received.
                [group] = session_hub.groups.values()
                assert group.next_page is None

    async def test_follower_that_stops_reading_is_disconnected(
        self, start_server: Any, database: str
    ) -> None:
        """The write timeout also holds for an event that is sent to all followers at once."""
        api = await start_server(database, stream_write_timeout_seconds=0.3)
        session = await api.session()
        async with watching_slowly(api, session.id) as slow:
            await slow.until("caught_up")
            for _ in range(3):  # gRPC's client takes one that nobody has read
                await api.message(session.id, "x" * LARGE)
                await asyncio.sleep(0.05)
            await asyncio.sleep(1)
            with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
                await slow.end()

    async def test_discarded_history_is_not_delivered(self, database: str, tenant: str) -> None:
        """A page kept for a slow watcher is not delivered to one that joined after a restore."""
        async with serving(
            database, stream_write_timeout_seconds=60, watch_poll_interval_seconds=3600
        ) as server:
            api = Api(f"127.0.0.1:{server.port}", tenant)
            session = await api.session()
            async with (
                api,
                watching_slowly(api, session.id) as slow,
                watching(api, session.id) as quick,
            ):
                await slow.until("caught_up")
                await quick.until("caught_up")
                for revision in range(1, 11):
                    await api.message(session.id, "x" * LARGE)
                    await quick.until_revision(revision)
                [session_hub] = server._watch_hub._session_hubs.values()
                [at] = [
                    group.position
                    for group in session_hub.groups.values()
                    if group.next_page is not None
                ]
                assert 0 < at.revision < 10
                with psycopg.connect(database) as connection:
                    for sql in (
                        "DELETE FROM chat_messages WHERE tenant_id = %(t)s AND sequence > %(r)s",
                        "UPDATE chat_sessions SET revision = %(r)s WHERE tenant_id = %(t)s",
                    ):
                        connection.execute(sql, {"t": tenant, "r": at.revision})
                async with watching(api, session.id, at.revision) as watcher:
                    await watcher.until("caught_up")
                    message = await api.message(session.id)
                    event = await watcher.next()
                    assert list(event.messages_created.messages) == [message]

    async def test_every_kind_of_watcher_reaches_the_same_state(
        self, start_server: Any, database: str
    ) -> None:
        """Fast or slow, resumed at any revision at any time: nothing is lost or repeated."""
        api = await start_server(
            database, watch_poll_interval_seconds=3600, watch_heartbeat_seconds=0.3
        )
        session = await api.session()
        chance = random.Random(4)
        ids: list[str] = []

        async def write(count: int) -> None:
            for _ in range(count):
                match chance.randrange(8):
                    case 0 if ids:
                        with contextlib.suppress(grpc.aio.AioRpcError):  # deleted meanwhile
                            n = chance.random()
                            await set_metadata(api, chance.choice(ids), f'{{"n": {n}}}')
                    case 1 if ids:
                        await delete_message(api, ids.pop(chance.randrange(len(ids))))
                    case 2:
                        await set_status(api, session.id, chance.choice([RESOLVED, ARCHIVED]))
                    case 3:
                        await create_batch(
                            api, session.id, [user_message("b")] * chance.randrange(1, 9)
                        )
                    case _:
                        message = await api.message(session.id, "x" * chance.choice([9, 9, 20_000]))
                        ids.append(message.id)
                await asyncio.sleep(chance.random() / 50)

        async def watch(number: int) -> None:
            kind = watching_slowly if number % 3 == 0 else watching
            watcher = Watcher(None)
            while not done.is_set():
                async with kind(api, session.id, max(0, watcher.revision)) as stream:
                    watcher._call = stream._call
                    for _ in range(chance.randrange(2, 40)):
                        if done.is_set():
                            break
                        await watcher.next()
                        if kind is watching_slowly:
                            await asyncio.sleep(chance.random() / 20)
            async with watching(api, session.id, watcher.revision) as stream:
                watcher._call = stream._call
                await watcher.until("caught_up")
            await assert_same_state(api, watcher, session.id)
            assert sorted(watcher.messages) == await message_ids(api, session.id)

        done = asyncio.Event()
        watchers = [asyncio.create_task(watch(number)) for number in range(9)]
        await asyncio.gather(*(write(40) for _ in range(3)))
        done.set()
        await asyncio.gather(*watchers)


async def message_ids(api: Api, session_id: str) -> list[str]:
    stream = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
    return sorted([message.id async for page in stream for message in page.messages])
