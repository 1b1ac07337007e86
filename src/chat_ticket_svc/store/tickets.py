"""Tickets, and chat tickets. A chat ticket links a session to a ticket."""

from datetime import datetime
from typing import Annotated, Any, NamedTuple

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
    external_ref: str | None


REFERENCE_INDEX = "idx_tickets_external_ref"

# A change of a ticket is a change of each of its sessions, in one transaction.
MAX_SESSIONS = 500

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
INSERT INTO tickets (tenant_id, id, title, status, external_ref)
VALUES (%(tenant_id)s, %(id)s::uuid, %(title)s, %(status)s, %(external_ref)s)
"""

CREATE_TICKET_OR_NOTHING = f"""
INSERT INTO tickets AS t (tenant_id, id, title, status, external_ref)
VALUES (%(tenant_id)s, %(id)s::uuid, %(title)s, %(status)s, %(external_ref)s)
ON CONFLICT (tenant_id, id) DO NOTHING
RETURNING {TICKET_COLUMNS}
"""

CREATE_CHAT_TICKET = """
INSERT INTO chat_tickets (tenant_id, id, session_id, ticket_id)
VALUES (%(tenant_id)s, %(id)s::uuid, %(session_id)s::uuid, %(ticket_id)s::uuid)
"""

COUNT_SESSIONS = """
SELECT count(*) FROM chat_tickets
 WHERE tenant_id = %(tenant_id)s AND ticket_id = %(ticket_id)s::uuid
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

GET_TICKET_OF_REFERENCE = f"""
SELECT {TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s AND t.external_ref = %(external_ref)s
"""

LOCK_TICKET_TO_DELETE = f"""
SELECT {TICKET_COLUMNS} FROM tickets t
 WHERE t.tenant_id = %(tenant_id)s AND t.id = %(id)s::uuid
   FOR UPDATE
"""

