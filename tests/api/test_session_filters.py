"""Lists of the sessions of a user, and of those with labels, through the API."""

import json
import re
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.cluster import Cluster
from support.database import execute
from support.sessions import ACTIVE, RESOLVED, list_all_ids, set_status, update_session

from chat_ticket.v1.chat_session_pb2 import (
    CHAT_SESSION_ORDER_UPDATE_TIME,
    ListChatSessionsRequest,
)
from chat_ticket_svc.services.paging import MAX_RESPONSE_BYTES
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import session_listing

BY_UPDATE = CHAT_SESSION_ORDER_UPDATE_TIME
LARGE_TENANT = "large"


async def test_list_of_a_user_is_exact(api: Api, other: Api) -> None:
    """Neither a part of the id nor another case, nor another tenant's user of the same id."""
    mine = [await api.session(user_id="ann") for _ in range(3)]
    for user_id in ("Ann", "ann ann", "an", ""):
        await api.session(user_id=user_id)
    await other.session(user_id="ann")
    request = ListChatSessionsRequest(user_id="ann", page_size=2)
    assert await list_all_ids(api, request) == [session.id for session in reversed(mine)]
    await api.message(mine[0].id)
    request = ListChatSessionsRequest(user_id="ann", page_size=2, order_by=BY_UPDATE)
    assert await list_all_ids(api, request) == [mine[0].id, mine[2].id, mine[1].id]


async def test_all_labels_must_match_exactly(api: Api, other: Api) -> None:
    """Key and value, whatever other labels a session has."""
    both = await api.session(labels={"plan": "gold", "region": "eu", "empty": ""})
    gold = await api.session(labels={"plan": "gold"})
    await api.session(labels={"plan": "golden", "gold": "plan", "region": "EU"})
    await api.session()
    await other.session(labels={"plan": "gold", "region": "eu"})
    for labels, expected in (
        ({"plan": "gold"}, [gold.id, both.id]),
        ({"plan": "gold", "region": "eu"}, [both.id]),
        ({"plan": "gold", "region": "us"}, []),
        ({"empty": ""}, [both.id]),
        ({"plan": ""}, []),
        ({"plan": 'gold"}'}, []),
    ):
        for order in (0, BY_UPDATE):
            request = ListChatSessionsRequest(labels=labels, order_by=order, page_size=1)
            assert await list_all_ids(api, request) == expected


async def test_changed_labels_are_found(api: Api) -> None:
    """As soon as they are set, and no longer once they are removed."""
    session = await api.session()
    request = ListChatSessionsRequest(labels={"a": "1"})
    await update_session(api, session.id, "labels.a", labels={"a": "1"})
    assert await list_all_ids(api, request) == [session.id]
    await update_session(api, session.id, "labels.a")
    assert await list_all_ids(api, request) == []


async def test_filters_combine(api: Api) -> None:
    """With each other and with all others, in both orders."""
    identity: dict[str, Any] = {"user_id": "ann", "labels": {"plan": "gold"}}
    first, resolved, linked, last = [await api.session(**identity) for _ in range(4)]
    await api.session(user_id="bob", labels=identity["labels"])
    await api.session(user_id="ann", labels={"plan": "free"})
    await set_status(api, resolved.id, RESOLVED)
    await api.escalate(linked.id)
    for order in (0, BY_UPDATE):
        for filters, expected in (
            ({}, {first.id, resolved.id, linked.id, last.id}),
            ({"statuses": [ACTIVE]}, {first.id, linked.id, last.id}),
            ({"has_ticket": True}, {linked.id}),
            ({"has_ticket": False, "statuses": [RESOLVED]}, {resolved.id}),
            ({"end_create_time": linked.create_time}, {first.id, resolved.id}),
            ({"start_create_time": last.create_time}, {last.id}),
            ({"start_update_time": last.create_time}, {last.id, resolved.id, linked.id}),
            ({"end_update_time": last.create_time}, {first.id}),
        ):
            request = ListChatSessionsRequest(
                **identity,
                **filters,  # type: ignore[arg-type]
                order_by=order,
                page_size=1,
            )
            assert set(await list_all_ids(api, request)) == expected, filters


