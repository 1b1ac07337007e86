"""Builds the search index, of the words of messages, in a database that has messages.

A migration makes the index where there are no messages. Elsewhere it is built here, concurrently:
calls go on. Then the index of before keeps its place in the planner under another name, because
servers of the version before ask for its expression.

Only one run at a time changes the index. The others ask for an advisory lock again and again. They
must not wait in the statement that takes it: a concurrent build waits for the snapshots of all
statements that are older, so the two would wait for each other.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import psycopg

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store.connection import (
    SET_AFTER_START,
    connection_string,
)
from chat_ticket_svc.store.connection_errors import unreachable
from chat_ticket_svc.store.driver_errors import describe
from chat_ticket_svc.store.migration_progress import SESSION_SETTINGS

Connection = psycopg.Connection[Any]

INDEX = "idx_chat_messages_content"
NEW_INDEX = f"{INDEX}_new"  # until it is complete
OLD_INDEX = f"{INDEX}_old"  # of the version before

# How often a run asks whether it is its turn.
TURN_POLL_SECONDS = 0.5

IS_MIGRATED = """
SELECT EXISTS (SELECT FROM pg_attribute
                WHERE attrelid = to_regclass('chat_messages') AND attname = 'search_language')
"""

INDEXES = """
SELECT relname::text, indisvalid, strpos(pg_get_indexdef(indexrelid), 'search_vector(') > 0
  FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
 WHERE indrelid = to_regclass('chat_messages')
   AND relname IN ('idx_chat_messages_content', 'idx_chat_messages_content_new',
                   'idx_chat_messages_content_old')
"""

# The lock is that of a table, as several schemas of a database may have a service each.
TAKE_TURN = """
WITH turn AS (
    SELECT hashtextextended('chat-ticket-svc search index',
                            coalesce(to_regclass('chat_messages')::oid::bigint, 0)) AS key
)
SELECT pg_try_advisory_lock(key),
       (SELECT concat_ws(', ', pid, nullif(application_name, ''), usename)
          FROM pg_locks LEFT JOIN pg_stat_activity USING (pid)
         WHERE locktype = 'advisory' AND granted AND objsubid = 1
           AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
           AND (classid::bigint << 32) | objid::bigint = key)
  FROM turn
"""

# The same expression as in the migration.
BUILD = """
CREATE INDEX CONCURRENTLY idx_chat_messages_content_new ON chat_messages
    USING gin (tenant_id, search_vector(content, search_language))
    WITH (gin_pending_list_limit = 512)
"""
DROP = {
    INDEX: "DROP INDEX CONCURRENTLY idx_chat_messages_content",
    NEW_INDEX: "DROP INDEX CONCURRENTLY idx_chat_messages_content_new",
    OLD_INDEX: "DROP INDEX CONCURRENTLY idx_chat_messages_content_old",
}
KEEP_OLD = "ALTER INDEX idx_chat_messages_content RENAME TO idx_chat_messages_content_old"
USE_NEW = "ALTER INDEX idx_chat_messages_content_new RENAME TO idx_chat_messages_content"


class SearchIndex(NamedTuple):
    """Whether a search finds the index that it needs, and whether the one of before is there."""

    is_built: bool
    has_old: bool


async def search_index(connection: psycopg.AsyncConnection[Any]) -> SearchIndex:
    cursor = await connection.execute(INDEXES)
    return _search_index(await cursor.fetchall())


def _search_index(rows: list[tuple[str, bool, bool]]) -> SearchIndex:
    names = [name for name, _, _ in rows]
    return SearchIndex(is_built=(INDEX, True, True) in rows, has_old=OLD_INDEX in names)


def is_build_pending(connection: Connection) -> bool:
    """Whether the migrations are applied and the index is not built."""
    [(is_migrated,)] = connection.execute(IS_MIGRATED).fetchall()
    return is_migrated and not _search_index(connection.execute(INDEXES).fetchall()).is_built


def build(connection: Connection) -> None:
    """Build the index, and keep the one of before under another name. For a connection with a turn.

    A killed run leaves an index that is invalid, which is dropped, or complete, which is used.
    """
    is_usable = {
        name: is_valid and is_new
        for name, is_valid, is_new in connection.execute(INDEXES).fetchall()
        if is_new or name == NEW_INDEX
    }
    for name in (INDEX, NEW_INDEX):
        if is_usable.get(name) is False:
            connection.execute(DROP[name])
    if not is_usable.get(NEW_INDEX):
        connection.execute(BUILD)
    # What the planner knows of words it knows of an index. Before the names change, as a run that
    # is killed in between would never do it.
    connection.execute("ANALYZE chat_messages")
    names = {name for name, _, _ in connection.execute(INDEXES).fetchall()}
    with connection.transaction():
        if INDEX in names:
            connection.execute(KEEP_OLD)
        connection.execute(USE_NEW)


def drop_old(connection: Connection) -> bool:
    """Drop the index of the version before; returns whether there was one. As for `build`."""
    state = _search_index(connection.execute(INDEXES).fetchall())
    if not (state.is_built and state.has_old):
        return False
    connection.execute(DROP[OLD_INDEX])
    return True


@contextlib.contextmanager
def turn(url: str, application_name: str, on_wait: Callable[[str], None]) -> Iterator[Connection]:
    """A connection that alone changes the index, until it is closed.

    `on_wait` is called with the process of another run that goes first. Otherwise as `connect`.
    """
    with connect(url, application_name) as connection:
        said = ""
        while True:
            [(has_turn, holder)] = connection.execute(TAKE_TURN).fetchall()
            if has_turn:
                break
            if holder and holder != said:
                on_wait(holder)
                said = holder
            time.sleep(TURN_POLL_SECONDS)
        yield connection


@contextlib.contextmanager
def connect(url: str, application_name: str) -> Iterator[Connection]:
    """A connection whose statements take as long as they take. It blocks.

    Raises UnavailableError if it cannot be opened or is lost, and ConfigurationError with
    PostgreSQL's reason if a statement fails.
    """
    try:
        conninfo = connection_string(url, **SESSION_SETTINGS)
        with psycopg.connect(
            conninfo, autocommit=True, application_name=application_name
        ) as connection:
            connection.execute(SET_AFTER_START)
            yield connection
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate.startswith(("08", "57P")):
            raise unreachable(error) from error
        reason = describe(error.sqlstate, error.diag.message_primary or "")
        raise ConfigurationError(f"the search index is not complete: {reason}") from error