DELETE_TICKET = """
DELETE FROM tickets WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""


def ticket_not_found(ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("ticket", ticket_id)


def chat_ticket_not_found(chat_ticket_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_ticket", chat_ticket_id)


def _ticket_id_taken(ticket_id: str) -> errors.AlreadyExistsError:
    return errors.AlreadyExistsError.id_taken("ticket", ticket_id)


def too_many_sessions(ticket_id: str, count: int) -> errors.FailedPreconditionError:
    return errors.FailedPreconditionError(
        f"{count:,} sessions are linked to the ticket, at most {MAX_SESSIONS}",
        reason="TICKET_HAS_TOO_MANY_SESSIONS",
        subject=f"tickets/{ticket_id}",
    )


async def external_ref_taken(
    db: Database, tenant_id: str, ticket_id: str, external_ref: str | None
) -> errors.DomainError | None:
    """The error of a write of a ticket that PostgreSQL has refused, as one has this reference.

    None if the ticket itself has it. When its creation is repeated after a REINDEX, PostgreSQL
    compares the references before the ids. When it is changed, another call may have given it the
    reference since.
    """
    params = {"tenant_id": tenant_id, "external_ref": external_ref}
    holder = await db.fetch_by_key(GET_TICKET_OF_REFERENCE, params, Ticket)
    if holder is None:  # deleted or changed since
        return errors.ContentionError()
    if holder.id == ticket_id:
        return None
    return errors.AlreadyExistsError(
        f"ticket {holder.id} has the external_ref already",
        reason="EXTERNAL_REF_TAKEN",
        resource="ticket",
        resource_id=holder.id,
        metadata={"ticket_id": holder.id},
    )


_TICKET_START = ChatTicket._fields.index("ticket")


def chat_ticket_from_row(*row: Any) -> ChatTicket:
    return ChatTicket._make((*row[:_TICKET_START], Ticket(*row[_TICKET_START:])))


def _is_repeat(chat_ticket: ChatTicket, session_id: str, target: str | NewTicket) -> bool:
    """Whether `chat_ticket` is the result of an earlier request to link the session to `target`."""
    if chat_ticket.session_id != session_id:
        return False
    if isinstance(target, str):
        return chat_ticket.ticket_id == target
    if target.has_client_id and target.id != chat_ticket.ticket_id:
        return False
    return _is_created_by(target, chat_ticket.ticket)


def _is_created_by(new: NewTicket, ticket: Ticket) -> bool:
    """Whether a request for this new ticket may have created `ticket`, which may have changed."""
    return ticket.created_at != ticket.updated_at or (
        (new.title, new.status, new.external_ref)
        == (ticket.title, ticket.status, ticket.external_ref)
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
        existing = await transaction.fetch_one(GET_CHAT_TICKET, params, chat_ticket_from_row)
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
                GET_CHAT_TICKET_OF_SESSION, params, chat_ticket_from_row
            )
            if (
                current is not None
                and current.ticket_id == target.id
                and _is_repeat(current, session_id, target)
            ):
                return current
            sessions.check_revision(session.revision, expected_revision)
            if current is not None and current.ticket_id != target.id:
                raise _session_has_ticket(session_id)  # and not that its reference is taken
            await transaction.execute(CREATE_TICKET, {"tenant_id": tenant_id, **target._asdict()})
        link_params = {**params, "ticket_id": ticket_id}
        await transaction.execute(CREATE_CHAT_TICKET, link_params)
        # The insert has locked the ticket, so no other link of it comes meanwhile.
        [count] = await transaction.fetch_all(COUNT_SESSIONS, link_params, int)
        if count > MAX_SESSIONS:
            raise too_many_sessions(ticket_id, count - 1)
        [created] = await transaction.fetch_all(GET_CHAT_TICKET, params, chat_ticket_from_row)
        return created

    try:
        return await db.transaction(body, idempotent=True, locks=locks)
    except ConstraintViolation as violation:
        if violation.constraint == REFERENCE_INDEX and isinstance(target, NewTicket):
            error = await external_ref_taken(db, tenant_id, target.id, target.external_ref)
            raise error or _ticket_id_taken(target.id) from violation
        raise _translated(violation, session_id, chat_ticket_id, target) from violation


def _session_has_ticket(session_id: str) -> errors.AlreadyExistsError:
    return errors.AlreadyExistsError(
        "the session already has a ticket",
        reason="SESSION_HAS_TICKET",
        resource="chat_session",
        resource_id=session_id,
    )


def _translated(
    violation: ConstraintViolation, session_id: str, chat_ticket_id: str, target: str | NewTicket
) -> Exception:
    ticket_id = target if isinstance(target, str) else target.id
    match violation.constraint:
        case "idx_chat_tickets_session":
            return _session_has_ticket(session_id)
        case "chat_tickets_session_status_check":
            return errors.FailedPreconditionError(
                "the session is archived",
                reason="SESSION_ARCHIVED",
                subject=f"chat_sessions/{session_id}",
            )
        case "fk_chat_tickets_ticket":
            return ticket_not_found(ticket_id)
        case "tickets_pkey":
            return _ticket_id_taken(ticket_id)
        case "chat_tickets_pkey":
            return errors.AlreadyExistsError.id_taken("chat_ticket", chat_ticket_id)
    return violation


async def get_chat_ticket(db: Database, tenant_id: str, chat_ticket_id: str) -> ChatTicket:
    params = {"tenant_id": tenant_id, "id": chat_ticket_id}
    chat_ticket = await db.fetch_by_key(GET_CHAT_TICKET, params, chat_ticket_from_row)
    if chat_ticket is None:
        raise chat_ticket_not_found(chat_ticket_id)
    return chat_ticket


async def chat_ticket_of_session(
    transaction: Transaction, tenant_id: str, session_id: str
) -> ChatTicket | None:
    params = {"tenant_id": tenant_id, "session_id": session_id}
    return await transaction.fetch_one(GET_CHAT_TICKET_OF_SESSION, params, chat_ticket_from_row)


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
        chat_ticket_from_row,
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


async def create(db: Database, tenant_id: str, new: NewTicket) -> Ticket:
    """Create a ticket. If a request for the same ticket has created it, return it as it is now."""
    params = {"tenant_id": tenant_id, **new._asdict()}
    try:
        created = await db.write(CREATE_TICKET_OR_NOTHING, params, Ticket, idempotent=True)
    except ConstraintViolation as violation:
        if violation.constraint != REFERENCE_INDEX:
            raise
        error = await external_ref_taken(db, tenant_id, new.id, new.external_ref)
        if error is not None:
            raise error from violation
        created = []
    if created:
        return created[0]
    existing = await db.fetch_by_key(GET_TICKET, params, Ticket, outcome_unknown=True)
    if existing is None or not _is_created_by(new, existing):
        raise _ticket_id_taken(new.id)
    return existing


async def delete(
    db: Database, tenant_id: str, ticket_id: str, etag: int | None, *, allow_missing: bool
) -> None:
    """Delete a ticket. FailedPreconditionError if a session is linked to it.

    With `allow_missing`, does nothing if it does not exist.
    """
    params = {"tenant_id": tenant_id, "id": ticket_id}

    async def body(transaction: Transaction) -> None:
        ticket = await transaction.fetch_one(LOCK_TICKET_TO_DELETE, params, Ticket)
        if ticket is None:
            raise ticket_not_found(ticket_id)
        sessions.check_revision(ticket.revision, etag, "ticket")
        await transaction.execute(DELETE_TICKET, params)

    try:
        with missing_allowed(allow_missing):
            await db.transaction(body, idempotent=allow_missing, locks=[ticket_id])
    except ConstraintViolation as violation:
        if violation.constraint != "fk_chat_tickets_ticket":
            raise
        raise errors.FailedPreconditionError(
            "a session is linked to the ticket",
            reason="TICKET_LINKED",
            subject=f"tickets/{ticket_id}",
        ) from violation