async def test_violations_are_reported_together(api: Api) -> None:
    """Of the user and of each label."""
    request = ListChatSessionsRequest(
        user_id="a\nb", labels={"Upper": "", "a": "v" * 256, "b": "\t"}
    )
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.sessions.ListChatSessions(request)
    assert list(refusal.fields) == ["labels[Upper]", "labels[a]", "labels[b]", "user_id"]


async def test_at_most_four_labels_can_be_asked_for(api: Api) -> None:
    """More are refused."""
    labels = {str(n): "" for n in range(5)}
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.sessions.ListChatSessions(ListChatSessionsRequest(labels=labels))
    assert refusal.fields == {"labels": "5 elements, at most 4"}
    del labels["0"]
    assert await list_all_ids(api, ListChatSessionsRequest(labels=labels)) == []


async def test_page_token_is_of_its_user_and_labels(api: Api) -> None:
    """The token of one list is no token of another."""
    for _ in range(2):
        await api.session(user_id="ann", labels={"a": "1", "b": "2"})
    request = ListChatSessionsRequest(user_id="ann", labels={"a": "1", "b": "2"}, page_size=1)
    token = (await api.sessions.ListChatSessions(request)).next_page_token
    for other_filters in (
        ListChatSessionsRequest(user_id="bob", labels={"a": "1", "b": "2"}, page_token=token),
        ListChatSessionsRequest(user_id="ann", labels={"a": "1"}, page_token=token),
        ListChatSessionsRequest(user_id="ann", labels={"b": "1", "a": "2"}, page_token=token),
        ListChatSessionsRequest(page_token=token),
    ):
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.sessions.ListChatSessions(other_filters)
        assert list(refusal.fields) == ["page_token"]
    same = ListChatSessionsRequest(user_id="ann", labels={"b": "2", "a": "1"}, page_token=token)
    assert len((await api.sessions.ListChatSessions(same)).sessions) == 1


async def test_page_of_sessions_with_long_labels_fits_into_a_response(api: Api) -> None:
    """It ends before the limit, and the next page goes on."""
    labels = {f"key-{n}": "題" * 255 for n in range(32)}
    ids = [(await api.session(id=an_id(), labels=labels)).id for _ in range(140)]
    request = ListChatSessionsRequest(page_size=1000)
    page = await api.sessions.ListChatSessions(request)
    assert MAX_RESPONSE_BYTES - 30_000 < page.ByteSize() <= MAX_RESPONSE_BYTES
    assert len(page.sessions) < 140
    assert await list_all_ids(api, request) == ids[::-1]


@pytest.mark.parametrize("value", ["題" * 255, '"' * 255], ids=["long", "longer as JSON"])
@pytest.mark.parametrize("order", [0, BY_UPDATE])
@pytest.mark.parametrize("filters", [{}, {"statuses": [ACTIVE]}, {"labels": {"of": "all"}}])
async def test_page_of_sessions_with_long_labels_reads_little_more_than_it_returns(
    api: Api, database: str, monkeypatch: pytest.MonkeyPatch, value: str, order: int, filters: Any
) -> None:
    """Not all sessions that a page may have: their labels are 35 MB."""
    execute(
        database,
        f"INSERT INTO chat_sessions (tenant_id, labels) SELECT '{api.tenant}', ("
        f" SELECT jsonb_object_agg('key-' || n, '{value}') || '{{\"of\": \"all\"}}'"
        "   FROM generate_series(1, 31) AS n) FROM generate_series(1, 500)",
    )
    read, sizes = session_listing.page, list[int]()

    async def page(*arguments: Any, **named: Any) -> Any:
        rows = await read(*arguments, **named)
        sizes.append(sum(len((row.labels or "").encode()) for row in rows))
        return rows

    monkeypatch.setattr(session_listing, "page", page)
    request = ListChatSessionsRequest(page_size=1000, order_by=order, **filters)
    ids = await list_all_ids(api, request)
    assert len(ids) == len(set(ids)) == 500
    assert max(sizes) < 2.1 * MAX_RESPONSE_BYTES
    first = await api.sessions.ListChatSessions(ListChatSessionsRequest(page_size=1000))
    assert first.ByteSize() > MAX_RESPONSE_BYTES - 30_000, "the response is full all the same"


