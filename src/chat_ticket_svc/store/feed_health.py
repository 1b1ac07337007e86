"""What holds up the change feed, and the epoch of the database, as an operator sees them.

A reader of the feed tells no change beyond the oldest transaction that has written something (see
change_feed.py). Transactions of other databases of the same server count too.
"""

import asyncio
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from chat_ticket_svc.store.connection import connect, connection_string
from chat_ticket_svc.store.connection_errors import unreachable

STATEMENT_TIMEOUT_MS = 2000
# The ages of other roles' transactions are hidden from a role without pg_read_all_stats.
HIDDEN_AGE_SECONDS = 2.0

# A transaction with an id has written something, or it is about to. Prepared ones have no process.
OLDEST = """
SELECT * FROM (
    SELECT backend_xid::text, pid, NULL, usename::text, datname::text, application_name, state,
           extract(epoch FROM clock_timestamp() - xact_start)::float8
      FROM pg_stat_activity
     WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid()
     UNION ALL
    SELECT transaction::text, NULL, gid, owner::text, database::text, NULL, NULL,
           extract(epoch FROM clock_timestamp() - prepared)::float8
      FROM pg_prepared_xacts
) AS holder (xid)
 ORDER BY age(xid::xid) DESC
 LIMIT 1
"""

EPOCH = """
SELECT ordinal, started_at, split_part(identity, '/', 1) <> '?', split_part(identity, '/', 2) <> '?'
  FROM chat_epochs ORDER BY ordinal DESC LIMIT 1
"""


class Holder(NamedTuple):
    """The oldest transaction that has written something. A prepared one has a gid and no pid.

    `state` and `seconds`, its age, are None if the role may not see them.
    """

    xid: str
    pid: int | None
    gid: str | None
    user: str | None
    database: str | None
    application: str | None
    state: str | None
    seconds: float | None


class Epoch(NamedTuple):
    """The last epoch, and what of the database's identity could be read when it began."""

    ordinal: int
    started_at: datetime
    has_system_identifier: bool
    has_timeline: bool


async def oldest_holder(url: str) -> Holder | None:
    """The transaction that holds up the feed.

    If its age is hidden from this role, it is returned only if it is still the oldest one after
    HIDDEN_AGE_SECONDS. Raises UnavailableError with the cause.
    """
    try:
        async with await _connect(url) as connection:
            holder = await _read_oldest(connection)
            if holder is None or holder.seconds is not None:
                return holder
            await asyncio.sleep(HIDDEN_AGE_SECONDS)
            oldest = await _read_oldest(connection)
            return oldest if oldest is not None and oldest.xid == holder.xid else None
    except psycopg.Error as error:
        raise unreachable(error) from error


async def last_epoch(url: str) -> Epoch:
    """The last epoch that has begun. Raises UnavailableError with the cause."""
    try:
        async with await _connect(url) as connection:
            cursor = await connection.execute(EPOCH)
            [epoch] = map(Epoch._make, await cursor.fetchall())
            return epoch
    except psycopg.Error as error:
        raise unreachable(error) from error


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await connect(connection_string(url, statement_timeout=STATEMENT_TIMEOUT_MS))


async def _read_oldest(connection: psycopg.AsyncConnection[Any]) -> Holder | None:
    cursor = await connection.execute(OLDEST)
    return next(map(Holder._make, await cursor.fetchall()), None)
