"""Fixtures for the tests of the schema, on the newest and on the oldest supported PostgreSQL."""

import contextlib
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.cluster import TEMPLATE, Cluster
from support.plain_rows import Connect, Rows

from chat_ticket_svc import embedded
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.store.schema import MIGRATIONS

OLDEST_SUPPORTED = 15
EMBEDDED = 18


@pytest.fixture(scope="session")
def binaries() -> Path:
    """The directory of the programs of the embedded PostgreSQL."""
    return embedded._binaries()


@pytest.fixture(scope="session")
def system_binaries() -> Path:
    """The directory of the programs of the oldest supported PostgreSQL that the system has."""
    found = {
        int(path.parts[-3]): path.parent
        for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")
        if OLDEST_SUPPORTED <= int(path.parts[-3]) < EMBEDDED
    }
    if not found:
        pytest.skip(f"PostgreSQL {OLDEST_SUPPORTED} is not on this machine: skipped")
    return found[min(found)]


@pytest.fixture(scope="session")
def system_cluster(system_binaries: Path) -> Iterator[Cluster]:
    """A private server of that PostgreSQL, which can replicate logically and prepare transactions.

    Its template was migrated up, down to nothing, and up again.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="chat-ticket-schema-", ignore_cleanup_errors=True)
        )
        Path(directory).chmod(0o711)  # for `nobody`, where there are no user namespaces
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "_binaries", lambda: system_binaries)
            patch.setitem(embedded._SETTINGS, "wal_level", "logical")
            patch.setitem(embedded._SETTINGS, "max_prepared_transactions", "1")
            postgres = EmbeddedPostgres(Path(directory, "data"), durable=False)
            cluster = Cluster(stack.enter_context(postgres).url("postgres"))
        downs = ["rollback"] * len(list(MIGRATIONS.glob("*.sql")))
        for command in ("up", *downs, "up"):
            assert migrate.dbmate(cluster.url(TEMPLATE), command, quiet=True) == 0
        yield cluster


@pytest.fixture(scope="session")
def system_database(system_cluster: Cluster) -> str:
    return system_cluster.create()


@pytest.fixture(params=["", "system_"], ids=["run", "system"])
def of(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """What conftest calls `cluster` or `database`, of the one PostgreSQL and of the other."""
    return lambda name: request.getfixturevalue(request.param + name)


@pytest.fixture
def url(of: Callable[[str], str]) -> str:
    """A database that the module's tests share."""
    return of("database")


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """Open connections, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        options = "-c statement_timeout=20s"
        yield lambda: stack.enter_context(psycopg.connect(url, autocommit=True, options=options))


@pytest.fixture
def us(connect: Connect, tenant: str) -> Rows:
    return Rows(connect(), tenant)


@pytest.fixture
def them(us: Rows) -> Rows:
    """Another tenant."""
    return Rows(us.connection, f"other {uuid.uuid4()}")


@pytest.fixture
def alone(of: Callable[[str], Cluster]) -> Iterator[Rows]:
    """The only tenant of a database of the test's own."""
    cluster = of("cluster")
    url = cluster.create()
    with psycopg.connect(url, autocommit=True) as connection:
        yield Rows(connection, "alone")
    cluster.drop(url)


@pytest.fixture
def empty_database(cluster: Cluster) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = f"test_{uuid.uuid4().hex}"
    cluster.execute(f"CREATE DATABASE {name}")
    yield cluster.url(name)
    cluster.drop(cluster.url(name))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where dbmate looks for migrations in this test; empty."""
    path = tmp_path / "migrations"
    path.mkdir()
    monkeypatch.setattr(migrate, "MIGRATIONS", path)
    return path
