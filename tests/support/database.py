"""Faults and locks that a test puts into its database."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from urllib.parse import urlsplit

import psycopg

from chat_ticket_svc.store.database import Database


def execute(database_url: str, *statements: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]


def raise_on_insert(database_url: str, raised: str, *, table: str = "chat_sessions") -> None:
    """Make every new session, or row of another table, run `raised` in the database."""
    execute(
        database_url,
        "CREATE OR REPLACE FUNCTION sabotage() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {raised}; RETURN NEW; END $$",
        f"CREATE OR REPLACE TRIGGER sabotage BEFORE INSERT ON {table}"
        " FOR EACH ROW EXECUTE FUNCTION sabotage()",
    )


def terminate_at_commit(
    database_url: str, table: str, event: str, *, only_first: bool = False
) -> None:
    """End the connection of each transaction, or of the first one, that does this to the table."""
    terminate = "PERFORM pg_terminate_backend(pg_backend_pid())"
    if only_first:
        terminate = f"IF nextval('attempts') = 1 THEN {terminate}; END IF"
    execute(
        database_url,
        "CREATE SEQUENCE IF NOT EXISTS attempts",
        "CREATE OR REPLACE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {terminate}; RETURN NULL; END $$",
        f"CREATE CONSTRAINT TRIGGER hang_up AFTER {event} ON {table}"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hang_up()",
    )


@contextmanager
def session_locked(
    database_url: str, *session_ids: str
) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    """Hold the row locks of sessions, as a slow writer would. It can write before it commits."""
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "SELECT FROM chat_sessions WHERE id = ANY (%s::uuid[]) FOR UPDATE", [list(session_ids)]
        )
        yield connection


def set_read_only(database_url: str, setting: str) -> None:
    """Make new connections read-only, like those of a standby."""
    execute(
        database_url,
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {urlsplit(database_url).path[1:]}"
        f" SET default_transaction_read_only = {setting}",
    )


async def wait_for_lock_waiters(database: str, count: int) -> None:
    """Until so many statements wait for a lock."""
    async with asyncio.timeout(10):
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as watch:
            while True:
                cursor = await watch.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
                if await cursor.fetchone() == (count,):
                    return
                await asyncio.sleep(0.02)


def wait_until_blocked(by: psycopg.Connection[Any], waiter: psycopg.Connection[Any]) -> None:
    """Return when the waiter's statement waits for a lock that somebody holds."""
    deadline = time.monotonic() + 15
    statement = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
    while by.execute(statement, [waiter.info.backend_pid]).fetchone() != (True,):
        assert time.monotonic() < deadline, "it did not wait for a lock"
        time.sleep(0.002)


@asynccontextmanager
async def store_database(database: str, *, lock_timeout_ms: int = 1_000) -> AsyncIterator[Database]:
    """The store of a command."""
    db = Database(
        database,
        pool_size=1,
        prepare_statements=True,
        statement_timeout_ms=10_000,
        lock_timeout_ms=lock_timeout_ms,
    )
    await db.open()
    try:
        yield db
    finally:
        await db.close()
