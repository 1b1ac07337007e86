"""Tickets, and the links (chat tickets) from sessions to them."""

from datetime import datetime
from typing import Any, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Ticket(NamedTuple):
    """A row of tickets."""

    id: str
    tenant_id: str
    title: str
    status: str
    created_at: int
    updated_at: int


class ChatTicket(NamedTuple):
    """A row of chat_tickets with its ticket."""

    id: str
    session_id: str
    ticket_id: str
    created_at: int
    ticket: Ticket


class NewTicket(NamedTuple):
    """A ticket to open; the id is the client's or ours."""

    id: str
    id_is_chosen: bool
    title: str
    status: str


TICKET_COLUMNS = """
    t.id::text, t.tenant_id, t.title, t.status,
    (extract(epoch FROM t.created_at) * 1000000)::bigint,
    (extract(epoch FROM t.updated_at) * 1000000)::bigint
"""

LINK_COLUMNS = f"""
    ct.id::text, ct.session_id::text, ct.ticket_id::text,
    (extract(epoch FROM ct.created_at) * 1000000)::bigint,
    {TICKET_COLUMNS}
"""

GET_LINK = f"""
SELECT {LINK_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.id = %(id)s::uuid
"""

GET_LINK_OF_SESSION = f"""
SELECT {LINK_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = %(session_id)s::uuid
"""

LIST_LINKS_OF_SESSION = f"""
SELECT {LINK_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = %(parent_id)s::uuid
   AND (ct.created_at, ct.id) > (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY ct.created_at, ct.id
 LIMIT %(limit)s
"""

LIST_LINKS_OF_TICKET = f"""
SELECT {LINK_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.ticket_id = %(parent_id)s::uuid
   AND (ct.created_at, ct.id) > (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY ct.created_at, ct.id
 LIMIT %(limit)s
"""

CREATE_TICKET = """
INSERT INTO tickets (tenant_id, id, title, status)
VALUES (%(tenant_id)s, %(ticket_id)s::uuid, %(title)s, %(status)s)
"""

CREATE_LINK = """
INSERT INTO chat_tickets (tenant_id, id, session_id, ticket_id)
VALUES (%(tenant_id)s, %(id)s::uuid, %(session_id)s::uuid, %(ticket_id)s::uuid)
"""

LOCK_SESSION_OF_LINK = """
SELECT s.id::text
  FROM chat_tickets ct
  JOIN chat_sessions s ON s.tenant_id = ct.tenant_id AND s.id = ct.session_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.id = %(id)s::uuid
   FOR UPDATE OF s
"""

DELETE_LINK = """
DELETE FROM chat_tickets
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING session_id::text
"""

GET_TICKET = f"""
SELECT {TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s AND t.id = %(id)s::uuid
"""

LIST_TICKETS = f"""
SELECT {TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s
   AND (%(statuses)s::text[] IS NULL OR t.status = ANY (%(statuses)s::text[]))
   AND (t.created_at, t.id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY t.created_at DESC, t.id DESC
 LIMIT %(limit)s
"""

# An update that waited for another judges the row that one left: what is equal by then is left.
UPDATE_TICKET = """
UPDATE tickets
   SET title = coalesce(%(title)s, title),
       status = coalesce(%(status)s, status),
       updated_at = next_change_time(updated_at)
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
   AND (title, status) IS DISTINCT FROM (coalesce(%(title)s, title), coalesce(%(status)s, status))
RETURNING id::text
"""

DELETE_TICKET = """
DELETE FROM tickets
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING id::text
"""


