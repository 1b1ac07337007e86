"""Watching across processes: two servers on one database, with and without NOTIFY."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
import pytest
from support.client import Api, an_id
from support.process import server_process
from support.server import serving
from support.watching import assert_same_state, watching

from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket_svc.server import Server
from chat_ticket_svc.watch import notifications

LISTENERS = """
SELECT {} FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'
"""


def listeners(database_url: str, what: LiteralString = "pid") -> int:
    """How many LISTEN connections all servers have on a database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        return len(connection.execute(LISTENERS.format(what)).fetchall())


def terminate_listeners(database_url: str) -> int:
    """Terminate them, and return their number."""
    return listeners(database_url, "pg_terminate_backend(pid)")


async def test_servers_see_each_others_writes(two_clients: tuple[Api, Api]) -> None:
    """A write on one wakes the watchers on the other by NOTIFY: no poll runs here."""
    one, two = two_clients
    session = await one.session()
    async with watching(one, session.id) as here, watching(two, session.id) as there:
        await here.until("caught_up")
        await there.until("caught_up")
        for writer in (one, two, one):
            message = await writer.message(session.id)
            await here.until_revision(message.sequence)
            await there.until_revision(message.sequence)
        for watcher in (here, there):
            await assert_same_state(one, watcher, session.id)
        await two.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session.id))
        await here.until("session_deleted")
        await there.until("session_deleted")


async def test_killed_listener_misses_nothing(
    two_clients: tuple[Api, Api], fresh_database: str
) -> None:
    """Changes made while nothing listens are read when the listener is back, without a poll."""
    one, two = two_clients
    session = await one.session()
    async with watching(one, session.id) as watcher:
        await watcher.until("caught_up")
        async with asyncio.timeout(10):  # the servers listen soon after they serve
            while listeners(fresh_database) < 2:
                await asyncio.sleep(0.05)
        assert terminate_listeners(fresh_database) == 2
        message = await two.message(session.id)
        await watcher.until_revision(message.sequence)
        async with asyncio.timeout(10):
            while terminate_listeners(fresh_database) == 0:
                await asyncio.sleep(0.05)
        await two.message(session.id)
        message = await two.message(session.id)
        await watcher.until_revision(message.sequence)
        await assert_same_state(one, watcher, session.id)


async def test_poll_replaces_notify(fresh_database: str, cluster: Any, tenant: str) -> None:
    """With NOTIFY suppressed entirely, a watcher still gets everything."""
    # Notifications do not cross databases, and each server has another one for them.
    elsewhere = [cluster.create(), cluster.create()]
    poll = {"CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": "0.2"}
    with (
        server_process(fresh_database, DATABASE_LISTEN_URL=elsewhere[0], **poll) as first,
        server_process(fresh_database, DATABASE_LISTEN_URL=elsewhere[1], **poll) as second,
    ):
        async with Api(first.address, tenant) as one, Api(second.address, tenant) as two:
            session = await one.session()
            async with watching(one, session.id) as watcher:
                await watcher.until("caught_up")
                for _ in range(3):
                    message = await two.message(session.id)
                    await watcher.until_revision(message.sequence)
                await assert_same_state(one, watcher, session.id)
                request = DeleteChatSessionRequest(session_id=session.id)
                await two.sessions.DeleteChatSession(request)
                await watcher.until("session_deleted")
    for url in elsewhere:
        cluster.drop(url)


async def test_writes_to_many_sessions_at_once(two_clients: tuple[Api, Api]) -> None:
    """Changes that arrive while a NOTIFY is in flight are all announced by the next."""
    one, two = two_clients
    sessions = [await one.session() for _ in range(20)]
    async with contextlib.AsyncExitStack() as stack:
        watchers = [
            await stack.enter_async_context(watching(two, session.id)) for session in sessions
        ]
        await asyncio.gather(*(watcher.until("caught_up") for watcher in watchers))
        await asyncio.gather(*(one.message(session.id) for session in sessions))
        await asyncio.gather(*(watcher.until_revision(1) for watcher in watchers))


async def test_poll_survives_any_error(fresh_database: str, cluster: object, tenant: str) -> None:
    """An unexpected error does not end the polling."""
    elsewhere = urlsplit(fresh_database)._replace(path="/postgres").geturl()
    settings = {"DATABASE_LISTEN_URL": elsewhere, "CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": "0.1"}
    with server_process(fresh_database, **settings) as process:
        async with Api(process.address, tenant) as api:
            session = await api.session()
            async with watching(api, session.id) as watcher:
                await watcher.until("caught_up")
                with psycopg.connect(fresh_database, autocommit=True) as connection:
                    connection.execute("ALTER TABLE chat_sessions RENAME TO away")
                    process.wait_for("could not poll the watched sessions")
                    connection.execute("ALTER TABLE away RENAME TO chat_sessions")
                    connection.execute("UPDATE chat_sessions SET status = 'resolved', revision = 1")
                event = await watcher.next()
                assert (event.WhichOneof("event"), event.revision) == ("session", 1)


