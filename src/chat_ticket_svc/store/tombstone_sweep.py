"""Sweeping the tombstones of sessions that were deleted long ago.

Every process sweeps. Of several at the same time, each takes rows that no other has.
"""

from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sweeper import Sweeper
from chat_ticket_svc.telemetry import metrics

SWEEP_SECONDS = 3600.0
# Of one statement, so that each is short.
MAX_BATCH = 1000

# The clock of the database decides.
SWEEP = """
WITH old AS (
    SELECT tenant_id, session_id FROM chat_session_tombstones
     WHERE deleted_at < now() - %(days)s * interval '1 day'
     ORDER BY deleted_at
     LIMIT %(limit)s
       FOR UPDATE SKIP LOCKED
), swept AS (
    DELETE FROM chat_session_tombstones t
     USING old
     WHERE t.tenant_id = old.tenant_id AND t.session_id = old.session_id
    RETURNING t.session_id
)
SELECT count(*) FROM swept
"""


class TombstoneSweep:
    """Deletes the tombstones of sessions that are older than `days`, once an hour."""

    def __init__(self, db: Database, *, days: int):
        self._db = db
        self._days = days
        self._sweeper = Sweeper(
            SWEEP_SECONDS, self._sweep_batch, "could not sweep the tombstones of sessions"
        )

    def start(self) -> None:
        self._sweeper.start()

    async def stop(self) -> None:
        await self._sweeper.stop()

    async def _sweep_batch(self) -> bool:
        """Delete some of the old tombstones. Returns whether there may be more."""
        params = {"days": self._days, "limit": MAX_BATCH}
        [swept] = await self._db.write(SWEEP, params, int, idempotent=True)
        metrics.SESSION_TOMBSTONES_SWEPT.inc(swept)
        return swept == MAX_BATCH
