"""A database connection for commands that read or delete a whole tenant."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from chat_ticket_svc import config
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import missing_right_for_operator

# Counting the rows of a large tenant takes minutes. An erase that was killed holds its locks until
# PostgreSQL has finished its last statement.
STATEMENT_TIMEOUT_MS = LOCK_TIMEOUT_MS = 600_000


def run_on_database(work: Callable[[Database], Awaitable[int]]) -> int:
    """Run `work` on the database of DATABASE_URL, and return its exit status.

    Raises ConfigurationError if the URL is missing or invalid, or the role lacks a right, and
    StaleSchemaError if migrations are pending.
    """
    settings = config.load()
    if not settings.database_url:
        raise ConfigurationError("DATABASE_URL: required")
    require_valid_url("DATABASE_URL", settings.database_url)

    logging.getLogger("psycopg.pool").addFilter(_is_not_of_a_lost_connection)

    async def run() -> int:
        facts = await schema.facts(settings.database_url)
        if facts.missing:
            raise schema.StaleSchemaError(facts.missing)
        db = Database(
            settings.database_url,
            pool_size=2,
            prepare_statements=settings.prepare_statements,
            statement_timeout_ms=STATEMENT_TIMEOUT_MS,
            lock_timeout_ms=LOCK_TIMEOUT_MS,
        )
        await db.open()
        try:
            with missing_right_for_operator():
                return await work(db)
        finally:
            await db.close()

    return asyncio.run(run())


def _is_not_of_a_lost_connection(record: logging.LogRecord) -> bool:
    """A logging filter: another connection takes its place, or the command's error says so."""
    return not record.msg.startswith("discarding ")
