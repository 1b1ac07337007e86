"""Finishing the drafts of lost writers.

A writer that is silent for the time of its lease counts as lost. Every process looks for expired
drafts, and makes INCOMPLETE messages of them. Of several that find the same draft, one finishes it:
the others wait for its lock, and find it gone.
"""

import asyncio
import random
from collections.abc import Callable

import structlog

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store import drafts
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings

log = structlog.get_logger()

SWEEP_SECONDS = 1.0
# Of one sweep. They are finished a few at a time, so that calls find connections.
MAX_EXPIRED = 500
CONCURRENCY = 3

# No index has the time, which changes with each piece: the table has open drafts only.
EXPIRED = """
SELECT tenant_id COLLATE "C", session_id::text, id::text FROM chat_drafts
 WHERE expires_at < clock_timestamp()
 LIMIT %(limit)s
"""


class DraftExpiry:
    """Finishes expired drafts, once a second. `on_finished` gets (tenant, session) of each."""

    def __init__(
        self,
        db: Database,
        *,
        default_search_language: str,
        on_finished: Callable[[str, str], object],
    ):
        self._db = db
        self._default_search_language = default_search_language
        self._on_finished = on_finished
        self._warnings = RepeatedWarnings()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            # The jitter keeps processes that started together from looking together.
            await asyncio.sleep(SWEEP_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                while await self._finish_expired() == MAX_EXPIRED:
                    pass
            except Exception as error:  # any error: the next sweep may work
                self._warnings.warn("could not look for expired drafts", cause(error))

    async def _finish_expired(self) -> int:
        """Finish some of the expired drafts, and return the number of those that are gone."""
        expired = await self._db.fetch_all(EXPIRED, {"limit": MAX_EXPIRED}, lambda *row: row)
        gone = 0
        # Sessions that something holds the lock of: the next sweep tries their drafts again.
        locked: set[tuple[str, str]] = set()
        random.shuffle(expired)  # other processes have found the same ones

        async def finish_in_turn() -> None:
            nonlocal gone
            while expired:
                tenant_id, session_id, draft_id = expired.pop()
                if (tenant_id, session_id) in locked:
                    continue
                try:
                    # A task of its own has a context of its own, with the tenant.
                    gone += await asyncio.create_task(self._finish(tenant_id, session_id, draft_id))
                except errors.ContentionError:
                    locked.add((tenant_id, session_id))

        await asyncio.gather(*(finish_in_turn() for _ in range(CONCURRENCY)))
        return gone

    async def _finish(self, tenant_id: str, session_id: str, draft_id: str) -> bool:
        """Returns False if the draft is still there, and the next sweep finds it again.

        Raises ContentionError if its session is locked.
        """
        request_context.set_tenant(tenant_id)
        try:
            await drafts.finish(
                self._db,
                tenant_id,
                session_id,
                draft_id,
                "incomplete",
                default_search_language=self._default_search_language,
                only_expired=True,
            )
        except errors.NotFoundError:
            # Another process was first, the writer is back, or the session was deleted.
            return True
        except errors.ContentionError:
            raise
        except Exception as error:  # any error: the next sweep may work
            self._warnings.warn("could not finish an expired draft", cause(error))
            return False
        metrics.DRAFTS_EXPIRED.inc()
        log.info("finished the draft of a lost writer", tenant=tenant_id, session_id=session_id)
        self._on_finished(tenant_id, session_id)
        return True
