"""The latency of lists of the sessions and tickets of a large tenant, as it gets more of them.

All sessions have a user, a title and labels, as those of a shop might, and no messages. All tickets
have a reference to a help desk.
"""

import asyncio
import contextlib
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import grpc.aio
import psycopg

from benchmarks import service
from benchmarks.service import Bench, Server
from chat_ticket.v1 import chat_session_pb2 as sessions_pb2
from chat_ticket.v1 import chat_ticket_pb2 as tickets_pb
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub
from chat_ticket_svc.services import paging
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import session_listing, ticket_listing

SIZES = (10_000, 1_000_000)  # sessions of the tenant, and as many tickets
PAGE_SIZE = 50
CALLS = 10  # of each kind per round
TIMEOUT_SECONDS = 30

TENANT = "shop"
USER_SESSIONS = 10
RARE_SESSIONS = 20
USER = "user-7"
RARE, COMMON = {"campaign": "rare"}, {"plan": "gold"}
REFERENCE = "ZD-77"
CHANGED_TICKETS = 20
CHANGED_FROM = datetime(2030, 1, 1, tzinfo=UTC)

# The users and the rare label are spread over all of the time.
LOAD = """
INSERT INTO chat_sessions (tenant_id, id, user_id, title, labels, created_at, updated_at)
SELECT %(tenant)s, uuidv7(), 'user-' || n %% %(users)s, 'Where is my parcel?',
       jsonb_build_object(
           'plan', CASE WHEN n %% 5 < 3 THEN 'gold' ELSE 'free' END,
           'region', 'region-' || n %% 7,
           'order', 'order-' || n)
       || CASE WHEN n %% (%(size)s / %(rare_sessions)s) = 7 THEN %(rare)s::jsonb ELSE '{}' END,
       time, time
  FROM generate_series(0, %(size)s - 1) AS n,
       LATERAL (SELECT now() - n * interval '30 seconds' AS time) AS times
"""
# The tickets that changed last are spread over all of the time.
LOAD_TICKETS = """
INSERT INTO tickets (tenant_id, id, title, external_ref, created_at, updated_at)
SELECT %(tenant)s, uuidv7(), 'Where is my parcel?', 'ZD-' || n, time,
       CASE WHEN n %% (%(size)s / %(changed_tickets)s) = 7 THEN %(changed_from)s ELSE time END
  FROM generate_series(0, %(size)s - 1) AS n,
       LATERAL (SELECT now() - n * interval '30 seconds' AS time) AS times
"""
# They are built after the load, which takes less time.
INDEXES = (
    "idx_chat_sessions_user",
    "idx_chat_sessions_labels",
    "idx_tickets_external_ref",
    "idx_tickets_updated",
)


class List(NamedTuple):
    """A list, how many entries its first page has, and what the request asks for."""

    method: str
    expected: int
    filters: dict[str, Any]


SESSIONS, TICKETS = "ListChatSessions", "ListTickets"
BY_UPDATE_TIME = {"order_by": sessions_pb2.CHAT_SESSION_ORDER_UPDATE_TIME}
LISTS: Mapping[str, List] = {
    f"{SESSIONS} by create time": List(SESSIONS, PAGE_SIZE, {}),
    f"{SESSIONS} by update time": List(SESSIONS, PAGE_SIZE, BY_UPDATE_TIME),
    f"{SESSIONS} of a user": List(SESSIONS, USER_SESSIONS, {"user_id": USER}),
    f"{SESSIONS} with a rare label": List(SESSIONS, RARE_SESSIONS, {"labels": RARE}),
    f"{SESSIONS} with a common label": List(SESSIONS, PAGE_SIZE, {"labels": COMMON}),
    f"{SESSIONS} with a common label, by update time": List(
        SESSIONS, PAGE_SIZE, {"labels": COMMON, **BY_UPDATE_TIME}
    ),
    TICKETS: List(TICKETS, PAGE_SIZE, {}),
    f"{TICKETS} with a reference": List(TICKETS, 1, {"external_ref": REFERENCE}),
    f"{TICKETS} that changed last": List(
        TICKETS, CHANGED_TICKETS, {"start_update_time": CHANGED_FROM}
    ),
}


