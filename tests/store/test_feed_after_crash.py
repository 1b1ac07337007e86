"""The change feed does not go beyond what a crash of the database keeps."""

import time
from collections.abc import AsyncIterator

import psycopg
import pytest_asyncio
from psycopg import sql
from support.database import store_database

from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.database import Database


@pytest_asyncio.fixture
async def db(fresh_database: str) -> AsyncIterator[Database]:
    """As in production, commits wait for the WAL."""
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        name = sql.Identifier(connection.info.dbname)
        connection.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = on").format(name))
    async with store_database(fresh_database) as db:
        yield db


async def test_id_of_a_rollback_is_not_given_again(db: Database, fresh_database: str) -> None:
    """Its record is flushed before a follower goes beyond it. A rollback does not wait for that."""
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        for _ in range(5):
            with connection.transaction(force_rollback=True):
                connection.execute("SELECT pg_current_xact_id()")
            written = connection.execute("SELECT pg_current_wal_insert_lsn()").fetchone()
            await change_feed.page(db, "tenant", None, 1)
            is_kept = "SELECT pg_current_wal_flush_lsn() >= %s"
            assert connection.execute(is_kept, written).fetchone() == (True,)


def test_position_is_the_end_of_a_record(fresh_database: str) -> None:
    """Also where a page of the WAL is full. Otherwise it would never be reached by a flush."""
    where = """
    SELECT pg_switch_wal() IS NOT NULL, (pg_current_wal_insert_lsn() - '0/0') % 8192,
           chat_wal_position() % 8192
    """
    found = None
    with psycopg.connect(fresh_database, autocommit=True) as connection:
        for _ in range(100):  # other tests write to the WAL too
            found = connection.execute(where).fetchone()
            if found == (True, 40, 0):
                break
            time.sleep(0.02)
    assert found == (True, 40, 0)
