"""Compares the migrations of a database with those that this version of the service needs."""

import contextlib
import re
import time
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store.connection import connection_string, is_read_only

# In an installed package they are in the package. In a checkout they are at its root.
DIRECTORIES = [Path(__file__).parents[level] / "migrations" for level in (1, 3)]
MIGRATIONS = next(directory for directory in DIRECTORIES if directory.is_dir())

APPLIED = "SELECT version FROM schema_migrations"
PROBE_TIMEOUT_MS = 2000


# The parts of libpq's errors that are shown. The rest may quote the URL.
REASONS = re.compile(
    "password authentication failed|no password supplied|no pg_hba.conf entry"
    '|(?P<absent>database|role) "[^"]*" does not exist'
    "|could not translate host name|Connection refused|No such file or directory"
    "|timeout expired|starting up|shutting down|too many clients|certificate verify failed"
)

FACTS = """
SELECT current_setting('server_version'), current_setting('server_version_num')::integer,
       pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
       extract(epoch FROM clock_timestamp())::float8,
       to_regclass('schema_migrations') IS NOT NULL
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


class Facts(NamedTuple):
    """The state of a database and its server.

    `clock_ahead` is by how many seconds the local clock is ahead of the server's. `missing` names
    the migrations that the database lacks. `newer` counts those that this version does not know.
    `seconds` is the round trip of a statement. `collation` is None before PostgreSQL 15.
    """

    version: str
    version_number: int
    is_read_only: bool
    clock_ahead: float
    missing: list[str]
    newer: int
    seconds: float
    collation: Collation | None


async def facts(url: str) -> Facts:
    """The facts about a database. Raises UnavailableError, with the cause if it holds no secret."""
    try:
        connection = await psycopg.AsyncConnection.connect(
            connection_string(url, statement_timeout=PROBE_TIMEOUT_MS), autocommit=True
        )
        async with connection:
            started = time.time()
            cursor = await connection.execute(FACTS)
            [(version, number, is_read_only, clock, has_migrations)] = await cursor.fetchall()
            finished = time.time()
            collation = None
            if number >= COLLATION_VERSIONS_SINCE:
                cursor = await connection.execute(COLLATION)
                collation = Collation(*(await cursor.fetchall())[0])
            applied: set[str] = set()
            if has_migrations:
                cursor = await connection.execute(APPLIED)
                applied = {version for (version,) in await cursor.fetchall()}
    except psycopg.Error as error:
        match = REASONS.search(str(error))
        cause = match[0] if match else type(error).__qualname__
        if match and match["absent"]:
            cause = f"the {match['absent']} does not exist"
        raise errors.UnavailableError(
            f"cannot be reached: {cause}", reason="DATABASE_UNAVAILABLE"
        ) from error
    missing = _missing(applied)
    return Facts(
        version=version.partition(" ")[0],
        version_number=number,
        is_read_only=is_read_only,
        clock_ahead=(started + finished) / 2 - clock,
        missing=missing,
        newer=len(applied) - (len(_files()) - len(missing)),
        seconds=finished - started,
        collation=collation,
    )


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
        Raises UnavailableError if the database cannot be reached.
        """
        try:
            if self._connection is not None and is_read_only(self._connection):
                await self.close()  # after a failover, the primary is elsewhere
            if self._connection is None:
                self._connection = await psycopg.AsyncConnection.connect(
                    self._conninfo, autocommit=True
                )
            cursor = await self._connection.execute(APPLIED)
            applied = {version for (version,) in await cursor.fetchall()}
        except psycopg.errors.UndefinedTable:
            applied = set()
        except psycopg.Error as error:
            await self.close()
            raise errors.UnavailableError(
                "the database cannot be reached", reason="DATABASE_UNAVAILABLE"
            ) from error
        return _missing(applied)

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()
