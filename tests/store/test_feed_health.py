"""Which transaction holds up the change feed, as far as a role may see it.

On a server of the test worker's own, where no other transactions run.
"""

import contextlib
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from support.cluster import Cluster
from support.database import execute
from support.plain_rows import Rows

from chat_ticket_svc.store import feed_health
from chat_ticket_svc.store.feed_health import last_epoch, oldest_holder


@contextlib.contextmanager
def writing(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written something, and is idle."""
    with psycopg.connect(url, application_name="a batch") as connection:
        connection.execute("SELECT pg_current_xact_id()")
        yield connection


@pytest.fixture
def elsewhere(system_cluster: Cluster) -> Iterator[str]:
    """Another database of the server, of somebody else."""
    name = f"other_{uuid.uuid4().hex}"
    system_cluster.execute(f"CREATE DATABASE {name}")
    yield system_cluster.url(name)
    system_cluster.drop(system_cluster.url(name))


@pytest.fixture
def reader(system_cluster: Cluster, system_database: str) -> Iterator[str]:
    """The URL of a role that may read the tables, and nothing else."""
    name = f"reader_{uuid.uuid4().hex}"
    system_cluster.execute(f"CREATE ROLE {name} LOGIN")
    execute(system_database, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    yield urlsplit(system_database)._replace(netloc=f"{name}@").geturl()
    execute(system_database, f"DROP OWNED BY {name}")
    system_cluster.execute(f"DROP ROLE {name}")


async def test_only_the_oldest_that_has_written_is_named(
    system_database: str, elsewhere: str
) -> None:
    """Of whatever database, and by what its operator knows it."""
    assert await oldest_holder(system_database) is None
    with psycopg.connect(system_database) as idle:
        idle.execute("SELECT FROM chat_sessions")
        assert await oldest_holder(system_database) is None
    with writing(elsewhere) as first, writing(system_database) as second:
        holder = await oldest_holder(system_database)
        assert holder is not None
        assert (holder.pid, holder.database) == (first.info.backend_pid, elsewhere_name(elsewhere))
        assert (holder.user, holder.application) == ("postgres", "a batch")
        assert holder.state == "idle in transaction"
        assert 0 < (holder.seconds or 0) < 10
        first.commit()
        holder = await oldest_holder(system_database)
        assert holder is not None
        assert holder.pid == second.info.backend_pid


def elsewhere_name(url: str) -> str:
    return urlsplit(url).path[1:]


async def test_role_that_sees_no_ages_waits(
    system_database: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names what is still there, and not what has ended meanwhile."""
    monkeypatch.setattr(feed_health, "HIDDEN_AGE_SECONDS", 0.01)
    with writing(system_database) as connection:
        holder = await oldest_holder(reader)
        assert holder is not None
        assert (holder.pid, holder.user) == (connection.info.backend_pid, "postgres")
        assert (holder.seconds, holder.state) == (None, None)

        async def end(_seconds: float) -> None:
            connection.commit()

        monkeypatch.setattr(feed_health.asyncio, "sleep", end)
        assert await oldest_holder(reader) is None


async def test_prepared_transaction_is_named(system_database: str, tenant: str) -> None:
    """Nobody runs it, and it stays over restarts."""
    gid = f"gid {uuid.uuid4()}"
    with psycopg.connect(system_database) as connection:
        Rows(connection, tenant).add("chat_sessions")
        connection.execute(f"PREPARE TRANSACTION '{gid}'")  # type: ignore[arg-type]
        connection.commit()
    try:
        holder = await oldest_holder(system_database)
    finally:
        execute(system_database, f"ROLLBACK PREPARED '{gid}'")
    assert holder is not None
    assert (holder.gid, holder.pid, holder.user) == (gid, None, "postgres")
    assert holder.seconds is not None


async def test_role_that_serves_reads_the_epoch(system_cluster: Cluster, reader: str) -> None:
    epoch = await last_epoch(reader)
    assert epoch.has_system_identifier
    assert epoch.has_timeline
