"""Sweeping the tombstones of sessions and tickets that were deleted long ago.

Every process sweeps. Of several at the same time, each takes rows that no other has.
"""

from typing import NamedTuple

from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sweeper import Sweeper
from chat_ticket_svc.telemetry import metrics

SWEEP_SECONDS = 3600.0
# Of each kind in one statement, so that each is short.
MAX_BATCH = 1000

# The clock of the database decides. The deletion and `swept_position` are one statement, so whoever
# reads both in one snapshot cannot miss a tombstone unawares.
SWEEP = """
WITH old_sessions AS (
    SELECT tenant_id, session_id FROM chat_session_tombstones
     WHERE deleted_at < now() - %(days)s * interval '1 day'
     ORDER BY deleted_at
     LIMIT %(limit)s
       FOR UPDATE SKIP LOCKED
), swept_sessions AS (
    DELETE FROM chat_session_tombstones t
     USING old_sessions old
     WHERE t.tenant_id = old.tenant_id AND t.session_id = old.session_id
    RETURNING t.feed_position
), old_tickets AS (
    SELECT tenant_id, ticket_id FROM ticket_tombstones
     WHERE deleted_at < now() - %(days)s * interval '1 day'
     ORDER BY deleted_at
     LIMIT %(limit)s
       FOR UPDATE SKIP LOCKED
), swept_tickets AS (
    DELETE FROM ticket_tombstones t
     USING old_tickets old
     WHERE t.tenant_id = old.tenant_id AND t.ticket_id = old.ticket_id
    RETURNING t.feed_position
), swept AS (
    SELECT (SELECT count(*) FROM swept_sessions) AS sessions,
           (SELECT count(*) FROM swept_tickets) AS tickets,
           -- NULL when nothing is swept.
           greatest((SELECT max(feed_position) FROM swept_sessions),
                    (SELECT max(feed_position) FROM swept_tickets)) + 1 AS before_position
), remembered AS (
    UPDATE chat_epochs
       SET swept_position = greatest(swept_position, before_position)
      FROM swept
     WHERE ordinal = (SELECT max(ordinal) FROM chat_epochs) AND swept_position < before_position
)
SELECT sessions, tickets FROM swept
"""


class Swept(NamedTuple):
    """How many tombstones of each kind one statement has deleted."""

    sessions: int
    tickets: int


class TombstoneSweep:
    """Deletes the tombstones of sessions and tickets older than `days`, once an hour."""

    def __init__(self, db: Database, *, days: int):
        self._db = db
        self._days = days
        self._sweeper = Sweeper(SWEEP_SECONDS, self._sweep_batch, "could not sweep tombstones")

    def start(self) -> None:
        self._sweeper.start()

    async def stop(self) -> None:
        await self._sweeper.stop()

    async def _sweep_batch(self) -> bool:
        """Delete some of the old tombstones. Returns whether there may be more."""
        params = {"days": self._days, "limit": MAX_BATCH}
        [swept] = await self._db.write(SWEEP, params, Swept, idempotent=True)
        metrics.TOMBSTONES_SWEPT.inc(swept.sessions + swept.tickets)
        return MAX_BATCH in swept
