"""Changes of tickets and their sessions at once, on two servers: no deadlock, none is missed."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import psycopg
from support.client import Api, Refusal
from support.sessions import delete_session, get_session
from support.tickets import CLOSED, OPEN, PENDING, SOLVED, create_ticket, unlink, update_ticket
from support.watching import assert_same_state, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_ticket_pb2 import ListChatTicketsRequest

SECONDS = 2
# What a caller of these calls may hear when another one was first.
LOST = {
    *("CHAT_SESSION_NOT_FOUND", "CHAT_TICKET_NOT_FOUND"),
    *("SESSION_HAS_TICKET", "SESSION_HAS_ACTIVE_TICKET"),
}


class Sessions:
    """Sessions that callers link, unlink and delete, and some that nobody deletes."""

    def __init__(self, kept: list[str]):
        self.kept = kept
        self.others: list[str] = []

    def any(self) -> str:
        return random.choice([*self.kept, *self.others])


async def links(api: Api, ticket_id: str) -> list[r.ChatTicket]:
    request = ListChatTicketsRequest(ticket_id=ticket_id)
    return list((await api.tickets.ListChatTickets(request)).chat_tickets)


async def test_everything_on_a_ticket_and_its_sessions(
    two_clients: tuple[Api, Api], fresh_database: str
) -> None:
    """Every call succeeds or has lost; every follower ends with the ticket as it is stored."""
    one, two = two_clients
    tickets = [await create_ticket(one) for _ in range(2)]
    sessions = Sessions([(await one.session()).id for _ in range(4)])
    outcomes: Counter[str] = Counter()
    ends_at = time.monotonic() + SECONDS

    async def change(api: Api) -> None:
        fields: list[dict[str, Any]] = [
            {"status": random.choice([OPEN, PENDING, SOLVED, CLOSED])},
            {"title": f"title {random.randrange(1000)}"},
            {"status": SOLVED, "title": "solved"},
        ]
        await update_ticket(api, random.choice(tickets).id, **random.choice(fields))

    async def link(api: Api) -> None:
        await api.escalate(sessions.any(), ticket_id=random.choice(tickets).id)

    async def drop_link(api: Api) -> None:
        if found := await links(api, random.choice(tickets).id):
            await unlink(api, random.choice(found).id)

    async def add(api: Api) -> None:
        session = await api.session()
        await api.escalate(session.id, ticket_id=random.choice(tickets).id)
        sessions.others.append(session.id)

    async def delete(api: Api) -> None:
        if sessions.others:
            session_id = random.choice(sessions.others)
            await delete_session(api, session_id)
            with contextlib.suppress(ValueError):
                sessions.others.remove(session_id)

    async def append(api: Api) -> None:
        await api.message(sessions.any())

    async def repeat(api: Api, call: Callable[[Api], Awaitable[None]]) -> None:
        while time.monotonic() < ends_at:
            try:
                await call(api)
            except grpc.aio.AioRpcError as error:
                refusal = Refusal()
                refusal.read(error)
                outcomes[refusal.info.reason] += 1
            else:
                outcomes[f"{call.__name__} done"] += 1
            await asyncio.sleep(random.uniform(0, 0.01))

    async with contextlib.AsyncExitStack() as stack:
        watchers = [
            (session_id, await stack.enter_async_context(watching(api, session_id)))
            for session_id in sessions.kept
            for api in (one, two)
        ]
        calls = (change, change, link, drop_link, add, delete, append)
        await asyncio.gather(*(repeat(api, call) for api in (one, two) for call in calls))
        for session_id, watcher in watchers:
            await watcher.until_revision((await get_session(one, session_id)).revision)
            await assert_same_state(two, watcher, session_id)

    assert {outcome for outcome in outcomes if not outcome.endswith(" done")} <= LOST, outcomes
    assert all(outcomes[f"{call.__name__} done"] for call in calls), outcomes
    with psycopg.connect(fresh_database) as connection:
        deadlocks = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
        odd = connection.execute(
            "SELECT id FROM chat_sessions s WHERE has_ticket <> EXISTS (SELECT FROM chat_tickets ct"
            " WHERE ct.tenant_id = s.tenant_id AND ct.session_id = s.id)"
        ).fetchall()
    assert (deadlocks, odd) == ((0,), [])
