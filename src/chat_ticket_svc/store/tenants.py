"""All data of a tenant: counting it, reading it from the oldest on, and deleting it in batches.

A session is deleted whole, in one transaction. So whatever interrupts the deletion, each session
that is left has all that its revision stands for.
"""

import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import UUID

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import NO_STATEMENT_TIMEOUT, Session
from chat_ticket_svc.store.tickets import Ticket
from chat_ticket_svc.store.transaction import Transaction

# Limits of one page, and of one transaction that deletes: for sessions, and for all other rows. A
# session with more rows has a transaction of its own.
SESSIONS_PER_BATCH = 20
ROWS_PER_BATCH = 500

COUNT = """
SELECT (SELECT count(*) FROM chat_sessions WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_messages WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_attachments WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_message_tombstones WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_drafts WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets
         WHERE tenant_id = %(tenant_id)s AND status IN ('open', 'pending')),
       (SELECT count(*) FROM tenant_settings WHERE tenant_id = %(tenant_id)s)
"""

OLDEST_SESSIONS = f"""
SELECT {sessions.COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s
   AND (created_at, id) > ('epoch'::timestamptz + %(after_time)s * interval '1 microsecond',
                           %(after_id)s::uuid)
 ORDER BY created_at, chat_sessions.id
 LIMIT %(limit)s
"""

OLDEST_TICKETS = f"""
SELECT {tickets.TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s
   AND (NOT %(active)s OR t.status IN ('open', 'pending'))
   AND (t.created_at, t.id) > ('epoch'::timestamptz + %(after_time)s * interval '1 microsecond',
                               %(after_id)s::uuid)
 ORDER BY t.created_at, t.id
 LIMIT %(limit)s
"""

LOCK_OLDEST_SESSIONS = """
SELECT id::text, revision FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s
 ORDER BY created_at, id
 LIMIT %(limit)s
   FOR UPDATE
"""

# A ticket may have been linked or reopened since the chat tickets were deleted. The lock keeps its
# status.
STATUSES_OF_LINKED_TICKETS = """
SELECT t.status
  FROM chat_tickets ct
  JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = ANY (%(session_ids)s::uuid[])
   FOR SHARE OF t
"""

DELETE_MESSAGES = """
WITH deleted AS (
    DELETE FROM chat_messages
     WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
    RETURNING id
)
SELECT count(*) FROM deleted
"""

DELETE_TOMBSTONES = """
WITH deleted AS (
    DELETE FROM chat_message_tombstones
     WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
    RETURNING message_id
)
SELECT count(*) FROM deleted
"""

DELETE_SESSIONS = """
DELETE FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND id = ANY (%(session_ids)s::uuid[])
"""

# The lock keeps the ticket from being reopened by a concurrent call.
DELETE_CHAT_TICKETS = """
WITH deleted AS (
    DELETE FROM chat_tickets
     WHERE tenant_id = %(tenant_id)s AND id IN (
         SELECT ct.id
           FROM chat_tickets ct
           JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
          WHERE ct.tenant_id = %(tenant_id)s
            AND (%(active)s OR t.status NOT IN ('open', 'pending'))
          LIMIT %(limit)s
            FOR SHARE OF t)
    RETURNING id
)
SELECT count(*) FROM deleted
"""

DELETE_TICKETS = """
WITH deleted AS (
    DELETE FROM tickets
     WHERE tenant_id = %(tenant_id)s AND id IN (
         SELECT t.id
           FROM tickets t
          WHERE t.tenant_id = %(tenant_id)s
            AND (%(active)s OR t.status NOT IN ('open', 'pending'))
            AND NOT EXISTS (
                SELECT FROM chat_tickets ct
                 WHERE ct.tenant_id = t.tenant_id AND ct.ticket_id = t.id)
          LIMIT %(limit)s
            FOR UPDATE OF t)
    RETURNING id
)
SELECT count(*) FROM deleted
"""


DELETE_SETTINGS = """
WITH deleted AS (
    DELETE FROM tenant_settings WHERE tenant_id = %(tenant_id)s
    RETURNING tenant_id
)
SELECT count(*) FROM deleted
"""


