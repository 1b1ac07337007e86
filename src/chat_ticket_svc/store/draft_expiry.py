"""Finishing the drafts of lost writers.

A writer that is silent for the time of its lease counts as lost. Every process looks for expired
drafts, and makes INCOMPLETE messages of them. Of several that find the same draft, one finishes it:
the others wait for its lock, and find it gone.
"""

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

import structlog

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store import drafts, expired_drafts
from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.expired_drafts import ExpiredDraft
from chat_ticket_svc.store.sweeper import Sweeper
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings

T = TypeVar("T")
R = TypeVar("R")

log = structlog.get_logger()

SWEEP_SECONDS = 1.0
# Of one sweep. A few transactions at a time finish them, so that calls find connections.
MAX_EXPIRED = 500
CONCURRENCY = 3
# Of one transaction. Bounds the time that their sessions are locked.
MAX_BATCH_DRAFTS = 20
MAX_BATCH_BYTES = 256 * 1024

# No index has the time, which changes with each piece: the table has open drafts only.
EXPIRED = """
SELECT tenant_id COLLATE "C", session_id::text, id::text, length FROM chat_drafts
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
        self._sweeper = Sweeper(
            SWEEP_SECONDS, self._finish_expired, "could not look for expired drafts"
        )

    def start(self) -> None:
        self._sweeper.start()

    async def stop(self) -> None:
        await self._sweeper.stop()

    async def _finish_expired(self) -> bool:
        """Finish some of the expired drafts. Returns whether there may be more."""
        expired = await self._db.fetch_all(EXPIRED, {"limit": MAX_EXPIRED}, ExpiredDraft)
        batches = _batches(expired)
        random.shuffle(batches)  # other processes have found the same ones
        left = [draft for drafts in await _map(self._finish_batch, batches) for draft in drafts]
        of_sessions = [
            list(group) for _, group in itertools.groupby(sorted(left), lambda draft: draft[:2])
        ]
        gone = len(expired) - len(left) + sum(await _map(self._finish_alone, of_sessions))
        return gone == MAX_EXPIRED

    async def _finish_batch(self, batch: Sequence[ExpiredDraft]) -> Sequence[ExpiredDraft]:
        """Returns those that are to be finished alone."""
        try:
            finished, left = await expired_drafts.finish(
                self._db, batch, default_search_language=self._default_search_language
            )
        except Exception:  # any error: each meets its own when it is finished alone
            return batch
        for draft in finished:
            self._note_finished(draft)
        return left

    async def _finish_alone(self, of_session: Sequence[ExpiredDraft]) -> int:
        """Finish the drafts of a session one by one, and return the number of those that are gone.

        If the session is locked, it leaves them to the next sweep.
        """
        request_context.set_tenant(of_session[0].tenant_id)
        gone = 0
        with contextlib.suppress(errors.ContentionError):
            for draft in of_session:
                gone += await self._finish(draft)
        return gone

    async def _finish(self, draft: ExpiredDraft) -> bool:
        """Returns False if the draft is still there, and the next sweep finds it again.

        Raises ContentionError if its session is locked.
        """
        try:
            await drafts.finish(
                self._db,
                draft.tenant_id,
                draft.session_id,
                draft.id,
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
        self._note_finished(draft)
        return True

    def _note_finished(self, draft: ExpiredDraft) -> None:
        metrics.DRAFTS_EXPIRED.inc()
        log.info(
            "finished the draft of a lost writer",
            tenant=draft.tenant_id,
            session_id=draft.session_id,
        )
        self._on_finished(draft.tenant_id, draft.session_id)


def _batches(expired: Sequence[ExpiredDraft]) -> list[list[ExpiredDraft]]:
    """The drafts in batches, those of a session one after the other."""
    batches: list[list[ExpiredDraft]] = []
    size = 0
    for draft in sorted(expired):
        size += draft.length
        if not batches or len(batches[-1]) == MAX_BATCH_DRAFTS or size > MAX_BATCH_BYTES:
            batches.append([])
            size = draft.length
        batches[-1].append(draft)
    return batches


async def _map(work: Callable[[T], Coroutine[None, None, R]], items: Sequence[T]) -> list[R]:
    """The results of `work` for each, a few at a time."""
    waiting = list(items)
    results: list[R] = []

    async def work_in_turn() -> None:
        while waiting:
            # A task of its own has a context of its own, for the tenant.
            results.append(await asyncio.create_task(work(waiting.pop())))

    await asyncio.gather(*(work_in_turn() for _ in range(CONCURRENCY)))
    return results
