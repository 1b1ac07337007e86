"""A page of the change feed is a range of an index, whatever PostgreSQL knows of the tables."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from support.cluster import Cluster

from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.change_feed import SECTIONS, Place

TENANTS = {"large": 10_000, "small": 10}
INDEXES = (
    "idx_chat_sessions_feed",
    "idx_chat_session_tombstones_feed",
    "idx_tickets_feed",
    "idx_ticket_tombstones_feed",
)


@pytest.fixture(scope="module")
def connection(cluster: Cluster) -> Iterator[psycopg.Connection[Any]]:
    url = cluster.create()
    with psycopg.connect(url, autocommit=True) as connection:
        for table, key in (
            ("chat_sessions", "id"),
            ("chat_session_tombstones", "session_id"),
            ("ticket_tombstones", "ticket_id"),
        ):
            connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)")
            for tenant, count in TENANTS.items():
                connection.execute(
                    f"INSERT INTO {table} (tenant_id, {key})"
                    f" SELECT '{tenant}', gen_random_uuid() FROM generate_series(1, {count})"
                )
        connection.execute("ALTER TABLE tickets SET (autovacuum_enabled = off)")
        for tenant, count in TENANTS.items():
            connection.execute(
                "INSERT INTO tickets (tenant_id, title)"
                f" SELECT '{tenant}', 'Refund' FROM generate_series(1, {count})"
            )
        yield connection
    cluster.drop(url)


def plan(connection: psycopg.Connection[Any], tenant: str) -> str:
    params = change_feed._params(tenant, Place(1), list(SECTIONS), 500)
    explained = connection.execute(f"EXPLAIN {change_feed.PAGE}", params)  # type: ignore[call-overload]
    return "\n".join(line for (line,) in explained)


@pytest.mark.parametrize("is_analyzed", [False, True], ids=["never analyzed", "analyzed"])
def test_a_page_reads_the_indexes_of_the_feed_and_sorts_nothing(
    connection: psycopg.Connection[Any], *, is_analyzed: bool
) -> None:
    if is_analyzed:
        connection.execute("VACUUM ANALYZE")
    for tenant in TENANTS:
        found = plan(connection, tenant)
        for index in INDEXES:
            assert f"Index Scan using {index} " in found, found
        assert found.count("Sort Key: ") == found.count("Sort Key: e.ordinal DESC"), found