class Count(NamedTuple):
    """How many rows a tenant has in each table. `active_tickets` are open or pending."""

    sessions: int
    messages: int
    attachments: int
    tombstones: int
    drafts: int
    chat_tickets: int
    tickets: int
    active_tickets: int
    settings: int


async def count(db: Database, tenant_id: str) -> Count:
    [counts] = await db.fetch_all(COUNT, {"tenant_id": tenant_id}, Count)
    return counts


async def oldest_sessions(
    db: Database, tenant_id: str, after: Session | None = None
) -> list[Session]:
    """A page of sessions, oldest first, after the given one."""
    params = {"tenant_id": tenant_id, **_cursor_params(after), "limit": SESSIONS_PER_BATCH}
    return await db.fetch_all(OLDEST_SESSIONS, params, Session)


async def oldest_tickets(
    db: Database, tenant_id: str, after: Ticket | None = None, *, active: bool = False
) -> list[Ticket]:
    """A page of tickets, oldest first, after the given one. With `active`, only open or pending."""
    params = {
        "tenant_id": tenant_id,
        **_cursor_params(after),
        "active": active,
        "limit": ROWS_PER_BATCH,
    }
    return await db.fetch_all(OLDEST_TICKETS, params, Ticket)


def _cursor_params(after: Session | Ticket | None) -> dict[str, int | str]:
    if after is None:
        return {"after_time": 0, "after_id": str(UUID(int=0))}
    return {"after_time": after.created_at, "after_id": after.id}


async def erase(db: Database, tenant_id: str, *, active_tickets: bool) -> AsyncIterator[int]:
    """Delete all data of a tenant, in batches, and yield the number of deleted rows after each.

    Attachments and drafts are deleted with their messages and sessions, and not counted. Without
    `active_tickets`, open and pending tickets and their sessions are kept, and
    FailedPreconditionError is raised at the first of them. Each batch is a transaction, so after an
    interruption, another call continues.
    """
    params = {"tenant_id": tenant_id, "active": active_tickets, "limit": ROWS_PER_BATCH}
    while deleted := sum(await db.write(DELETE_CHAT_TICKETS, params, int, idempotent=True)):
        yield deleted
    while deleted := sum(await db.write(DELETE_TICKETS, params, int, idempotent=True)):
        yield deleted
    while deleted := await _erase_oldest_sessions(db, tenant_id):
        yield deleted
    if deleted := sum(await db.write(DELETE_SETTINGS, params, int, idempotent=True)):
        yield deleted


async def _erase_oldest_sessions(db: Database, tenant_id: str) -> int:
    """Delete some of the oldest sessions with their contents; return the number of deleted rows."""

    async def body(transaction: Transaction) -> int:
        page = {"tenant_id": tenant_id, "limit": SESSIONS_PER_BATCH}
        oldest = await transaction.fetch_all(LOCK_OLDEST_SESSIONS, page, lambda *row: row)
        # A session has no more messages and tombstones than revisions.
        rows = list(itertools.accumulate(revision for _, revision in oldest))
        ids = [
            id_ for (id_, _), total in zip(oldest, rows, strict=True) if total <= ROWS_PER_BATCH
        ] or [id_ for id_, _ in oldest[:1]]
        params = {"tenant_id": tenant_id, "session_ids": ids}
        statuses = await transaction.fetch_all(STATUSES_OF_LINKED_TICKETS, params, str)
        if not {"open", "pending"}.isdisjoint(statuses):
            raise errors.FailedPreconditionError(
                "a ticket was linked or reopened during the deletion",
                reason="SESSION_HAS_ACTIVE_TICKET",
                subject="chat_sessions",
            )
        await transaction.execute(NO_STATEMENT_TIMEOUT, {})
        deleted = sum(await transaction.fetch_all(DELETE_MESSAGES, params, int))
        deleted += sum(await transaction.fetch_all(DELETE_TOMBSTONES, params, int))
        await transaction.execute(DELETE_SESSIONS, params)
        return deleted + len(ids)

    return await db.transaction(body, idempotent=True)
