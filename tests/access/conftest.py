"""Servers with quotas, servers that require tokens, and the rows of tenants in the database."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
import pytest_asyncio
from support.authority import key_set
from support.client import Api
from support.jwt_server import KEY, SETTINGS, JwtServer
from support.tenant_rows import TenantRows


@pytest.fixture(scope="module")
def connection(database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="module")
def tables(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """The tables of tenants, and their columns in order."""
    found = connection.execute("""
        SELECT table_name, array_agg(column_name::text ORDER BY ordinal_position)
          FROM information_schema.columns JOIN information_schema.tables
               USING (table_schema, table_name)
         WHERE table_schema = 'public' AND table_type = 'BASE TABLE'
           AND table_name NOT IN ('schema_migrations', 'chat_epochs')
         GROUP BY table_name
    """)
    return dict(found.fetchall())


@pytest.fixture
def rows(connection: psycopg.Connection[Any], tables: dict[str, list[str]]) -> TenantRows:
    return TenantRows(connection, tables)


@pytest.fixture
def start_with_quotas(
    start_server: Any, database: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Awaitable[Api]]:
    """`await start_with_quotas(**quotas)`: a client of a new server that has these quotas.

    Calls beyond the quotas are rejected at once, unless `wait_seconds` is given.
    """

    async def start(*, wait_seconds: float = 0, **quotas: float) -> Api:
        monkeypatch.setattr("chat_ticket_svc.access.quotas.MAX_WAIT_SECONDS", wait_seconds)
        # Longer than any test holds a lock.
        return await start_server(database, quotas=quotas, lock_timeout_ms=9000)  # type: ignore[no-any-return]

    return start


@pytest_asyncio.fixture
async def start_jwt_server(start_server: Any, database: str) -> AsyncIterator[Callable[..., Any]]:
    """`await start_jwt_server(jwks=…)`: a server that requires tokens."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(**settings: object) -> JwtServer:
            api = await start_server(database, **{**SETTINGS, **settings})
            return JwtServer(api.address, stack)

        yield start


@pytest_asyncio.fixture
async def jwt_server(start_jwt_server: Any, tmp_path: Path) -> JwtServer:
    """A server whose key set is a file with KEY."""
    (tmp_path / "keys.json").write_bytes(key_set(KEY))
    return await start_jwt_server(jwks=str(tmp_path / "keys.json"))  # type: ignore[no-any-return]
