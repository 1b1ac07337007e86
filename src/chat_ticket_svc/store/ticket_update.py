"""Changing a ticket, which is a change of every session that it serves.

The triggers of the schema count the change of the ticket and of its sessions, for the servers of an
older version too.
"""

from collections.abc import Mapping
from typing import Any

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.tickets import (
    COUNT_SESSIONS,
    MAX_SESSIONS,
    REFERENCE_INDEX,
    TICKET_COLUMNS,
    Ticket,
    external_ref_taken,
    get,
    ticket_not_found,
    too_many_sessions,
)
from chat_ticket_svc.store.transaction import StartAgain, Transaction

# One more than a ticket may have.
SESSIONS = f"""
SELECT session_id::text FROM chat_tickets
 WHERE tenant_id = %(tenant_id)s AND ticket_id = %(ticket_id)s::uuid
 ORDER BY session_id
 LIMIT {MAX_SESSIONS + 1}
"""

LOCK_SESSIONS = """
SELECT s.id::text FROM chat_sessions s
 WHERE s.tenant_id = %(tenant_id)s
   AND s.id IN (SELECT session_id FROM chat_tickets
                 WHERE tenant_id = %(tenant_id)s AND ticket_id = %(ticket_id)s::uuid)
 ORDER BY s.id
   FOR NO KEY UPDATE
"""

# Of sessions that are locked after their ticket. To wait for one could be a deadlock.
LOCK_SESSIONS_AT_ONCE = """
SELECT s.id::text FROM chat_sessions s
 WHERE s.tenant_id = %(tenant_id)s AND s.id = ANY (%(session_ids)s::uuid[])
   FOR NO KEY UPDATE SKIP LOCKED
"""

LOCK_TICKET = f"""
SELECT {TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s AND t.id = %(ticket_id)s::uuid
   FOR NO KEY UPDATE
"""

UPDATE_TICKET = f"""
UPDATE tickets t
   SET title = %(title)s,
       status = %(status)s,
       external_ref = %(external_ref)s,
       updated_at = next_change_time(updated_at)
 WHERE t.tenant_id = %(tenant_id)s AND t.id = %(ticket_id)s::uuid
RETURNING {TICKET_COLUMNS}
"""


async def update(
    db: Database,
    tenant_id: str,
    ticket_id: str,
    changes: Mapping[str, Any],
    etag: int | None,
) -> tuple[Ticket, list[str]]:
    """Set fields of a ticket; return it, and the ids of the sessions that have changed with it.

    Setting the current values changes nothing, and waits for nobody.
    """
    params = {"tenant_id": tenant_id, "ticket_id": ticket_id}

    async def body(transaction: Transaction) -> tuple[Ticket, list[str]]:
        # The sessions first, as everywhere.
        locked = await transaction.fetch_all(LOCK_SESSIONS, params, str)
        ticket = await transaction.fetch_one(LOCK_TICKET, params, Ticket)
        if ticket is None:
            raise ticket_not_found(ticket_id)
        sessions.check_revision(ticket.revision, etag, "ticket")
        changed = ticket._replace(**changes)
        if changed == ticket:  # by an earlier attempt, perhaps
            return ticket, locked
        linked = await transaction.fetch_all(SESSIONS, params, str)
        if len(linked) > MAX_SESSIONS:
            raise too_many_sessions(ticket_id, await _count_sessions(transaction, params))
        if late := set(linked).difference(locked):  # linked during the wait for the locks
            session_ids = {**params, "session_ids": list(late)}
            if len(await transaction.fetch_all(LOCK_SESSIONS_AT_ONCE, session_ids, str)) < len(
                late
            ):
                raise StartAgain
        values = {**params, **changed._asdict()}
        [updated] = await transaction.fetch_all(UPDATE_TICKET, values, Ticket)
        return updated, linked

    ticket = await get(db, tenant_id, ticket_id)
    sessions.check_revision(ticket.revision, etag, "ticket")
    if ticket._replace(**changes) == ticket:
        return ticket, []
    linked = await db.fetch_all(SESSIONS, params, str)
    if len(linked) > MAX_SESSIONS:
        raise too_many_sessions(ticket_id, await _count_sessions(db, params))
    try:
        return await db.transaction(body, idempotent=etag is None, locks=[*linked, ticket_id])
    except ConstraintViolation as violation:
        if violation.constraint != REFERENCE_INDEX:
            raise
        error = await external_ref_taken(db, tenant_id, ticket_id, changes["external_ref"])
        raise error or errors.ContentionError() from violation


async def _count_sessions(reader: Database | Transaction, params: Mapping[str, Any]) -> int:
    [count] = await reader.fetch_all(COUNT_SESSIONS, params, int)
    return count