async def test_unknown_notifications_are_harmless(
    two_clients: tuple[Api, Api], fresh_database: str
) -> None:
    """Anybody may NOTIFY: a payload that names no watched session has no effect."""
    one, two = two_clients
    session = await one.session()
    async with watching(one, session.id) as watcher:
        await watcher.until("caught_up")
        with psycopg.connect(fresh_database, autocommit=True) as connection:
            for payload in ("", "x", "é" * 100, f"{session.id}another tenant"):
                connection.execute("SELECT pg_notify('chat_ticket_session_changed', %s)", [payload])
        message = await two.message(session.id)
        await watcher.until_revision(message.sequence)
        assert watcher.kinds == ["session", "caught_up", "messages_created"]


async def test_many_writes_are_announced_by_few_notifications(
    start_server: Any, fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under load each NOTIFY announces several sessions, and every session is announced."""
    monkeypatch.setattr(notifications, "NOTIFY_INTERVAL_SECONDS", 0.2)
    address = (await start_server(fresh_database)).address
    execute, notified = psycopg.AsyncCursor.execute, 0

    async def counted(cursor: Any, sql: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal notified
        notified += sql == notifications.NOTIFY
        return await execute(cursor, sql, *arguments, **named)

    async with (
        Api(address, "t" * 255) as api,
        await psycopg.AsyncConnection.connect(fresh_database, autocommit=True) as listener,
    ):
        # By SQL, as the service announces new sessions too.
        created = await listener.execute(
            "INSERT INTO chat_sessions (tenant_id) SELECT %s FROM generate_series(1, 60)"
            " RETURNING id::text",
            [api.tenant],
        )
        sessions = [session_id for (session_id,) in await created.fetchall()]
        await listener.execute(f"LISTEN {notifications.CHANNEL}")
        monkeypatch.setattr(psycopg.AsyncCursor, "execute", counted)
        clock = asyncio.get_running_loop().time
        start = clock()
        for some in (sessions[:30], sessions[30:]):  # below the quota of calls in flight
            await asyncio.gather(*map(api.message, some))
        announced = list[str]()
        async for notification in listener.notifies(timeout=5):
            announced += notification.payload.split("\n")
            if len(announced) == len(sessions):
                break
    # At most one per interval, and one per 27 sessions.
    assert (
        3
        <= notified
        <= 1 + len(sessions) // 27 + (clock() - start) / notifications.NOTIFY_INTERVAL_SECONDS
    )
    assert sorted(announced) == sorted(f"{session_id}{api.tenant}" for session_id in sessions)


class Writers:
    """Writers of drafts, and what they are told."""

    def __init__(self) -> None:
        self.checked: list[tuple[str, str]] = []
        self.polls = 0

    def check_drafts(self, key: tuple[str, str]) -> None:
        self.checked.append(key)

    def check_all_drafts(self) -> None:
        self.polls += 1


@contextlib.asynccontextmanager
async def notifying(
    database_url: str, poll_seconds: float
) -> AsyncIterator[tuple[Server, Writers]]:
    writers = Writers()
    async with serving(database_url, watch_poll_interval_seconds=poll_seconds) as server:
        server._watch_hub.set_draft_writers(writers)
        yield server, writers


async def test_writers_of_drafts_learn_what_other_processes_do(
    fresh_database: str, tenant: str
) -> None:
    """Of the other's changes to drafts, and not of their own nor of changes to sessions."""
    async with (
        notifying(fresh_database, 3600) as (one, here),
        notifying(fresh_database, 3600) as (two, there),
    ):
        async with asyncio.timeout(10):  # the servers listen soon after they serve
            while listeners(fresh_database) < 2:
                await asyncio.sleep(0.05)
        keys = [(tenant, an_id()) for _ in range(60)]
        for key in keys:
            one._watch_hub.notify_changed(tenant, an_id())
            one._watch_hub.notify_draft(*key)
        async with asyncio.timeout(5):
            while len(there.checked) < len(keys):
                await asyncio.sleep(0.01)
        assert sorted(there.checked) == sorted(keys)
        two._watch_hub.notify_draft(*keys[0])
        async with asyncio.timeout(5):
            while not here.checked:
                await asyncio.sleep(0.01)
        assert here.checked == keys[:1]


async def test_writers_of_drafts_are_polled_for(fresh_database: str) -> None:
    """Also where nobody watches, as a notification may be lost."""
    async with notifying(fresh_database, 0.1) as (_, writers), asyncio.timeout(5):
        while writers.polls < 3:
            await asyncio.sleep(0.02)


async def test_drafts_do_not_crowd_out_sessions(
    fresh_database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many drafts wait to be announced, a changed session is announced."""
    monkeypatch.setattr(notifications, "MAX_PENDING_SESSIONS", 100)
    async with (
        serving(fresh_database) as server,
        await psycopg.AsyncConnection.connect(fresh_database, autocommit=True) as listener,
    ):
        await listener.execute(f"LISTEN {notifications.CHANNEL}")
        for _ in range(200):
            server._watch_hub.notify_draft(tenant, an_id())
        session_id = an_id()
        server._watch_hub.notify_changed(tenant, session_id)
        async for notification in listener.notifies(timeout=5):
            assert notification.payload == f"{session_id}{tenant}"
            break
        else:
            pytest.fail("not announced")
