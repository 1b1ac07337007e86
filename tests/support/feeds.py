"""Followers of a tenant's feed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import psycopg

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsRequest, WatchChatSessionsResponse
from support.client import Api
from support.tickets import create_ticket

Response = WatchChatSessionsResponse
Event = WatchChatSessionsResponse.Event

# Transactions of other tests in the same PostgreSQL hold up the feed while they are open.
TOLD_SECONDS = 30


class Feed:
    """A stream of the feed, and what a client keeps of its events."""

    def __init__(self, call: Any):
        self._call = call
        self.cursor = ""
        self.responses: list[Response] = []
        # Each event in order: its kind, and the id that it is about. Without those that only repeat
        # the last one about that id: transactions of other tests can cause them at any time.
        self.told: list[tuple[str, str]] = []
        self._last: dict[str, Event] = {}
        self.sessions: dict[str, r.ChatSession] = {}
        self.tickets: dict[str, r.Ticket] = {}

    async def next(self, timeout: float = TOLD_SECONDS) -> Response:
        """The next response, applied."""
        async with asyncio.timeout(timeout):
            response = await self._call.read()
        assert response is not grpc.aio.EOF, "the stream has ended"
        assert response.events, "a response has at least one event"
        assert response.cursor
        self.responses.append(response)
        self.apply(response)
        return response

    def apply(self, *responses: Response) -> None:
        """Keep what these responses tell."""
        for response in responses:
            self.cursor = response.cursor
            for event in response.events:
                self._apply(event)

    def _apply(self, event: Event) -> None:
        kind = event.WhichOneof("event")
        subject = ""
        match kind:
            case "session":
                subject = event.session.id
                self.sessions[subject] = event.session
            case "session_deleted":
                subject = event.session_deleted.session_id
                self.sessions.pop(subject, None)
            case "left":
                subject = event.left.session_id
                self.sessions.pop(subject, None)
            case "ticket":
                subject = event.ticket.id
                self.tickets[subject] = event.ticket
            case "ticket_deleted":
                subject = event.ticket_deleted.ticket_id
                self.tickets.pop(subject, None)
        is_repeat = bool(subject) and self._last.get(subject) == event
        if not is_repeat:
            self.told.append((kind, subject))
        self._last[subject] = event

    async def until(self, kind: str, subject: str = "", *, timeout: float = TOLD_SECONDS) -> None:
        """Read until this is told, if it was not told before."""
        async with asyncio.timeout(timeout):
            while (kind, subject) not in self.told:
                await self.next()

    async def until_revision(self, session: r.ChatSession) -> None:
        """Read until the session is told as it is now, or newer."""
        while self.revision_of(session.id) < session.revision:
            await self.next()

    def revision_of(self, session_id: str) -> int:
        """The revision of a session that was told; -1 if it was not."""
        session = self.sessions.get(session_id)
        return -1 if session is None else session.revision

    async def settle(self, api: Api) -> list[tuple[str, str]]:
        """Read until all that is committed now is told. Returns what was told since the last time.

        The order within a pass says nothing. What was committed before a ticket is told before a
        second one that is created when the first has been told.
        """
        tickets = [await create_ticket(api)]
        await self.until("ticket", tickets[0].id)
        tickets.append(await create_ticket(api))
        await self.until("ticket", tickets[1].id)
        own = {ticket.id for ticket in tickets}
        told = [each for each in self.told if each[0] != "heartbeat" and each[1] not in own]
        self.told.clear()
        return told

    async def end(self) -> None:
        """Read to the end of the stream, which has an error."""
        while (await self._call.read()) is not grpc.aio.EOF:
            pass


@contextlib.asynccontextmanager
async def following_feed(api: Api, cursor: str = "", **fields: Any) -> AsyncIterator[Feed]:
    """A stream of the feed after a cursor, from the beginning, or from now."""
    request = WatchChatSessionsRequest(cursor=cursor, **fields)
    call = api.sessions.WatchChatSessions(request)
    try:
        yield Feed(call)
    finally:
        call.cancel()


@contextlib.asynccontextmanager
async def caught_up_feed(api: Api, cursor: str = "", **fields: Any) -> AsyncIterator[Feed]:
    """As `following_feed`, once it has caught up."""
    async with following_feed(api, cursor, **fields) as feed:
        await feed.until("caught_up")
        yield feed


async def until_xmin_passes(database: str, position: int) -> None:
    """Until no transaction is open that began before the one of this position."""
    statement = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        async with asyncio.timeout(30):
            while True:
                [xmin] = await (await connection.execute(statement)).fetchone() or [0]
                if xmin > position & (1 << 48) - 1:
                    return
                await asyncio.sleep(0.02)


async def position_of(database: str, session_id: str) -> int:
    async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
        statement = "SELECT feed_position FROM chat_sessions WHERE id = %s"
        [position] = await (await connection.execute(statement, [session_id])).fetchone() or [0]
    return int(position)
