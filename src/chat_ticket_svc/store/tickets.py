"""Tickets, and chat tickets. A chat ticket links a session to a ticket."""

from datetime import datetime
from typing import Annotated, Any, LiteralString, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.deletion import missing_allowed
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Ticket(NamedTuple):
    """A row of tickets; times are in microseconds since the Unix epoch."""

    id: Annotated[str, "t.id::text"]
    tenant_id: Annotated[str, 't.tenant_id COLLATE "C"']
    title: Annotated[str, "t.title"]
    status: Annotated[str, "t.status"]
    created_at: Annotated[int, microseconds("t.created_at")]
    updated_at: Annotated[int, microseconds("t.updated_at")]
    external_ref: Annotated[str | None, "t.external_ref"]
    revision: Annotated[int, "t.revision"]


TICKET_COLUMNS = column_list(Ticket)

STATUSES: tuple[LiteralString, ...] = ("open", "pending", "solved", "closed")


class ChatTicket(NamedTuple):
    """A row of chat_tickets with its ticket."""

    id: Annotated[str, "ct.id::text"]
    session_id: Annotated[str, "ct.session_id::text"]
    ticket_id: Annotated[str, "ct.ticket_id::text"]
    created_at: Annotated[int, microseconds("ct.created_at")]
    ticket: Annotated[Ticket, TICKET_COLUMNS]  # the last field, as it takes several columns


class NewTicket(NamedTuple):
    """A ticket to open. The client may assign the id; otherwise the service does."""

    id: str
    has_client_id: bool
    title: str
    status: str


CHAT_TICKET_COLUMNS = column_list(ChatTicket)

GET_CHAT_TICKET = f"""
SELECT {CHAT_TICKET_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.id = %(id)s::uuid
"""

GET_CHAT_TICKET_OF_SESSION = f"""
SELECT {CHAT_TICKET_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = %(session_id)s::uuid
"""

LIST_CHAT_TICKETS_OF_SESSION = f"""
SELECT {CHAT_TICKET_COLUMNS}
  FROM chat_tickets ct JOIN tickets t ON t.tenant_id = ct.tenant_id AND t.id = ct.ticket_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.session_id = %(parent_id)s::uuid
   AND (ct.created_at, ct.id) > (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY ct.created_at, ct.id
 LIMIT %(limit)s
"""

LIST_CHAT_TICKETS_OF_TICKET = f"""
SELECT {CHAT_TICKET_COLUMNS}
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

CREATE_CHAT_TICKET = """
INSERT INTO chat_tickets (tenant_id, id, session_id, ticket_id)
VALUES (%(tenant_id)s, %(id)s::uuid, %(session_id)s::uuid, %(ticket_id)s::uuid)
"""

SESSION_OF_CHAT_TICKET = """
SELECT session_id::text FROM chat_tickets
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

LOCK_SESSION_OF_CHAT_TICKET = """
SELECT s.id::text
  FROM chat_tickets ct
  JOIN chat_sessions s ON s.tenant_id = ct.tenant_id AND s.id = ct.session_id
 WHERE ct.tenant_id = %(tenant_id)s AND ct.id = %(id)s::uuid
   FOR UPDATE OF s
"""

DELETE_CHAT_TICKET = """
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
   AND (t.created_at, t.id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY t.created_at DESC, t.id DESC
 LIMIT %(limit)s
"""

# The page of each status is a range of an index. In the order of all tickets, PostgreSQL reads all
# of them to find those of a rare status. The statuses are constants, and the statement is not
# prepared, so that the planner knows which are rare, and drops those that are not wanted.
_PAGES_OF_STATUSES: list[LiteralString] = [
    f"""(
SELECT * FROM tickets
 WHERE tenant_id = %(tenant_id)s AND status = '{status}'
   AND '{status}' = ANY (%(statuses)s::text[])
   AND (created_at, id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY created_at DESC, id DESC
 LIMIT %(limit)s)"""
    for status in STATUSES
]
LIST_TICKETS_OF_STATUSES = f"""
SELECT {TICKET_COLUMNS} FROM ({" UNION ALL ".join(_PAGES_OF_STATUSES)}) AS t
 ORDER BY t.created_at DESC, t.id DESC
 LIMIT %(limit)s
"""

