"""Followers of the tenants' feeds, that leave their streams and resume after their last cursor."""

import asyncio
import contextlib
import functools
import math
import random
from collections.abc import Callable
from typing import Any

import grpc.aio
import psycopg
from grpc import StatusCode
from support.client import Api

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest
from faults.feed_audit import Key, Snapshot, Stored, read_stored
from faults.feed_record import Checkpoint, FeedRecord, Filters

PAUSE_SECONDS = 0.05
SNAPSHOT_SECONDS = 1.0
# A stream that is left, is left after so many responses, or so many seconds.
MOST_RESPONSES = 300
MOST_SECONDS = 3.0

# Whether they begin from the beginning, and what they follow: of each tenant of a run.
FEEDS = (
    (True, Filters()),
    (True, Filters(has_ticket=True)),
    (False, Filters(statuses=("active",))),
)

# A follower that resumes gets none of these, whatever breaks.
NEVER = {
    StatusCode.INTERNAL,
    StatusCode.UNKNOWN,
    StatusCode.OUT_OF_RANGE,
    StatusCode.INVALID_ARGUMENT,
}


class Snapshots:
    """The transactions of the database at a moment; None while it does not answer."""

    def __init__(self, database_url: str):
        self._database_url = database_url
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._lock = asyncio.Lock()

    async def take(self) -> Snapshot | None:
        with contextlib.suppress(psycopg.OperationalError, TimeoutError):
            async with self._lock, asyncio.timeout(SNAPSHOT_SECONDS):
                try:
                    if self._connection is None:
                        self._connection = await psycopg.AsyncConnection.connect(
                            self._database_url, autocommit=True
                        )
                    cursor = await self._connection.execute("SELECT pg_current_snapshot()::text")
                    [text] = await cursor.fetchone() or ("",)
                    return Snapshot.parse(text)
                except BaseException:
                    await self.close()
                    raise
        return None

    async def close(self) -> None:
        if self._connection is not None:
            await self._connection.close()
            self._connection = None


class FeedFollower:
    """Follows the feed until `finish`. `api(number)` is a client of one of the servers."""

    def __init__(
        self,
        record: FeedRecord,
        api: Callable[[int], Api],
        snapshots: Snapshots,
        chance: random.Random,
        *,
        leaves: bool,
        check_response: Callable[[str, str, bytes], None],
        findings: list[str],
    ):
        """With `leaves`, it also leaves streams that work."""
        self.record = record
        self._api = api
        self._snapshots = snapshots
        self._chance = chance
        self._leaves = leaves
        self._check_response = check_response
        self._findings = findings
        self._is_last = False
        self._call: Any = None

    async def follow(self) -> None:
        number = self._chance.randrange(2)
        while True:
            number += 1  # the next stream may be of another server
            is_last = self._is_last
            if await self._stream(self._api(number), is_last=is_last) and is_last:
                return

    def finish(self) -> None:
        """Leave the stream, and end when another one has caught up."""
        self._is_last = True
        if self._call is not None:
            self._call.cancel()

    async def _stream(self, api: Api, *, is_last: bool) -> bool:
        """Follow one stream until it breaks; whether it has met a checkpoint."""
        record, has_caught_up = self.record, False
        snapshot = await self._snapshots.take()
        if self._is_last and not is_last:
            return False
        request = WatchChatSessionsRequest(
            cursor=record.cursor,
            from_beginning=record.from_beginning and not record.cursor,
            **record.filters.request,
        )
        record.streams += 1
        left = MOST_RESPONSES * 1000
        self._call = api.sessions.WatchChatSessions(request, timeout=3600)
        leave = None
        if self._leaves and not is_last:
            # Many leave soon, often in the midst of what was there when the stream began.
            left = round(math.exp(self._chance.uniform(0, math.log(MOST_RESPONSES))))
            left = 1 if record.streams == 1 else left
            seconds = self._chance.uniform(0, MOST_SECONDS)
            leave = asyncio.get_running_loop().call_later(seconds, self._call.cancel)
        try:
            async for response in self._call:
                self._check_response(
                    record.tenant, "WatchChatSessions", response.SerializeToString()
                )
                if record.apply(response):
                    if snapshot is not None:
                        record.checkpoints.append(Checkpoint(len(record.told), snapshot.xmin))
                        has_caught_up = True
                    if is_last:
                        break
                if record.began is None:
                    record.began = await self._snapshots.take()
                left -= 1
                if left == 0:
                    break
            else:
                self._findings.append("WatchChatSessions: the stream ended without an error")
        except grpc.aio.AioRpcError as error:
            if error.code() in NEVER:
                text = f"WatchChatSessions: {error.code().name}: {error.details()}"
                self._findings.append(text)
            await asyncio.sleep(PAUSE_SECONDS)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling() or not self._call.cancelled():
                raise
        finally:
            if leave is not None:
                leave.cancel()
            self._call.cancel()
        return has_caught_up


