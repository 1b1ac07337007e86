"""Which migrations a database has, compared with those that this version of the service needs."""

import contextlib
from pathlib import Path
from typing import Any

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.store.database import connection_string

MIGRATIONS = Path(__file__).parents[3] / "migrations"

APPLIED = "SELECT version FROM schema_migrations"
PROBE_TIMEOUT_MS = 2000


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
        files = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
        return [name for name in files if name.split("_")[0] not in applied]

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):
                await connection.close()
