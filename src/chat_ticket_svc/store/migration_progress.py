"""What a run of dbmate is doing, as PostgreSQL sees it from another connection."""

import contextlib
from typing import Any, NamedTuple

import psycopg

from chat_ticket_svc.store.connection import MIGRATION_APPLICATION_NAME, connection_string

# A role, a database or the environment may set these, for the short statements of services or for
# old programs. A migration takes as long as it takes. Its waits for locks are bounded by its own
# lock_timeout.
SESSION_SETTINGS = {
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",  # of the connection that holds the lock of dbmate
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
    "standard_conforming_strings": "on",
}
STATEMENT_TIMEOUT_MS = 2000  # of what this module reads
TRANSACTION_TIMEOUT_SINCE = 170_000

# Of a migration that runs: what it waits for, what waits for it, and an index that it builds.
ACTIVITY = """
SELECT wait_event = 'advisory',
       ARRAY(SELECT concat_ws(', ', blocker.pid, nullif(application_name, ''), usename, state)
               FROM unnest(pg_blocking_pids(own.pid)) AS blocker (pid)
               LEFT JOIN pg_stat_activity a ON a.pid = blocker.pid),
       ARRAY(SELECT DISTINCT relname::text
               FROM pg_locks l JOIN pg_class t ON t.oid = l.relation AND relkind IN ('r', 'p')
              WHERE l.pid = own.pid AND granted AND mode = 'AccessExclusiveLock'
                AND l.database = own.datid),
       ARRAY(SELECT DISTINCT relname::text
               FROM pg_locks l JOIN pg_class t ON t.oid = l.relation AND relkind IN ('r', 'p')
              WHERE l.pid = own.pid AND granted
                AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock')
                AND l.database = own.datid),
       relname, phase,
       CASE WHEN tuples_total > 0 THEN tuples_done ELSE blocks_done END,
       CASE WHEN tuples_total > 0 THEN tuples_total ELSE blocks_total END
  FROM pg_stat_activity own
  LEFT JOIN pg_stat_progress_create_index p ON p.pid = own.pid
  LEFT JOIN pg_class t ON t.oid = p.relid
 WHERE own.datname = current_database() AND own.application_name = %s AND own.state = 'active'
   AND own.backend_type = 'client backend'
"""


class IndexBuild(NamedTuple):
    """An index that is being built: its table, the phase, and how much of the phase is done."""

    table: str
    phase: str
    done: int
    total: int


class Activity(NamedTuple):
    """What one connection of dbmate is doing.

    `blockers` describes each process whose lock it waits for; `waits_for_migration` says that the
    lock is that of another run. Nobody reads from, or writes to, the tables of `exclusive`, and
    nobody writes to those of `shared`, until it ends.
    """

    waits_for_migration: bool
    blockers: list[str]
    exclusive: list[str]
    shared: list[str]
    index_build: IndexBuild | None


class MigrationProgress:
    """Watches the connections of one run, which have `application_name`.

    Nothing depends on it: without a connection it sees nothing.
    """

    def __init__(self, url: str, application_name: str):
        self._application_name = application_name
        self._connection: psycopg.Connection[Any] | None = None
        with contextlib.suppress(psycopg.Error):  # dbmate reports what is wrong
            settings: dict[str, str | int] = {
                **SESSION_SETTINGS,
                "statement_timeout": STATEMENT_TIMEOUT_MS,
            }
            self._connection = psycopg.connect(
                connection_string(url, **settings),
                autocommit=True,
                application_name=MIGRATION_APPLICATION_NAME,
            )

    def session_settings(self) -> dict[str, str]:
        """The settings with which the migrations are to run on this server."""
        settings = dict(SESSION_SETTINGS)
        if (
            self._connection is not None
            and self._connection.info.server_version >= TRANSACTION_TIMEOUT_SINCE
        ):
            settings["transaction_timeout"] = "0"
        return settings

    def activities(self) -> list[Activity]:
        """What the connections of the run are doing now."""
        if self._connection is None:
            return []
        try:
            rows = self._connection.execute(ACTIVITY, [self._application_name]).fetchall()
        except psycopg.Error:
            self.close()
            return []
        return [
            Activity(
                waits_for_migration=bool(waits_for_advisory_lock),
                blockers=blockers,
                exclusive=exclusive,
                shared=shared,
                index_build=IndexBuild(*index_build) if index_build[0] else None,
            )
            for waits_for_advisory_lock, blockers, exclusive, shared, *index_build in rows
        ]

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
