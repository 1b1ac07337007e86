"""WatchChatSession at its edges: between two pages, between read and wait, at the end."""

import asyncio
import contextlib
import itertools
from typing import Any

import pytest
from grpc import StatusCode
from support.client import Api, a_file, an_id, refused
from support.messages import create_batch, delete_message, set_metadata, user_message
from support.server import serving
from support.sessions import RESOLVED, set_status
from support.watching import watching

from chat_ticket_svc.store import session_changes


async def test_resume_delivers_each_change_once(api: Api) -> None:
    """A message that is new to the watcher is not also delivered as changed."""
    session = await api.session()
    one, two = [await api.message(session.id) for _ in range(2)]
    await set_metadata(api, one.id, "{}")  # revision 3
    three = await api.message(session.id)  # 4
    await set_metadata(api, three.id, "{}")  # 5
    await delete_message(api, two.id)  # 6
    await api.attachment(one.id)  # 7
    create, delete_two, change_one = ("created", 4), ("deleted", 6), ("updated", 7)
    for after, expected in (
        (0, [create, ("deleted", 7)]),
        (1, [create, delete_two, change_one]),
        (3, [create, delete_two, change_one]),
        (4, [("updated", 5), delete_two, change_one]),
        (5, [delete_two, change_one]),
        (7, []),
    ):
        delivered = []
        async with watching(api, session.id, after) as watcher:
            watcher.messages = {message.id: message for message in (one, two, three)}
            while "caught_up" not in watcher.kinds:
                event = await watcher.next()
                delivered.append((watcher.kinds[-1].rpartition("_")[2], event.revision))
        assert delivered == [("session", after), *expected, ("up", 7)], after


async def test_position_is_the_sessions_revision(api: Api) -> None:
    """Even if the last changes were not to messages. Resuming there delivers nothing."""
    session = await api.session()
    await api.message(session.id)
    await set_status(api, session.id, RESOLVED)
    await api.escalate(session.id)
    for after, revisions in ((0, [0, 0, 3, 3]), (1, [1, 1, 3]), (3, [3, 3, 3])):
        async with watching(api, session.id, after) as watcher:
            delivered = [(await watcher.next()).revision for _ in revisions]
            assert delivered == revisions
            assert watcher.kinds[-1] == "caught_up"


async def test_change_between_the_read_and_the_wait_is_not_missed(
    start_server: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write right after the read wakes the watcher. The server does not poll."""
    api = await start_server(database, watch_poll_interval_seconds=3600)
    session = await api.session()
    read, writes = session_changes.page, iter(("one", "two", "three"))

    async def page(*arguments: Any, **named: Any) -> Any:
        found = await read(*arguments, **named)
        for content in itertools.islice(writes, 1):
            await api.message(session.id, content)
        return found

    monkeypatch.setattr(session_changes, "page", page)
    async with watching(api, session.id) as watcher:
        await watcher.until_revision(3)
        assert watcher.created == [1, 2, 3]


async def test_heartbeats_are_for_silence_only(start_server: Any, database: str) -> None:
    """None while events arrive, then at most one per interval."""
    api = await start_server(database, watch_heartbeat_seconds=1)
    session = await api.session()
    clock = asyncio.get_running_loop().time
    async with watching(api, session.id) as watcher:
        for _ in range(15):
            await api.message(session.id)
            await asyncio.sleep(0.1)
        await watcher.until_revision(15)
        assert "heartbeat" not in watcher.kinds
        start = clock()
        for _ in range(2):
            await watcher.until("heartbeat")
        assert clock() - start > 1.5


async def test_events_are_at_most_1_mib(api: Api) -> None:
    """Large changes are split into events that clients accept, for every kind of large field."""
    session = await api.session()
    for _ in range(18):
        await api.message(
            session.id, "x" * 256 * 1024, metadata_json='{"a": "' + "b" * 60_000 + '"}'
        )
    async with watching(api, session.id) as watcher:
        while "caught_up" not in watcher.kinds:
            assert (await watcher.next()).ByteSize() <= 1024 * 1024
        assert watcher.created == list(range(1, 19))


async def test_shutdown_between_two_pages(
    database: str, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream that is reading its history, and one that starts too late, end as well."""
    async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
        session = await api.session()
        await create_batch(api, session.id, [user_message("x")] * 40)
        read, drains = session_changes.page, iter([server._watch_hub.drain])

        async def page(*arguments: Any, **named: Any) -> Any:
            for drain in drains:
                drain()
            return await read(*arguments, **named)

        monkeypatch.setattr(session_changes, "page", page)
        for _ in range(2):
            with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                async with watching(api, session.id) as watcher:
                    while True:
                        await watcher.next(timeout=5)


async def test_stream_that_ends_leaves_no_watcher(database: str, tenant: str) -> None:
    """A watcher that has left is not woken, polled for or kept in memory."""
    async with serving(database) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
        session = await api.session()
        async with watching(api, session.id) as watcher:
            await watcher.until("caught_up")
            assert len(server._watch_hub._session_hubs) == 1
        async with asyncio.timeout(5):
            while server._watch_hub._session_hubs:
                await asyncio.sleep(0.02)


async def test_reads_of_many_watchers_are_limited(start_server: Any, fresh_database: str) -> None:
    """One write wakes more watchers than may wait for a connection: their reads are limited."""
    api = await start_server(fresh_database, pool_size=2, watch_poll_interval_seconds=3600)
    session = await api.session()
    async with contextlib.AsyncExitStack() as stack:
        watchers = [await stack.enter_async_context(watching(api, session.id)) for _ in range(50)]
        await asyncio.gather(*(watcher.until("caught_up") for watcher in watchers))
        await api.message(session.id)
        await asyncio.gather(*(watcher.until_revision(1) for watcher in watchers))


async def test_ids_in_capitals_are_the_same_ids(start_server: Any, database: str) -> None:
    """Ids are answered in small letters, found in both, and one is not two in a batch."""
    api = await start_server(database, watch_poll_interval_seconds=3600)
    session, message_id, file_id = await api.session(), an_id(), an_id()
    files = [a_file(id=file_id.upper())]
    async with watching(api, session.id.upper()) as watcher:
        await watcher.until("caught_up")
        message = await api.message(session.id.upper(), id=message_id.upper(), attachments=files)
        assert list((await watcher.next()).messages_created.messages) == [message]
    assert (message.id, message.attachments[0].id) == (message_id, file_id)
    assert await api.message(session.id, id=message_id, attachments=files) == message
    twice = [user_message("a", id=message_id), user_message("a", id=message_id.upper())]
    with refused(StatusCode.INVALID_ARGUMENT):
        await create_batch(api, session.id, twice)
