"""Which migrations a database has, compared with those that this version of the service needs."""

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

# In the package where it is installed, and beside its sources in a checkout.
PLACES = [Path(__file__).parents[up] / "migrations" for up in (1, 3)]
MIGRATIONS = next(place for place in PLACES if place.is_dir())

APPLIED = "SELECT version FROM schema_migrations"
PROBE_TIMEOUT_MS = 2000


# What libpq can be quoted with: the rest of its words may hold what stands in the URL.
REASONS = re.compile(
    "password authentication failed|no password supplied|no pg_hba.conf entry"
    '|(?P<no>database|role) "[^"]*" does not exist'
    "|could not translate host name|Connection refused|No such file or directory"
    "|timeout expired|starting up|shutting down|too many clients|certificate verify failed"
)

FACTS = """
SELECT current_setting('server_version'), current_setting('server_version_num')::integer,
       pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean,
       extract(epoch FROM clock_timestamp())::float8,
       to_regclass('schema_migrations') IS NOT NULL
"""


class StaleSchemaError(ConfigurationError):
    """The database lacks migrations that this version needs; carries their names."""

    def __init__(self, missing: list[str]):
        super().__init__(
            f"the database lacks {', '.join(missing)}: run chat-ticket-svc migrate, or make migrate"
        )


class Facts(NamedTuple):
    """What is to be known of a database. `clock_ahead` is by how much ours is ahead of its clock.

    `missing` are the migrations that it lacks, `newer` how many it has that we do not know.
    """

    version: str
    version_number: int
    is_read_only: bool
    clock_ahead: float
    missing: list[str]
    newer: int
    seconds: float


async def facts(url: str) -> Facts:
    """Raises UnavailableError, which says why as far as that can be told."""
    try:
        connection = await psycopg.AsyncConnection.connect(
            connection_string(url, statement_timeout=PROBE_TIMEOUT_MS), autocommit=True
        )
        async with connection:
            began = time.time()
            cursor = await connection.execute(FACTS)
            [(version, number, is_read_only, clock, has_migrations)] = await cursor.fetchall()
            ended = time.time()
            applied: set[str] = set()
            if has_migrations:
                cursor = await connection.execute(APPLIED)
                applied = {version for (version,) in await cursor.fetchall()}
    except psycopg.Error as error:
        found = REASONS.search(str(error))
        why = found[0] if found else type(error).__qualname__
        if found and found["no"]:
            why = f"the {found['no']} does not exist"
        raise errors.UnavailableError(
            f"cannot be reached: {why}", reason="DATABASE_UNAVAILABLE"
        ) from error
    missing = _missing(applied)
    return Facts(
        version=version.partition(" ")[0],
        version_number=number,
        is_read_only=is_read_only,
        clock_ahead=(began + ended) / 2 - clock,
        missing=missing,
        newer=len(applied) - (len(_files()) - len(missing)),
        seconds=ended - began,
    )


def _files() -> list[str]:
    return sorted(path.name for path in MIGRATIONS.glob("*.sql"))


def _missing(applied: Container[str]) -> list[str]:
    return [name for name in _files() if name.split("_")[0] not in applied]


class Probe:
    """Asks a database for its schema, on a connection beside the pool.

    A pool that is busy must not look like a database that is down.
    """

    def __init__(self, url: str):
        self._conninfo = connection_string(url, statement_timeout=PROBE_TIMEOUT_MS)
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def missing(self) -> list[str]:
        """The file names of the migrations that the database lacks, oldest first.

        A database with newer ones is accepted: it is migrated before the service is replaced.
        Raises UnavailableError when it cannot be asked.
        """
        try:
            if self._connection is not None and is_read_only(self._connection):
                await self.close()  # perhaps the primary is elsewhere by now
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
