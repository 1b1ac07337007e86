"""All that a tenant has: counted, read from the oldest on, and deleted in batches."""

from collections.abc import AsyncIterator
from typing import NamedTuple
from uuid import UUID

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import Ticket
from chat_ticket_svc.store.transaction import Transaction

# Of one page, and of one transaction that deletes: sessions, and everything else.
SESSIONS = 20
ROWS = 500

COUNT = """
SELECT (SELECT count(*) FROM chat_sessions WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_messages WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_attachments WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_message_tombstones WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM chat_tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets WHERE tenant_id = %(tenant_id)s),
       (SELECT count(*) FROM tickets
         WHERE tenant_id = %(tenant_id)s AND status IN ('open', 'pending'))
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
SELECT id::text FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s
 ORDER BY created_at, id
 LIMIT %(limit)s
   FOR UPDATE
"""

# Those that were linked or opened again since: locked, so that they stay as they are judged.
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
     WHERE tenant_id = %(tenant_id)s AND id IN (
         SELECT id FROM chat_messages
          WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
          LIMIT %(limit)s)
    RETURNING id
)
SELECT count(*) FROM deleted
"""

DELETE_TOMBSTONES = """
WITH deleted AS (
    DELETE FROM chat_message_tombstones
     WHERE tenant_id = %(tenant_id)s AND message_id IN (
         SELECT message_id FROM chat_message_tombstones
          WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
          LIMIT %(limit)s)
    RETURNING message_id
)
SELECT count(*) FROM deleted
"""

DELETE_SESSIONS = """
DELETE FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND id = ANY (%(session_ids)s::uuid[])
"""

# The ticket is locked, as it could be reopened right now.
DELETE_LINKS = """
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


class Count(NamedTuple):
    """How much of everything a tenant has; `active_tickets` are open or pending."""

    sessions: int
    messages: int
    attachments: int
    tombstones: int  # of deleted messages
    chat_tickets: int
    tickets: int
    active_tickets: int


async def count(db: Database, tenant_id: str) -> Count:
    [counted] = await db.fetch_all(COUNT, {"tenant_id": tenant_id}, Count)
    return counted


async def oldest_sessions(
    db: Database, tenant_id: str, after: Session | None = None
) -> list[Session]:
    """A page of them, behind the one that is given."""
    params = {"tenant_id": tenant_id, **_behind(after), "limit": SESSIONS}
    return await db.fetch_all(OLDEST_SESSIONS, params, Session)


async def oldest_tickets(
    db: Database, tenant_id: str, after: Ticket | None = None, *, active: bool = False
) -> list[Ticket]:
    """As oldest_sessions; `active` leaves out those that are solved or closed."""
    params = {"tenant_id": tenant_id, **_behind(after), "active": active, "limit": ROWS}
    return await db.fetch_all(OLDEST_TICKETS, params, Ticket)


def _behind(after: Session | Ticket | None) -> dict[str, int | str]:
    if after is None:
        return {"after_time": 0, "after_id": str(UUID(int=0))}
    return {"after_time": after.created_at, "after_id": after.id}


async def erase(db: Database, tenant_id: str, *, active_tickets: bool) -> AsyncIterator[int]:
    """Delete all that a tenant has, and say after each transaction how many rows that were.

    Attachments go with their messages and are not counted. Unless `active_tickets` says that they
    go too, they and their sessions stay, and FailedPreconditionError is raised. Whatever ends it,
    it goes on where it was when it is called again.
    """
    which = {"tenant_id": tenant_id, "active": active_tickets, "limit": ROWS}
    while deleted := sum(await db.write(DELETE_LINKS, which, int, idempotent=True)):
        yield deleted
    while deleted := sum(await db.write(DELETE_TICKETS, which, int, idempotent=True)):
        yield deleted
    while deleted := await _erase_oldest_sessions(db, tenant_id):
        yield deleted


async def _erase_oldest_sessions(db: Database, tenant_id: str) -> int:
    """Delete ROWS of what they hold, or else the sessions themselves."""

    async def body(transaction: Transaction) -> int:
        params = {"tenant_id": tenant_id, "limit": SESSIONS}
        ids = await transaction.fetch_all(LOCK_OLDEST_SESSIONS, params, str)
        which = {"tenant_id": tenant_id, "session_ids": ids, "limit": ROWS}
        statuses = await transaction.fetch_all(STATUSES_OF_LINKED_TICKETS, which, str)
        if not {"open", "pending"}.isdisjoint(statuses):
            raise errors.FailedPreconditionError(
                "a ticket was opened meanwhile",
                reason="SESSION_HAS_ACTIVE_TICKET",
                subject="chat_sessions",
            )
        deleted = sum(await transaction.fetch_all(DELETE_MESSAGES, which, int))
        if deleted == ROWS:
            return deleted
        tombstones = sum(await transaction.fetch_all(DELETE_TOMBSTONES, which, int))
        if tombstones == ROWS:
            return deleted + tombstones
        await transaction.execute(DELETE_SESSIONS, which)
        return deleted + tombstones + len(ids)

    return await db.transaction(body, idempotent=True)