class FeedFollowers:
    """Followers of several tenants' feeds."""

    def __init__(
        self,
        api: Callable[[str, int], Api],
        database_url: str,
        check_response: Callable[[str, str, bytes], None],
        chance: random.Random,
        findings: list[str],
    ):
        self._api = api
        self._database_url = database_url
        self._check_response = check_response
        self._chance = chance
        self._findings = findings
        self._snapshots = Snapshots(database_url)
        self._followers: list[FeedFollower] = []
        self.tasks: list[asyncio.Task[None]] = []

    def start_all(self, tenant: str) -> list[FeedRecord]:
        """Start one of each kind."""
        records = [
            FeedRecord(
                tenant=tenant,
                name=f"from {'the beginning' if from_beginning else 'now'}, {filters}",
                filters=filters,
                from_beginning=from_beginning,
            )
            for from_beginning, filters in FEEDS
        ]
        for record in records:
            self.start(record, leaves=True)
        return records

    def start(self, record: FeedRecord, *, leaves: bool) -> None:
        follower = FeedFollower(
            record,
            functools.partial(self._api, record.tenant),
            self._snapshots,
            random.Random(self._chance.random()),
            leaves=leaves,
            check_response=self._check_response,
            findings=self._findings,
        )
        self._followers.append(follower)
        self.tasks.append(asyncio.create_task(follower.follow()))

    async def wait_until_begun(self) -> None:
        while not all(follower.record.began for follower in self._followers):
            await self._wait()

    async def settle(self, seconds: float) -> None:
        """When the writers have ended: let the followers catch up, and end.

        Those that began from the beginning must get to what the tables have within `seconds`.
        """
        ended = await self._snapshot()
        while (await self._snapshot()).xmin < ended.xmax:
            await self._wait()
        try:
            async with asyncio.timeout(seconds):
                for tenant in {follower.record.tenant for follower in self._followers}:
                    await self._get_to_tables(tenant)
        except TimeoutError:
            self._findings.append("WatchChatSessions: followers do not get to what the tables have")
        for follower in self._followers:
            follower.finish()
        await asyncio.gather(*self.tasks)

    async def close(self) -> None:
        """End at once. What a follower has raised is in `tasks`."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._snapshots.close()

    async def _get_to_tables(self, tenant: str) -> None:
        stored = await asyncio.to_thread(self._read_stored, tenant)
        for record in (follower.record for follower in self._followers):
            if record.tenant == tenant and record.from_beginning:
                expected = {
                    key: each for key, each in stored.items() if record.filters.match(each.state)
                }
                while record.held != expected:
                    await self._wait()

    def _read_stored(self, tenant: str) -> dict[Key, Stored]:
        with psycopg.connect(self._database_url) as connection:
            return read_stored(connection, tenant)

    async def _snapshot(self) -> Snapshot:
        while (snapshot := await self._snapshots.take()) is None:
            await asyncio.sleep(PAUSE_SECONDS)
        return snapshot

    async def _wait(self) -> None:
        """A moment. Raises what a follower has raised."""
        await asyncio.sleep(PAUSE_SECONDS)
        for task in self.tasks:
            if task.done():
                task.result()