@pytest.fixture(scope="module")
def large_tenant(cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    """A database whose tenant has 20,000 sessions, three of five of which have the same label."""
    url = cluster.create()
    execute(
        url,
        "SET session_replication_role = replica",
        "ALTER TABLE chat_sessions ENABLE ALWAYS TRIGGER chat_sessions_take_feed_position",
        "INSERT INTO chat_sessions (tenant_id, user_id, labels, created_at, updated_at)"
        f" SELECT '{LARGE_TENANT}', 'user-' || n % 4000,"
        "  jsonb_build_object('plan', CASE WHEN n % 5 < 3 THEN 'gold' ELSE 'free' END)"
        "  || CASE WHEN n % 4000 = 7 THEN '{\"rare\":\"one\"}'::jsonb ELSE '{}' END, time, time"
        "  FROM generate_series(0, 19999) AS n,"
        "  LATERAL (SELECT timestamptz '2026-01-01' + n * interval '1 minute' AS time) AS times",
        "VACUUM ANALYZE",
        "INSERT INTO chat_sessions (tenant_id, labels)"
        f" VALUES ('{LARGE_TENANT}', '{{\"not\":\"analyzed\"}}')",
    )
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection
    cluster.drop(url)


@pytest.mark.parametrize(
    "statement",
    [
        session_listing.LIST_OF_IDENTITY_BY_CREATE_TIME,
        session_listing.LIST_OF_IDENTITY_BY_UPDATE_TIME,
    ],
    ids=["by create time", "by update time"],
)
@pytest.mark.parametrize(
    ("filters", "index", "most_buffers"),
    [
        ({"user_id": "user-7"}, "idx_chat_sessions_user", 20),
        ({"labels": {"rare": "one"}}, "idx_chat_sessions_labels", 20),
        ({"labels": {"rare": "one", "plan": "gold"}}, "idx_chat_sessions_labels", 40),
        ({"labels": {"not": "analyzed"}}, "idx_chat_sessions_labels", 20),
        ({"labels": {"plan": "gold"}}, "idx_chat_sessions_(tenant|updated)", 40),
        (
            {"user_id": "user-7", "labels": {"plan": "gold"}, "statuses": ["active"]},
            "idx_chat_sessions_user",
            20,
        ),
    ],
    ids=["user", "rare", "rare and common", "new", "common", "user and common"],
)
def test_page_reads_little_of_a_large_tenant(
    large_tenant: psycopg.Connection[Any],
    statement: Any,
    filters: dict[str, Any],
    index: str,
    most_buffers: int,
) -> None:
    """A user and a rare label have an index. Of a common label, the newest sessions are read."""
    params = {
        **dict.fromkeys(session_listing.Filter._fields),
        **filters,
        "labels": json.dumps(filters["labels"]) if "labels" in filters else None,
        "tenant_id": LARGE_TENANT,
        "limit": 51,
        "after_time": "infinity",
        "after_id": MAX_UUID,
    }
    explained = large_tenant.execute(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", params)  # type: ignore[call-overload]
    plan = "\n".join(line for (line,) in explained)
    assert re.search(rf"using {index}|on {index}", plan), plan
    assert int(re.findall(r"Buffers: shared hit=(\d+)", plan)[0]) < most_buffers, plan
