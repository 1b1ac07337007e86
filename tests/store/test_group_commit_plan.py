"""The statement of a group commit finds ids by the primary key, whatever PostgreSQL knows of it."""

import psycopg
import pytest
from support.cluster import Cluster

from chat_ticket_svc.store import group_commit, pipelined_connection


@pytest.mark.parametrize(
    ("count", "is_analyzed"),
    [(0, False), (3000, False), (3000, True)],
    ids=["empty", "never analyzed", "analyzed"],
)
def test_ids_of_messages_are_looked_up_in_the_primary_key(
    cluster: Cluster, count: int, *, is_analyzed: bool
) -> None:
    statement = pipelined_connection._parse(group_commit.APPEND_BATCH)
    url = cluster.create()
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE chat_messages SET (autovacuum_enabled = off)")
        connection.execute("SET session_replication_role = replica")
        connection.execute(
            "INSERT INTO chat_messages (tenant_id, session_id, sequence, revision, role, content)"
            " SELECT 'tenant', gen_random_uuid(), 1, 1, 'user', 'x'"
            "   FROM generate_series(1, %s::int)",
            [count],
        )
        if is_analyzed:
            connection.execute("ANALYZE chat_messages")
        connection.execute("SET plan_cache_mode = force_generic_plan")
        connection.execute(b"PREPARE append AS " + statement.sql)
        nulls = ", ".join(["NULL"] * len(statement.parameter_names))
        explained = connection.execute(f"EXPLAIN EXECUTE append ({nulls})".encode())
        plan = "\n".join(line for (line,) in explained)
    cluster.drop(url)
    assert "using chat_messages_pkey on chat_messages" in plan, plan
    assert "Index Cond: ((tenant_id = new.tenant_id) AND (id >= new.id) AND (id <= new.id))" in plan
