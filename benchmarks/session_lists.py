"""The latency of lists of the sessions of a large tenant, as it gets more sessions.

All sessions have a user, a title and labels, as those of a shop might. The sessions have no
messages.
"""

import asyncio
import contextlib
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc.aio
import psycopg

from benchmarks import service
from benchmarks.service import Bench, Server
from chat_ticket.v1 import chat_session_pb2 as sessions_pb2
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket_svc.services import paging
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import session_listing

SIZES = (10_000, 1_000_000)  # sessions of the tenant
PAGE_SIZE = 50
CALLS = 10  # of each kind per round
TIMEOUT_SECONDS = 30

TENANT = "shop"
USER_SESSIONS = 10
RARE_SESSIONS = 20
USER = "user-7"
RARE, COMMON = {"campaign": "rare"}, {"plan": "gold"}

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
# They are built after the load, which takes less time.
INDEXES = ("idx_chat_sessions_user", "idx_chat_sessions_labels")

# The name of a list, how many of its first page there are, and what it asks for.
LISTS: Mapping[str, tuple[int, dict[str, Any]]] = {
    "ListChatSessions by create time": (PAGE_SIZE, {}),
    "ListChatSessions by update time": (
        PAGE_SIZE,
        {"order_by": sessions_pb2.CHAT_SESSION_ORDER_UPDATE_TIME},
    ),
    "ListChatSessions of a user": (USER_SESSIONS, {"user_id": USER}),
    "ListChatSessions with a rare label": (RARE_SESSIONS, {"labels": RARE}),
    "ListChatSessions with a common label": (PAGE_SIZE, {"labels": COMMON}),
    "ListChatSessions with a common label, by update time": (
        PAGE_SIZE,
        {"labels": COMMON, "order_by": sessions_pb2.CHAT_SESSION_ORDER_UPDATE_TIME},
    ),
}


def load(url: str, size: int) -> None:
    """Fill a database with the sessions of one tenant."""
    with psycopg.connect(url, autocommit=True) as db:
        # Without checks and triggers.
        for setting in ("session_replication_role = replica", "maintenance_work_mem = '1GB'"):
            db.execute(f"SET {setting}")
        definitions = [
            db.execute("SELECT pg_get_indexdef(%s::regclass)", [name]).fetchone() or ("",)
            for name in INDEXES
        ]
        for name in INDEXES:
            db.execute(f"DROP INDEX {name}")
        db.execute(
            LOAD,
            {
                "tenant": TENANT,
                "size": size,
                "users": size // USER_SESSIONS,
                "rare": json.dumps(RARE),
                "rare_sessions": RARE_SESSIONS,
            },
        )
        for (definition,) in definitions:
            db.execute(definition)
        db.execute("VACUUM (ANALYZE)")
        db.execute("CHECKPOINT")


def measure(bench: Bench) -> tuple[dict[str, dict[int, list[float]]], dict[str, str]]:
    """The medians of the rounds in milliseconds, by list and size, and PostgreSQL's plans."""
    with contextlib.ExitStack() as stack:
        servers: dict[int, Server] = {}
        for size in SIZES:
            bench.progress(f"loading {size:,} sessions")
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
            stub = ChatSessionServiceStub(channel)
            for name in LISTS:
                lists[name, size] = functools.partial(_list, stub, name)
        for number in range(bench.rounds + 1):
            bench.progress(f"sessions, round {number}")
            for name in LISTS:
                for size in servers:
                    times = [await lists[name, size]() for _ in range(CALLS)]
                    if number:  # the first is a warm-up
                        results[name][size].append(statistics.median(times))
    return results


async def _list(stub: Any, name: str) -> float:
    expected, filters = LISTS[name]
    request = sessions_pb2.ListChatSessionsRequest(page_size=PAGE_SIZE, **filters)
    started_at = time.perf_counter()
    response = await stub.ListChatSessions(
        request, metadata=(("x-tenant-id", TENANT),), timeout=TIMEOUT_SECONDS
    )
    milliseconds = 1000 * (time.perf_counter() - started_at)
    if len(response.sessions) != expected:
        raise RuntimeError(f"{name}: {len(response.sessions)} sessions were listed")
    return milliseconds


def _explain(url: str) -> dict[str, str]:
    """PostgreSQL's plans for the statements of the lists."""
    plans = {}
    with psycopg.connect(url, autocommit=True) as db:
        for name, (_, filters) in LISTS.items():
            by_update_time = "order_by" in filters
            if filters.keys() & {"user_id", "labels"}:
                statement = (
                    session_listing.LIST_OF_IDENTITY_BY_UPDATE_TIME
                    if by_update_time
                    else session_listing.LIST_OF_IDENTITY_BY_CREATE_TIME
                )
            else:
                statement = (
                    session_listing.LIST_BY_UPDATE_TIME
                    if by_update_time
                    else session_listing.LIST_BY_CREATE_TIME
                )
            labels = filters.get("labels")
            params = {
                **dict.fromkeys(session_listing.Filter._fields),
                "tenant_id": TENANT,
                "user_id": filters.get("user_id"),
                "labels": json.dumps(labels) if labels else None,
                "after_time": paging.END_OF_TIME,
                "after_id": MAX_UUID,
                "limit": PAGE_SIZE + 1,
            }
            plan = db.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", params).fetchall()
            plans[name] = "\n".join(line for [line] in plan)
    return plans
