"""Compares the migrations of a database with those that this version of the service needs."""

import asyncio
import contextlib
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store.connection import (
    MIGRATION_APPLICATION_NAME,
    connect,
    connection_string,
    differing_settings,
    is_read_only,
    require_utf8,
)
from chat_ticket_svc.store.connection_errors import unreachable
from chat_ticket_svc.store.search_index import SearchIndex, search_index

# In an installed package they are in the package. In a checkout they are at its root.
DIRECTORIES = [Path(__file__).parents[level] / "migrations" for level in (1, 3)]
MIGRATIONS = next(directory for directory in DIRECTORIES if directory.is_dir())

APPLIED = "SELECT version FROM schema_migrations"
PROBE_TIMEOUT_MS = 2000


FACTS = """
SELECT current_setting('server_version'), current_setting('server_version_num')::integer,
       pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
"""


# Tables in a schema that the role may not use look absent to it.
HIDDEN = """
SELECT EXISTS (
    SELECT FROM pg_class AS relation JOIN pg_namespace AS schema ON schema.oid = relnamespace
     WHERE relname = 'schema_migrations' AND NOT has_schema_privilege(schema.oid, 'USAGE')
       AND nspname = ANY (string_to_array(replace(current_setting('search_path'), ' ', ''), ',')))
"""

# The indexes of the service that order text by the database's collation, whose version was
# recorded when the database was created. PostgreSQL has the functions since version 15.
COLLATION = """
SELECT datcollversion, pg_database_collation_actual_version(oid),
       (SELECT count(*) FROM pg_index JOIN pg_class t ON t.oid = indrelid
         WHERE '"default"'::regcollation = ANY (indcollation)
           AND relnamespace = (
               SELECT relnamespace FROM pg_class WHERE oid = to_regclass('chat_sessions')))
  FROM pg_database WHERE datname = current_database()
"""
COLLATION_VERSIONS_SINCE = 150_000

# Asked of the search's own dictionary: its functions and lower() may follow different locales.
CTYPE = """
SELECT datctype, to_tsvector('pg_catalog.simple', 'МИР') @@ to_tsquery('pg_catalog.simple', 'мир')
  FROM pg_database WHERE datname = current_database()
"""


class StaleSchemaError(ConfigurationError):
    """The database lacks migrations that this version of the service needs. The text names them."""

    def __init__(self, missing: list[str]):
        super().__init__(
            f"the database lacks {', '.join(missing)}: run chat-ticket-svc migrate, or make migrate"
        )


class Collation(NamedTuple):
    """The default collation of a database.

    `recorded_version` is that of the order in which its indexes were built, and `actual_version`
    that of the machine's library. A collation such as C has none. `indexes` counts the indexes of
    the service that depend on it.
    """

    recorded_version: str | None
    actual_version: str | None
    indexes: int


class Ctype(NamedTuple):
    """The database's LC_CTYPE, and whether a search finds capital letters beyond ASCII by it."""

    name: str
    folds_case: bool


class Facts(NamedTuple):
    """The state of a database and its server.

    `clock_ahead` is by how many seconds the local clock is ahead of the server's. `missing` names
    the migrations that the database lacks. `newer` counts those that this version does not know.
    `seconds` is the round trip of a statement. `differing_settings` names the settings that a
    pooler keeps from what the service needs, each with a text. `collation` is None before
    PostgreSQL 15. `search_index` has no meaning while migrations are missing.
    """

    version: str
    version_number: int
    is_read_only: bool
    clock_ahead: float
    missing: list[str]
    newer: int
    seconds: float
    differing_settings: dict[str, str]
    collation: Collation | None
    ctype: Ctype
    search_index: SearchIndex


