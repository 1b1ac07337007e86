"""Deleting the sessions of a tenant whose last change is too long ago.

It goes on beside traffic: it waits for no session that somebody has locked, pauses between its
batches, and looks at each session again under its lock.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

from chat_ticket_svc.store import erasure
from chat_ticket_svc.store.columns import microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.transaction import Transaction

SESSIONS_PER_PAGE = 1000
PAUSE_SECONDS = 0.05

EXPIRED = """
       tenant_id = %(tenant_id)s
   AND updated_at < now() - %(older_than)s::interval
   AND (%(statuses)s::text[] IS NULL OR status = ANY (%(statuses)s::text[]))
"""

# The condition on updated_hour is implied by that on updated_at. It lets the index be used.
PAGE = f"""
SELECT s.id::text, s.revision, {microseconds("s.updated_hour")},
       s.has_ticket AND EXISTS (
           SELECT FROM chat_tickets ct
             JOIN tickets t ON t.tenant_id = %(tenant_id)s AND t.id = ct.ticket_id
            WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = s.id
              AND t.status IN ('open', 'pending')),
       EXISTS (
           SELECT FROM chat_drafts d
            WHERE d.tenant_id = %(tenant_id)s AND d.session_id = s.id)
  FROM chat_sessions s
 WHERE {EXPIRED}
   AND updated_hour < now() - %(older_than)s::interval
   AND (updated_hour, id) > ('epoch'::timestamptz + %(after_hour)s * interval '1 microsecond',
                             %(after_id)s::uuid)
 ORDER BY s.updated_hour, s.id
 LIMIT %(limit)s
"""

# A session that is locked is changing just now, or another run deletes it.
LOCK_EXPIRED = f"""
SELECT id::text FROM chat_sessions
 WHERE {EXPIRED} AND id = ANY (%(session_ids)s::uuid[])
 ORDER BY chat_sessions.id
   FOR UPDATE SKIP LOCKED
"""

# A draft begins under the session's lock, and changes the session only when it ends.
SESSIONS_WITH_DRAFT = """
SELECT DISTINCT session_id::text FROM chat_drafts
 WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
"""


class Rule(NamedTuple):
    """Which sessions expire: after which time without a change, and of which statuses.

    None means all statuses.
    """

    older_than: timedelta
    statuses: list[str] | None


class Expired(NamedTuple):
    """How many sessions and messages were deleted, and sessions kept for their active tickets."""

    sessions: int
    messages: int
    kept: int


class _Candidate(NamedTuple):
    id: str
    revision: int
    updated_hour: int
    has_active_ticket: bool
    has_draft: bool


async def expire(
    db: Database, tenant_id: str, rule: Rule, *, dry_run: bool = False
) -> AsyncIterator[Expired]:
    """Delete the expired sessions of a tenant, in batches, and yield the counts of each.

    Sessions with an open or pending ticket, or an open draft, are kept. So are tickets. With
    `dry_run`, nothing is deleted, the messages are not counted, and nothing pauses. After an
    interruption, another call continues, and two calls at once share the work.
    """
    last = _Candidate(str(UUID(int=0)), 0, 0, has_active_ticket=False, has_draft=False)
    params = {"tenant_id": tenant_id, **rule._asdict(), "limit": SESSIONS_PER_PAGE}
    while page := await db.fetch_all(
        PAGE,
        {**params, "after_hour": last.updated_hour, "after_id": last.id},
        _Candidate,
        prepare=False,
    ):
        kept = [session for session in page if session.has_active_ticket]
        due = [s for s in page if not (s.has_active_ticket or s.has_draft)]
        yield Expired(len(due) if dry_run else 0, 0, len(kept))
        for batch in [] if dry_run else erasure.batches(due):
            yield await _delete_expired(db, tenant_id, rule, [session.id for session in batch])
            await asyncio.sleep(PAUSE_SECONDS)
        last = page[-1]


async def _delete_expired(
    db: Database, tenant_id: str, rule: Rule, session_ids: list[str]
) -> Expired:
    async def body(transaction: Transaction) -> Expired:
        params = {"tenant_id": tenant_id, "session_ids": session_ids, **rule._asdict()}
        locked = await transaction.fetch_all(LOCK_EXPIRED, params, str)
        params["session_ids"] = locked
        being_written = set(await transaction.fetch_all(SESSIONS_WITH_DRAFT, params, str))
        tickets = await erasure.lock_tickets(transaction, tenant_id, locked)
        kept = {ticket.session_id for ticket in tickets if ticket.is_active}
        expired = [id_ for id_ in locked if id_ not in kept | being_written]
        deleted = await erasure.delete_locked(transaction, tenant_id, expired)
        return Expired(deleted.sessions, deleted.messages, len(kept))

    return await db.transaction(body, idempotent=True)
