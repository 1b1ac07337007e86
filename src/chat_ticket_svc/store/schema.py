"""Which migrations a database has, compared with those that this version of the service needs."""

from pathlib import Path

import psycopg

from chat_ticket_svc.store.database import Database

MIGRATIONS = Path(__file__).parents[3] / "migrations"

APPLIED = "SELECT version FROM schema_migrations"


async def missing(db: Database) -> list[str]:
    """The file names of the migrations that the database lacks, oldest first.

    A database with newer ones is accepted: it is migrated before the service is replaced.
    """
    try:
        applied = set(await db.rows(APPLIED, {}, str))
    except psycopg.errors.UndefinedTable:
        applied = set()
    files = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
    return [name for name in files if name.split("_")[0] not in applied]
