"""The followers of a failover: of all sessions and of the feed, by raw streams and by the client.

Some are away while the standby is promoted, and come back when other writes have taken the same
revisions.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import grpc.aio
from support.client import Api

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.errors import ChatTicketError
from faults.followers import (
    ClientFeedFollower,
    ClientSessionFollower,
    FeedFollower,
    HeldSession,
    HeldTenant,
    SessionFollower,
)
from faults.record import reason_of
from faults.workload import CHANNEL, PAUSE_SECONDS, Workload

SETTLE_SECONDS = 20.0


@dataclass(frozen=True)
class Verdict:
    """What became of the followers."""

    of_sessions: int
    of_feeds: int
    told: int  # followers of sessions that a position of theirs was lost
    feeds_told: int  # followers of feeds by raw streams, that it may be lost
    wrong: tuple[str, ...]  # what they hold that is no more, or lack
    for_nothing: tuple[str, ...]  # what was told although nothing of theirs was lost
    errors: tuple[str, ...]  # that no follower is to see


class Followers:
    """Three of each session, and three of each tenant's feed."""

    def __init__(self, workload: Workload):
        self._workload = workload
        self._sessions: list[tuple[str, HeldSession]] = []
        self._feeds: list[tuple[str, HeldTenant]] = []
        self._clients: list[AsyncChatTicketClient] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._streams: set[asyncio.Task[None]] = set()  # of those that are away in between
        self._are_back = asyncio.Event()
        self._are_back.set()
        self._errors: list[str] = []

    def start(self) -> None:
        for number, tenant in enumerate(self._workload.tenants):
            address = self._workload.address(number)
            client = AsyncChatTicketClient(address, tenant=tenant, options=CHANNEL)
            self._clients.append(client)
            for session_id in self._workload.sessions[tenant]:
                raw, away = SessionFollower(session_id), SessionFollower(session_id)
                by_client = ClientSessionFollower(session_id)
                self._sessions += [(tenant, each) for each in (raw, away, by_client)]
                self._start(raw.follow, tenant, number)
                self._start(away.follow, tenant, number + 1, is_away=True)
                self._start_client(by_client.follow, client)
            feed, away_feed, feed_by_client = FeedFollower(), FeedFollower(), ClientFeedFollower()
            self._feeds += [(tenant, each) for each in (feed, away_feed, feed_by_client)]
            self._start(feed.follow, tenant, number)
            self._start(away_feed.follow, tenant, number + 1, is_away=True)
            self._start_client(feed_by_client.follow, client)

    def leave(self) -> None:
        """Some of them, until they come back."""
        self._are_back.clear()
        for stream in self._streams:
            stream.cancel()

    def come_back(self) -> None:
        self._are_back.set()

    async def settle(self) -> None:
        """Wait until all hold what the database has, or long enough."""
        try:
            async with asyncio.timeout(SETTLE_SECONDS):
                while await self._wrong():
                    await asyncio.sleep(0.1)
        except TimeoutError:
            pass

    async def verdict(self, kept: dict[str, int]) -> Verdict:
        """`kept` has the revision of each session that the standby had."""
        for_nothing = [
            f"a follower of {follower.session_id}: {loss}, and {kept[follower.session_id]} is kept"
            for _, follower in self._sessions
            for loss in follower.losses
            if loss.newest <= kept[follower.session_id]
            or (loss.newest == loss.revision and loss.shared < kept[follower.session_id])
        ]
        for_nothing += [
            f"a follower of {follower.session_id} got {repeat} again"
            for _, follower in self._sessions
            for repeat in follower.repeats
        ]
        return Verdict(
            of_sessions=len(self._sessions),
            of_feeds=len(self._feeds),
            told=sum(bool(follower.losses) for _, follower in self._sessions),
            feeds_told=sum(bool(follower.losses) for _, follower in self._feeds),
            wrong=tuple(await self._wrong()),
            for_nothing=tuple(for_nothing),
            errors=tuple(self._errors),
        )

    async def close(self) -> None:
        self._are_back.set()
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        for client in self._clients:
            await client.close()
        errors = [result for result in results if isinstance(result, Exception)]
        if errors:
            raise errors[0]

    def _start(
        self,
        follow: Callable[[Api], Awaitable[None]],
        tenant: str,
        number: int,
        *,
        is_away: bool = False,
    ) -> None:
        self._tasks.append(asyncio.create_task(self._follow(follow, tenant, number, is_away)))

    def _start_client(
        self,
        follow: Callable[[AsyncChatTicketClient], Awaitable[None]],
        client: AsyncChatTicketClient,
    ) -> None:
        self._tasks.append(asyncio.create_task(self._follow_by_client(follow, client)))

    async def _follow_by_client(
        self,
        follow: Callable[[AsyncChatTicketClient], Awaitable[None]],
        client: AsyncChatTicketClient,
    ) -> None:
        try:
            await follow(client)
        except ChatTicketError as error:
            self._errors.append(f"{type(error).__name__} of the client: {error}")

    async def _follow(
        self, follow: Callable[[Api], Awaitable[None]], tenant: str, number: int, is_away: bool
    ) -> None:
        while True:
            number += 1  # the next stream may be of another server
            stream = asyncio.ensure_future(follow(self._workload.api(tenant, number)))
            if is_away:
                self._streams.add(stream)
            try:
                await stream
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    self._errors.append(
                        f"{error.code().name} {reason_of(error)}: {error.details()}"
                    )
            except asyncio.CancelledError:
                if self._are_back.is_set():
                    raise
            finally:
                stream.cancel()
                self._streams.discard(stream)
            if is_away:
                await self._are_back.wait()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _wrong(self) -> list[str]:
        wrong = []
        for tenant, follower in (*self._sessions, *self._feeds):
            name = f"{type(follower).__name__} of {getattr(follower, 'session_id', tenant)}"
            api = self._workload.api(tenant, 0)
            wrong += [f"{name}: {text}" for text in await follower.differences(api)]
        return wrong