# One statement, so that the row it returns is the one it wrote: another update, or the deletion of
# the ticket, comes before it or after it. Equal values leave the row as it is, its time included.
UPDATE_TICKET = f"""
UPDATE tickets t
   SET title = coalesce(%(title)s, title),
       status = coalesce(%(status)s, status),
       updated_at = CASE
           WHEN (title, status)
                IS DISTINCT FROM (coalesce(%(title)s, title), coalesce(%(status)s, status))
           THEN next_change_time(updated_at)
           ELSE updated_at
       END
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING {TICKET_COLUMNS}
"""

DELETE_TICKET = """
DELETE FROM tickets
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING id::text
"""


def ticket_not_found(ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("ticket", ticket_id)


def chat_ticket_not_found(chat_ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_ticket", chat_ticket_id)


_TICKET_START = ChatTicket._fields.index("ticket")


def _chat_ticket_from_row(*row: Any) -> ChatTicket:
    return ChatTicket._make((*row[:_TICKET_START], Ticket(*row[_TICKET_START:])))


def _is_repeat(chat_ticket: ChatTicket, session_id: str, target: str | NewTicket) -> bool:
    """Whether `chat_ticket` is the result of an earlier request to link the session to `target`."""
    if chat_ticket.session_id != session_id:
        return False
    if isinstance(target, str):
        return chat_ticket.ticket_id == target
    is_unchanged = chat_ticket.ticket.created_at == chat_ticket.ticket.updated_at
    return (not target.has_client_id or target.id == chat_ticket.ticket_id) and (
        not is_unchanged
        or (target.title, target.status) == (chat_ticket.ticket.title, chat_ticket.ticket.status)
    )


async def link(
    db: Database,
    tenant_id: str,
    session_id: str,
    chat_ticket_id: str,
    target: str | NewTicket,
    expected_revision: int | None,
) -> ChatTicket:
    """Link a session to an existing ticket, given by id, or to a new one.

    A new ticket is opened in the same transaction. Raises AbortedError if the session is not at
    `expected_revision`, when that is given, unless this is a repeat of what has linked it.
    """
    params = {"tenant_id": tenant_id, "id": chat_ticket_id, "session_id": session_id}
    # A new ticket is locked by nobody else.
    locks = [session_id, target] if isinstance(target, str) else [session_id]

    async def body(transaction: Transaction) -> ChatTicket:
        session = await sessions.lock(transaction, tenant_id, session_id)
        existing = await transaction.fetch_one(GET_CHAT_TICKET, params, _chat_ticket_from_row)
        if existing is not None:
            if _is_repeat(existing, session_id, target):
                return existing
            raise errors.AlreadyExistsError.id_taken("chat_ticket", chat_ticket_id)
        if isinstance(target, str):
            sessions.check_revision(session.revision, expected_revision)
            ticket_id = target
        else:
            ticket_id = target.id
            current = await transaction.fetch_one(
                GET_CHAT_TICKET_OF_SESSION, params, _chat_ticket_from_row
            )
            if (
                current is not None
                and current.ticket_id == target.id
                and _is_repeat(current, session_id, target)
            ):
                return current
            sessions.check_revision(session.revision, expected_revision)
            await transaction.execute(
                CREATE_TICKET,
                {
                    "tenant_id": tenant_id,
                    "ticket_id": ticket_id,
                    "title": target.title,
                    "status": target.status,
                },
            )
        await transaction.execute(CREATE_CHAT_TICKET, {**params, "ticket_id": ticket_id})
        [created] = await transaction.fetch_all(GET_CHAT_TICKET, params, _chat_ticket_from_row)
        return created

    try:
        return await db.transaction(body, idempotent=True, locks=locks)
    except ConstraintViolation as violation:
        raise _translated(violation, session_id, chat_ticket_id, target) from violation


def _translated(
    violation: ConstraintViolation, session_id: str, chat_ticket_id: str, target: str | NewTicket
) -> Exception:
    ticket_id = target if isinstance(target, str) else target.id
    match violation.constraint:
        case "idx_chat_tickets_session":
            return errors.AlreadyExistsError(
                "the session already has a ticket",
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
            return errors.AlreadyExistsError.id_taken("chat_ticket", chat_ticket_id)
    return violation


async def get_chat_ticket(db: Database, tenant_id: str, chat_ticket_id: str) -> ChatTicket:
    params = {"tenant_id": tenant_id, "id": chat_ticket_id}
    chat_ticket = await db.fetch_by_key(GET_CHAT_TICKET, params, _chat_ticket_from_row)
    if chat_ticket is None:
        raise chat_ticket_not_found(chat_ticket_id)
    return chat_ticket


async def chat_ticket_of_session(
    transaction: Transaction, tenant_id: str, session_id: str
) -> ChatTicket | None:
    params = {"tenant_id": tenant_id, "session_id": session_id}
    return await transaction.fetch_one(GET_CHAT_TICKET_OF_SESSION, params, _chat_ticket_from_row)


async def chat_ticket_page(
    db: Database,
    tenant_id: str,
    parent_id: str,
    *,
    of_session: bool,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[ChatTicket]:
    """A page of the chat tickets of a session or a ticket, oldest first, after (time, id)."""
    params = {
        "tenant_id": tenant_id,
        "parent_id": parent_id,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
    }
    return await db.fetch_all(
        LIST_CHAT_TICKETS_OF_SESSION if of_session else LIST_CHAT_TICKETS_OF_TICKET,
        params,
        _chat_ticket_from_row,
    )


async def unlink(
    db: Database, tenant_id: str, chat_ticket_id: str, *, allow_missing: bool
) -> str | None:
    """Unlink a session from its ticket; return the session's id.

    With `allow_missing`, returns None if the link does not exist.
    """

    params = {"tenant_id": tenant_id, "id": chat_ticket_id}

    async def body(transaction: Transaction) -> None:
        unlinked = await transaction.fetch_one(LOCK_SESSION_OF_CHAT_TICKET, params, str)
        if unlinked is not None:
            unlinked = await transaction.fetch_one(DELETE_CHAT_TICKET, params, str)
        if unlinked is None:
            raise chat_ticket_not_found(chat_ticket_id)

    session_id = None
    with missing_allowed(allow_missing):
        session_id = await db.fetch_by_key(SESSION_OF_CHAT_TICKET, params, str)
        if session_id is None:
            raise chat_ticket_not_found(chat_ticket_id)
        await db.transaction(body, idempotent=allow_missing, locks=[session_id])
    return session_id


async def get(db: Database, tenant_id: str, ticket_id: str) -> Ticket:
    ticket = await db.fetch_by_key(GET_TICKET, {"tenant_id": tenant_id, "id": ticket_id}, Ticket)
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
    """A page of tickets, newest first, that starts after (time, id) in this order."""
    params = {
        "tenant_id": tenant_id,
        "statuses": statuses,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
    }
    return await db.fetch_all(
        LIST_TICKETS if statuses is None else LIST_TICKETS_OF_STATUSES,
        params,
        Ticket,
        prepare=None if statuses is None else False,
    )


async def update(
    db: Database, tenant_id: str, ticket_id: str, *, title: str | None, status: str | None
) -> Ticket:
    """Set the title, the status, or both. Setting the current values changes nothing."""
    params = {"tenant_id": tenant_id, "id": ticket_id, "title": title, "status": status}
    updated = await db.write(UPDATE_TICKET, params, Ticket, idempotent=True, locks=[ticket_id])
    if not updated:
        raise ticket_not_found(ticket_id)
    return updated[0]


async def delete(db: Database, tenant_id: str, ticket_id: str, *, allow_missing: bool) -> None:
    """Delete a ticket. FailedPreconditionError if a session is linked to it.

    With `allow_missing`, does nothing if it does not exist.
    """
    params = {"tenant_id": tenant_id, "id": ticket_id}
    try:
        deleted = await db.write(
            DELETE_TICKET, params, str, idempotent=allow_missing, locks=[ticket_id]
        )
    except ConstraintViolation as violation:
        if violation.constraint != "fk_chat_tickets_ticket":
            raise
        raise errors.FailedPreconditionError(
            "a session is linked to the ticket",
            reason="TICKET_LINKED",
            subject=f"tickets/{ticket_id}",
        ) from violation
    with missing_allowed(allow_missing):
        if not deleted:
            raise ticket_not_found(ticket_id)
