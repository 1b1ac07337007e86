"""Deleting many sessions, with all that they hold, in batches.

Each batch is a transaction, and a session is deleted whole. So whatever interrupts a deletion, each
session that is left has all that its revision stands for, and another call continues.

Locks are taken in the order of all transactions: the sessions, in the order of their ids, then
their tickets, in the order of theirs. So a batch and a link, or a change of a ticket, wait for each
other and never deadlock.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from typing import NamedTuple, Protocol, TypeVar

from chat_ticket_svc.store import tenants
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.sessions import NO_STATEMENT_TIMEOUT
from chat_ticket_svc.store.transaction import Transaction

# Limits of one transaction: for sessions, and for all other rows. A session with more rows has a
# transaction of its own.
SESSIONS_PER_BATCH = 20
ROWS_PER_BATCH = 500

LOCK_SESSIONS = """
SELECT id::text FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND id = ANY (%(session_ids)s::uuid[])
 ORDER BY chat_sessions.id
   FOR UPDATE
"""

LOCK_TICKETS_OF_SESSIONS = """
SELECT ct.session_id::text, t.id::text, t.status IN ('open', 'pending')
  FROM chat_tickets ct
  JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = ANY (%(session_ids)s::uuid[])
 ORDER BY t.id
   FOR UPDATE OF t
"""

DELETE_CHAT_TICKETS = """
WITH deleted AS (
    DELETE FROM chat_tickets
     WHERE tenant_id = %(tenant_id)s AND session_id = ANY (%(session_ids)s::uuid[])
    RETURNING id
)
SELECT count(*) FROM deleted
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

# Those that serve no other session. They are locked, so none is linked meanwhile.
DELETE_UNUSED_TICKETS = """
WITH deleted AS (
    DELETE FROM tickets t
     WHERE t.tenant_id = %(tenant_id)s AND t.id = ANY (%(ticket_ids)s::uuid[])
       AND NOT EXISTS (
           SELECT FROM chat_tickets ct
            WHERE ct.tenant_id = t.tenant_id AND ct.ticket_id = t.id)
    RETURNING id
)
SELECT count(*) FROM deleted
"""

DELETE_TICKETS_WITHOUT_SESSION = """
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


class _Sized(Protocol):
    @property
    def revision(self) -> int: ...


S = TypeVar("S", bound=_Sized)


class LinkedTicket(NamedTuple):
    """A ticket of a session. `is_active` says that it is open or pending."""

    session_id: str
    ticket_id: str
    is_active: bool


class Deleted(NamedTuple):
    """How many rows were deleted. Attachments and drafts are deleted too, and not counted."""

    sessions: int
    messages: int
    tombstones: int
    chat_tickets: int


def batches(sessions: Iterable[S]) -> Iterator[list[S]]:
    """The sessions in groups, each for one transaction."""
    batch: list[S] = []
    rows = 0
    for session in sessions:
        # A session has no more messages and tombstones than revisions.
        rows += session.revision
        if batch and (rows > ROWS_PER_BATCH or len(batch) == SESSIONS_PER_BATCH):
            yield batch
            batch, rows = [], session.revision
        batch.append(session)
    if batch:
        yield batch


async def lock_tickets(
    transaction: Transaction, tenant_id: str, session_ids: list[str]
) -> list[LinkedTicket]:
    """Lock the tickets of sessions that are locked. Nobody opens or links one of them then."""
    params = {"tenant_id": tenant_id, "session_ids": session_ids}
    return await transaction.fetch_all(LOCK_TICKETS_OF_SESSIONS, params, LinkedTicket)


async def delete_locked(
    transaction: Transaction, tenant_id: str, session_ids: list[str]
) -> Deleted:
    """Delete sessions that are locked, whatever their tickets are, and all that they hold.

    The tickets stay. There is no statement timeout until the transaction ends.
    """
    params = {"tenant_id": tenant_id, "session_ids": session_ids}
    await transaction.execute(NO_STATEMENT_TIMEOUT, {})
    [chat_tickets] = await transaction.fetch_all(DELETE_CHAT_TICKETS, params, int)
    [messages] = await transaction.fetch_all(DELETE_MESSAGES, params, int)
    [tombstones] = await transaction.fetch_all(DELETE_TOMBSTONES, params, int)
    await transaction.execute(DELETE_SESSIONS, params)
    return Deleted(len(session_ids), messages, tombstones, chat_tickets)


async def erase(
    db: Database, tenant_id: str, user_id: str | None = None, *, active_tickets: bool
) -> AsyncIterator[int]:
    """Delete all data of a tenant or a user, and yield the number of deleted rows of each batch.

    Tickets that served only deleted sessions are deleted with the last of them. Without
    `active_tickets`, open and pending tickets and their sessions are kept. With it, a user's
    sessions are deleted also when their ticket serves other sessions, and that ticket is kept.
    """
    last = None
    while page := await tenants.oldest_sessions(db, tenant_id, user_id, last):
        for batch in batches(page):
            ids = [session.id for session in batch]
            yield await _erase_sessions(db, tenant_id, ids, active_tickets=active_tickets)
        last = page[-1]
    if user_id is not None:
        return
    params = {"tenant_id": tenant_id, "active": active_tickets, "limit": ROWS_PER_BATCH}
    while deleted := sum(
        await db.write(DELETE_TICKETS_WITHOUT_SESSION, params, int, idempotent=True)
    ):
        yield deleted
    if deleted := sum(await db.write(DELETE_SETTINGS, params, int, idempotent=True)):
        yield deleted


async def _erase_sessions(
    db: Database, tenant_id: str, session_ids: list[str], *, active_tickets: bool
) -> int:
    """Delete sessions with their contents and tickets; return the number of deleted rows."""

    async def body(transaction: Transaction) -> int:
        params = {"tenant_id": tenant_id, "session_ids": session_ids}
        locked = await transaction.fetch_all(LOCK_SESSIONS, params, str)
        tickets = await lock_tickets(transaction, tenant_id, locked)
        # One may have been linked or opened since the tickets were counted.
        kept = {ticket.session_id for ticket in tickets if ticket.is_active and not active_tickets}
        erased = [id_ for id_ in locked if id_ not in kept]
        deleted = await delete_locked(transaction, tenant_id, erased)
        unused = {"tenant_id": tenant_id, "ticket_ids": [ticket.ticket_id for ticket in tickets]}
        [deleted_tickets] = await transaction.fetch_all(DELETE_UNUSED_TICKETS, unused, int)
        return sum(deleted) + deleted_tickets

    return await db.transaction(body, idempotent=True)