def load(url: str, size: int) -> None:
    """Fill a database with the sessions and tickets of one tenant."""
    with psycopg.connect(url, autocommit=True) as db:
        service.prepare_load(db)
        definitions = [
            db.execute("SELECT pg_get_indexdef(%s::regclass)", [name]).fetchone() or ("",)
            for name in INDEXES
        ]
        for name in INDEXES:
            db.execute(f"DROP INDEX {name}")
        params = {
            "tenant": TENANT,
            "size": size,
            "users": size // USER_SESSIONS,
            "rare": json.dumps(RARE),
            "rare_sessions": RARE_SESSIONS,
            "changed_tickets": CHANGED_TICKETS,
            "changed_from": CHANGED_FROM,
        }
        db.execute(LOAD, params)
        db.execute(LOAD_TICKETS, params)
        for (definition,) in definitions:
            db.execute(definition)
        db.execute("VACUUM (ANALYZE)")
        db.execute("CHECKPOINT")


def measure(bench: Bench) -> tuple[dict[str, dict[int, list[float]]], dict[str, str]]:
    """The medians of the rounds in milliseconds, by list and size, and PostgreSQL's plans."""
    with contextlib.ExitStack() as stack:
        servers: dict[int, Server] = {}
        for size in SIZES:
            bench.progress(f"loading {size:,} sessions and tickets")
            url = stack.enter_context(bench.postgres.database())
            load(url, size)
            log = bench.directory / f"{size}-sessions.log"
            servers[size] = stack.enter_context(service.server(url, log=log))
        return asyncio.run(_measure_rounds(bench, servers)), _explain(url)


async def _measure_rounds(
    bench: Bench, servers: Mapping[int, Server]
) -> dict[str, dict[int, list[float]]]:
    results: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in LISTS}
    async with contextlib.AsyncExitStack() as stack:
        lists: dict[tuple[str, int], Callable[[], Awaitable[float]]] = {}
        for size, server in servers.items():
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(server.address))
            sessions, tickets = ChatSessionServiceStub(channel), ChatTicketServiceStub(channel)
            for name in LISTS:
                lists[name, size] = functools.partial(_list, sessions, tickets, name)
        for number in range(bench.rounds + 1):
            bench.progress(f"lists, round {number}")
            for name in LISTS:
                for size in servers:
                    times = [await lists[name, size]() for _ in range(CALLS)]
                    if number:  # the first is a warm-up
                        results[name][size].append(statistics.median(times))
    return results


async def _list(sessions: Any, tickets: Any, name: str) -> float:
    method, expected, filters = LISTS[name]
    call, request = (
        (tickets.ListTickets, tickets_pb.ListTicketsRequest(page_size=PAGE_SIZE, **filters))
        if method == TICKETS
        else (
            sessions.ListChatSessions,
            sessions_pb2.ListChatSessionsRequest(page_size=PAGE_SIZE, **filters),
        )
    )
    started_at = time.perf_counter()
    response = await call(
        request,
        metadata=(("x-tenant-id", TENANT),),
        timeout=TIMEOUT_SECONDS,
    )
    milliseconds = 1000 * (time.perf_counter() - started_at)
    listed = len(response.tickets if method == TICKETS else response.sessions)
    if listed != expected:
        raise RuntimeError(f"{name}: {listed} entries, and not {expected}")
    return milliseconds


def _explain(url: str) -> dict[str, str]:
    """PostgreSQL's plans for the statements of the lists."""
    plans = {}
    with psycopg.connect(url, autocommit=True) as db:
        for name, (method, _, filters) in LISTS.items():
            statement, params = (
                _ticket_statement(filters) if method == TICKETS else _session_statement(filters)
            )
            page = {
                "tenant_id": TENANT,
                "after_time": paging.END_OF_TIME,
                "after_id": MAX_UUID,
                "limit": PAGE_SIZE + 1,
            }
            plan = db.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", {**params, **page})
            plans[name] = "\n".join(line for [line] in plan.fetchall())
    return plans


def _session_statement(filters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    by_update_time = "order_by" in filters
    labels = filters.get("labels")
    params = {
        **dict.fromkeys(session_listing.Filter._fields),
        "user_id": filters.get("user_id"),
        "labels": json.dumps(labels) if labels else None,
    }
    if filters.keys() & {"user_id", "labels"}:
        return (
            session_listing.LIST_OF_IDENTITY_BY_UPDATE_TIME
            if by_update_time
            else session_listing.LIST_OF_IDENTITY_BY_CREATE_TIME
        ), params
    return (
        session_listing.LIST_BY_UPDATE_TIME
        if by_update_time
        else session_listing.LIST_BY_CREATE_TIME
    ), params


def _ticket_statement(filters: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    params = {
        **dict.fromkeys(ticket_listing.Filter._fields),
        "external_ref": filters.get("external_ref"),
        "updated_from": filters.get("start_update_time"),
    }
    return ticket_listing.LIST_TICKETS, params
