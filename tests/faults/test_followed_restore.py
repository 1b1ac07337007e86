"""`follow_sessions` of the Python client, while the database is restored to a point in time."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.client import Api
from support.client_calls import until
from support.client_servers import OPTIONS, free_port
from support.cluster import Cluster
from support.feeds import TOLD_SECONDS, Feed, caught_up_feed
from support.scratch_directory import scratch_directory
from support.server import serving
from support.sessions import RESOLVED, delete_session, get_session, set_status
from support.threaded import ThreadedClient
from support.tickets import create_ticket, delete_ticket, update_ticket

from chat_ticket.client import AsyncChatTicketClient, _retry
from faults.restores import Backups, copied

TENANT = "a tenant"
CLIENTS = (AsyncChatTicketClient, ThreadedClient)


@contextlib.asynccontextmanager
async def served(database_url: str, port: int) -> AsyncIterator[Api]:
    async with (
        serving(database_url, port=port) as server,
        Api(f"127.0.0.1:{server.port}", TENANT) as api,
    ):
        yield api


async def keep(feed: Feed, client: AsyncChatTicketClient, **arguments: Any) -> None:
    """Keep in the feed what the client tells."""
    async for response in client.follow_sessions(**arguments):
        feed.apply(response)


async def test_tells_what_the_restore_has_lost_and_goes_on(
    migrated_data: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a follower that began with a cursor: what it was told before is not lost."""
    monkeypatch.setattr(_retry, "MAX_BACKOFF_SECONDS", 0.2)
    port = free_port()
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(scratch_directory())
        copied(migrated_data, directory / "primary")
        backups = Backups(directory)
        backups.take_snapshot()
        backups.start()
        stack.callback(backups.stop)
        feeds = [Feed(None) for _ in range(2 * len(CLIENTS))]

        async with served(backups.url, port) as api:
            session, deleted = await api.session(), await api.session()
            ticket, deleted_ticket = await create_ticket(api), await create_ticket(api)
            async with caught_up_feed(api, from_beginning=True) as before:
                cursor = before.cursor
            for client_class in CLIENTS:
                client = client_class(api.address, tenant=TENANT, options=OPTIONS)
                await stack.enter_async_context(client)
                for start in ({"from_beginning": True}, {"cursor": cursor}):
                    feed = feeds.pop(0)
                    feeds.append(feed)
                    following = asyncio.create_task(keep(feed, client, **start))
                    stack.callback(following.cancel)
            await until(lambda: all(("caught_up", "") in feed.told for feed in feeds), TOLD_SECONDS)
            backups.dump()
            await set_status(api, session.id, RESOLVED)
            await delete_session(api, deleted.id)
            await update_ticket(api, ticket.id, title="lost")
            await delete_ticket(api, deleted_ticket.id)
            await api.session()
            last = await create_ticket(api)
            await until(lambda: all(last.id in feed.tickets for feed in feeds), TOLD_SECONDS)
        backups.archive()

        url = stack.enter_context(backups.to_point_in_time(cluster))
        async with served(url, port) as api:
            new = await api.session()
            await until(lambda: all(new.id in feed.sessions for feed in feeds), TOLD_SECONDS)
            sessions = [await get_session(api, each.id) for each in (session, deleted, new)]
            for feed in feeds:
                assert feed.sessions == {each.id: each for each in sessions}
                assert feed.tickets == {each.id: each for each in (ticket, deleted_ticket)}