def ticket_not_found(ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("ticket", ticket_id)


def link_not_found(chat_ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_ticket", chat_ticket_id)


def _link(*row: Any) -> ChatTicket:
    return ChatTicket._make((*row[:4], Ticket(*row[4:])))


def _repeats(link: ChatTicket, session_id: str, target: str | NewTicket) -> bool:
    """Whether linking `session_id` to `target` has been done by `link`."""
    if link.session_id != session_id:
        return False
    if isinstance(target, str):
        return link.ticket_id == target
    unchanged = link.ticket.created_at == link.ticket.updated_at
    return (not target.id_is_chosen or target.id == link.ticket_id) and (
        not unchanged or (target.title, target.status) == (link.ticket.title, link.ticket.status)
    )


async def link(
    db: Database, tenant_id: str, session_id: str, link_id: str, target: str | NewTicket
) -> ChatTicket:
    """Link a session to the ticket of an id, or to a new one, opened in the same transaction."""
    params = {"tenant_id": tenant_id, "id": link_id, "session_id": session_id}

    async def body(transaction: Transaction) -> ChatTicket:
        await sessions.lock(transaction, tenant_id, session_id)
        existing = await transaction.fetch_one(GET_LINK, params, _link)
        if existing is not None:
            if _repeats(existing, session_id, target):
                return existing
            raise errors.AlreadyExistsError.id_taken("chat_ticket", link_id)
        if isinstance(target, str):
            ticket_id = target
        else:
            ticket_id = target.id
            present = await transaction.fetch_one(GET_LINK_OF_SESSION, params, _link)
            if (
                present is not None
                and present.ticket_id == target.id
                and _repeats(present, session_id, target)
            ):
                return present
            await transaction.execute(
                CREATE_TICKET,
                {
                    "tenant_id": tenant_id,
                    "ticket_id": ticket_id,
                    "title": target.title,
                    "status": target.status,
                },
            )
        await transaction.execute(CREATE_LINK, {**params, "ticket_id": ticket_id})
        [created] = await transaction.fetch_all(GET_LINK, params, _link)
        return created

    try:
        return await db.transaction(body, idempotent=True)
    except ConstraintViolation as violation:
        raise _refused(violation, session_id, link_id, target) from violation


def _refused(
    violation: ConstraintViolation, session_id: str, link_id: str, target: str | NewTicket
) -> Exception:
    ticket_id = target if isinstance(target, str) else target.id
    match violation.constraint:
        case "idx_chat_tickets_session":
            return errors.AlreadyExistsError(
                "the session has a ticket already",
                reason="SESSION_HAS_TICKET",
                resource="chat_session",
                resource_id=session_id,
            )
        case "chat_tickets_session_status_check":
            return errors.FailedPreconditionError(
                "the session is archived",
                reason="SESSION_ARCHIVED",
                subject=f"chat_sessions/{session_id}",
            )
        case "fk_chat_tickets_ticket":
            return ticket_not_found(ticket_id)
        case "tickets_pkey":
            return errors.AlreadyExistsError.id_taken("ticket", ticket_id)
        case "chat_tickets_pkey":
            return errors.AlreadyExistsError.id_taken("chat_ticket", link_id)
    return violation


async def get_link(db: Database, tenant_id: str, chat_ticket_id: str) -> ChatTicket:
    found = await db.fetch_one(GET_LINK, {"tenant_id": tenant_id, "id": chat_ticket_id}, _link)
    if found is None:
        raise link_not_found(chat_ticket_id)
    return found


async def link_of_session(db: Database, tenant_id: str, session_id: str) -> ChatTicket | None:
    params = {"tenant_id": tenant_id, "session_id": session_id}
    return await db.fetch_one(GET_LINK_OF_SESSION, params, _link)


async def link_page(
    db: Database,
    tenant_id: str,
    parent_id: str,
    *,
    of_session: bool,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[ChatTicket]:
    """The links of a session or a ticket after (time, id), oldest first."""
    params = {
        "tenant_id": tenant_id,
        "parent_id": parent_id,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
    }
    return await db.fetch_all(
        LIST_LINKS_OF_SESSION if of_session else LIST_LINKS_OF_TICKET, params, _link
    )


async def unlink(db: Database, tenant_id: str, chat_ticket_id: str) -> str:
    """Unlink a session from its ticket; returns the session's id."""

    async def body(transaction: Transaction) -> str:
        params = {"tenant_id": tenant_id, "id": chat_ticket_id}
        session_id = await transaction.fetch_one(LOCK_SESSION_OF_LINK, params, str)
        if session_id is not None:
            session_id = await transaction.fetch_one(DELETE_LINK, params, str)
        if session_id is None:
            raise link_not_found(chat_ticket_id)
        return session_id

    return await db.transaction(body, idempotent=False)


async def get(db: Database, tenant_id: str, ticket_id: str) -> Ticket:
    ticket = await db.fetch_one(GET_TICKET, {"tenant_id": tenant_id, "id": ticket_id}, Ticket)
    if ticket is None:
        raise ticket_not_found(ticket_id)
    return ticket


async def page(
    db: Database,
    tenant_id: str,
    *,
    statuses: list[str] | None,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[Ticket]:
    """The newest tickets before (time, id), newest first."""
    params = {
        "tenant_id": tenant_id,
        "statuses": statuses,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
    }
    return await db.fetch_all(LIST_TICKETS, params, Ticket)


async def update(
    db: Database, tenant_id: str, ticket_id: str, *, title: str | None, status: str | None
) -> Ticket:
    """Change the title, the status or both; what they are already counts as no change."""
    params = {"tenant_id": tenant_id, "id": ticket_id, "title": title, "status": status}
    await db.write(UPDATE_TICKET, params, str, idempotent=True)
    return await get(db, tenant_id, ticket_id)


async def delete(db: Database, tenant_id: str, ticket_id: str) -> None:
    """Delete a ticket that no session is linked to."""
    params = {"tenant_id": tenant_id, "id": ticket_id}
    try:
        deleted = await db.write(DELETE_TICKET, params, str, idempotent=False)
    except ConstraintViolation as violation:
        if violation.constraint != "fk_chat_tickets_ticket":
            raise
        raise errors.FailedPreconditionError(
            "a session is linked to the ticket",
            reason="TICKET_LINKED",
            subject=f"tickets/{ticket_id}",
        ) from violation
    if not deleted:
        raise ticket_not_found(ticket_id)
