"""Sweeping the tombstones of sessions that were deleted long ago.

Every process sweeps. Of several at the same time, each takes rows that no other has.
"""

import asyncio
import random

from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings

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
        self._warnings = RepeatedWarnings()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await cancel_and_wait(self._task)

    async def _run(self) -> None:
        while True:
            # The jitter keeps processes that started together from sweeping together.
            await asyncio.sleep(SWEEP_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                while await self._sweep_batch() == MAX_BATCH:
                    pass
            except Exception as error:  # any error: the next sweep may work
                self._warnings.warn("could not sweep the tombstones of sessions", cause(error))

    async def _sweep_batch(self) -> int:
        params = {"days": self._days, "limit": MAX_BATCH}
        [swept] = await self._db.write(SWEEP, params, int, idempotent=True)
        metrics.SESSION_TOMBSTONES_SWEPT.inc(swept)
        return swept