async def facts(url: str, **session_settings: int) -> Facts:
    """The facts about a database, read with these settings of the session.

    Raises UnavailableError with the cause, and EncodingError.
    """
    settings = {"statement_timeout": PROBE_TIMEOUT_MS, **session_settings}
    try:
        async with await connect(connection_string(url, **settings)) as connection:
            started = time.time()
            cursor = await connection.execute(FACTS)
            [(version, number, is_read_only, clock_microseconds)] = await cursor.fetchall()
            finished = time.time()
            applied = await _applied(connection)
            differing = await differing_settings(connection, **settings)
            index = await search_index(connection)
            cursor = await connection.execute(CTYPE)
            ctype = Ctype(*(await cursor.fetchall())[0])
            collation = None
            if number >= COLLATION_VERSIONS_SINCE:
                cursor = await connection.execute(COLLATION)
                collation = Collation(*(await cursor.fetchall())[0])
    except psycopg.Error as error:
        raise unreachable(error) from error
    missing = _missing(applied)
    return Facts(
        version=version.partition(" ")[0],
        version_number=number,
        is_read_only=is_read_only,
        clock_ahead=(started + finished) / 2 - clock_microseconds / 1_000_000,
        missing=missing,
        newer=len(applied) - (len(_files()) - len(missing)),
        seconds=finished - started,
        differing_settings=differing,
        collation=collation,
        ctype=ctype,
        search_index=index,
    )


def require_utf8_database(url: str) -> None:
    """Raise EncodingError if the database is not in UTF-8, and UnavailableError with the cause.

    Blocks, so it is only for commands. A URL with parameters that only dbmate's driver knows is
    left to dbmate.
    """
    try:
        conninfo = connection_string(url)
    except psycopg.ProgrammingError:
        return
    try:
        with psycopg.connect(conninfo, application_name=MIGRATION_APPLICATION_NAME) as connection:
            require_utf8(connection)
    except psycopg.Error as error:
        raise unreachable(error) from error


def require_readable_migrations(url: str) -> None:
    """Raise what `facts` raises, also if the role may not read the table of the migrations.

    dbmate takes a table that it may not see for absent. Otherwise as `require_utf8_database`.
    """
    try:
        connection_string(url)
    except psycopg.ProgrammingError:
        return
    asyncio.run(facts(url))


async def _applied(connection: psycopg.AsyncConnection[Any]) -> set[str]:
    """The versions of the applied migrations.

    Raises InsufficientPrivilege also if the role may not see their table.
    """
    try:
        cursor = await connection.execute(APPLIED)
        return {version for (version,) in await cursor.fetchall()}
    except psycopg.errors.UndefinedTable:
        cursor = await connection.execute(HIDDEN)
        if await cursor.fetchone() == (True,):
            raise psycopg.errors.InsufficientPrivilege from None
        return set()


def _files() -> list[str]:
    return sorted(path.name for path in MIGRATIONS.glob("*.sql"))


def _missing(applied: Container[str]) -> list[str]:
    return [name for name in _files() if name.split("_")[0] not in applied]


class Probe:
    """Reads the applied migrations, for health checks, on a connection of its own.

    It does not use the pool, as a busy pool must not look like a database that is down.
    """

    def __init__(self, url: str):
        self._conninfo = connection_string(url, statement_timeout=PROBE_TIMEOUT_MS)
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def missing(self) -> list[str]:
        """The file names of the migrations that the database lacks, oldest first.

        Newer migrations are accepted, as a database is migrated before the service is upgraded.
        Raises UnavailableError if the database cannot be reached, and EncodingError.
        """
        try:
            if self._connection is not None and is_read_only(self._connection):
                await self.close()  # after a failover, the primary is elsewhere
            if self._connection is None:
                self._connection = await connect(self._conninfo)
            return _missing(await _applied(self._connection))
        except psycopg.Error as error:
            await self.close()
            raise unreachable(error) from error

    async def search_index(self) -> SearchIndex:
        """The state of the search index. Raises UnavailableError, after `missing`."""
        try:
            assert self._connection is not None  # noqa: S101 - for the type checker
            return await search_index(self._connection)
        except psycopg.Error as error:
            await self.close()
            raise unreachable(error) from error

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()
