"""Open streams of the feed, when the database is another one than before."""

import pytest
from grpc import StatusCode
from support.client import Api, refused
from support.database import execute
from support.feeds import caught_up_feed
from support.server import serving

pytestmark = pytest.mark.usefixtures("feed_turn")


async def test_stream_is_told_although_nobody_writes(fresh_database: str, tenant: str) -> None:
    """A standby can have been promoted that lacks what was told last. The next poll finds it."""
    async with (
        serving(fresh_database, watch_poll_interval_seconds=0.1) as server,
        Api(f"127.0.0.1:{server.port}", tenant) as api,
        caught_up_feed(api) as feed,
    ):
        execute(fresh_database, "UPDATE chat_epochs SET identity = 'that of the primary'")
        with refused(StatusCode.OUT_OF_RANGE, "HISTORY_CHANGED"):
            while True:
                await feed.next(timeout=10)
