"""Builds the search index, of the words of messages, in a database that has messages.

A migration makes the index where there are no messages. Elsewhere it is built here, concurrently:
calls go on. Then the index of before keeps its place in the planner under another name, because
servers of the version before ask for its expression.

The comment of the index says which major version of PostgreSQL has built it. Another one may have
other stemmers and other tables of Unicode, and pg_upgrade keeps the index as it is: what it holds
and what a search asks for then differ.

Only one run at a time changes the index. The others ask for an advisory lock again and again. They
must not wait in the statement that takes it: a concurrent build waits for the snapshots of all
statements that are older, so the two would wait for each other.
"""

import contextlib
import time
from collections.abc import Callable, Collection, Iterator
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
STALE_INDEX = f"{INDEX}_stale"  # which a new one has replaced

# How often a run asks whether it is its turn.
TURN_POLL_SECONDS = 0.5

IS_MIGRATED = """
SELECT EXISTS (SELECT FROM pg_attribute
                WHERE attrelid = to_regclass('chat_messages') AND attname = 'search_language')
"""

INDEXES = """
SELECT relname::text, indisvalid, strpos(pg_get_indexdef(indexrelid), 'search_vector(') > 0,
       substring(obj_description(indexrelid, 'pg_class'), '^built by PostgreSQL (\\d+)$')::integer,
       current_setting('server_version_num')::integer / 10000
  FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
 WHERE indrelid = to_regclass('chat_messages')
   AND relname IN ('idx_chat_messages_content', 'idx_chat_messages_content_new',
                   'idx_chat_messages_content_old', 'idx_chat_messages_content_stale')
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
    STALE_INDEX: "DROP INDEX CONCURRENTLY idx_chat_messages_content_stale",
}
KEEP_OLD = "ALTER INDEX idx_chat_messages_content RENAME TO idx_chat_messages_content_old"
USE_NEW = "ALTER INDEX idx_chat_messages_content_new RENAME TO idx_chat_messages_content"
SET_ASIDE = "ALTER INDEX idx_chat_messages_content RENAME TO idx_chat_messages_content_stale"
NOTE_VERSION = """
DO $$ BEGIN
    EXECUTE format('COMMENT ON INDEX idx_chat_messages_content IS %L', 'built by PostgreSQL '
                   || current_setting('server_version_num')::integer / 10000);
END $$
"""


class _Index(NamedTuple):
    """One of the indexes that are there. `is_new` says that its expression is that of a search.

    `built_by` is the major version of PostgreSQL that its comment names, and `server` that of the
    server.
    """

    name: str
    is_valid: bool
    is_new: bool
    built_by: int | None
    server: int


class SearchIndex(NamedTuple):
    """The state of the index that a search needs.

    `built_by` is the major version of PostgreSQL that has built it, as far as that is known.
    `is_stale` says that it is not that of the server. `unused` has the names of the indexes that
    only cost writes when every server is of this version. Both have no meaning unless it is built.
    """

    is_built: bool
    is_stale: bool
    built_by: int | None
    unused: list[str]


async def search_index(connection: psycopg.AsyncConnection[Any]) -> SearchIndex:
    cursor = await connection.execute(INDEXES)
    return _state([_Index(*row) for row in await cursor.fetchall()])


def state(connection: Connection) -> SearchIndex:
    return _state(_indexes(connection).values())


def _indexes(connection: Connection) -> dict[str, _Index]:
    rows = connection.execute(INDEXES).fetchall()
    return {row[0]: _Index(*row) for row in rows}


def _state(indexes: Collection[_Index]) -> SearchIndex:
    own = next((index for index in indexes if index.name == INDEX), None)
    return SearchIndex(
        is_built=own is not None and own.is_valid and own.is_new,
        is_stale=own is not None and own.built_by != own.server,
        built_by=own.built_by if own else None,
        unused=sorted(index.name for index in indexes if index.name != INDEX),
    )


def is_migrated(connection: Connection) -> bool:
    """Whether the migrations that the index needs are applied."""
    [(is_there,)] = connection.execute(IS_MIGRATED).fetchall()
    return bool(is_there)


def build(connection: Connection) -> None:
    """Build the index anew, in the place of what is there. For a connection with a turn.

    The index of the version before is kept under another name. A killed run leaves an index that is
    invalid, which is dropped, or complete, which is used.
    """
    indexes = _indexes(connection)
    own, new, old = (indexes.get(name) for name in (INDEX, NEW_INDEX, OLD_INDEX))
    if STALE_INDEX in indexes:
        connection.execute(DROP[STALE_INDEX])
    if own and own.is_new and not own.is_valid:
        connection.execute(DROP[INDEX])
        own = None
    if own and not own.is_new and old:  # one of them is enough for the servers that search by it
        if old.is_valid:
            connection.execute(DROP[INDEX])
            own = None
        else:
            connection.execute(DROP[OLD_INDEX])
    is_renewal = own is not None and own.is_new
    # Beside an index of another major version, nobody knows by which one it was built.
    is_complete = new is not None and new.is_valid and new.is_new and not is_renewal
    if new and not is_complete:
        connection.execute(DROP[NEW_INDEX])
    if not is_complete:
        connection.execute(BUILD)
    # What the planner knows of words it knows of an index. Before the names change, as a run that
    # is killed in between would never do it.
    connection.execute("ANALYZE chat_messages")
    with connection.transaction():
        if own:
            connection.execute(SET_ASIDE if is_renewal else KEEP_OLD)
        connection.execute(USE_NEW)
        connection.execute(NOTE_VERSION)
    if is_renewal:
        connection.execute(DROP[STALE_INDEX])


def drop_unused(connection: Connection) -> list[str]:
    """Drop the index of the version before, and what killed runs left. Returns the names.

    As for `build`.
    """
    found = state(connection)
    if not found.is_built:
        return []
    for name in found.unused:
        connection.execute(DROP[name])
    return found.unused


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
