"""Chat sessions."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Session(NamedTuple):
    """A row of chat_sessions; times are microseconds since the Unix epoch."""

    id: str
    tenant_id: str
    status: str
    has_ticket: bool
    revision: int
    created_at: int
    updated_at: int


class Filter(NamedTuple):
    """Which sessions to list; None filters nothing. Ranges include their start, not their end."""

    statuses: list[str] | None
    has_ticket: bool | None
    created_from: datetime | None
    created_to: datetime | None
    updated_from: datetime | None
    updated_to: datetime | None


COLUMNS = """
    chat_sessions.id::text, chat_sessions.tenant_id, chat_sessions.status,
    chat_sessions.has_ticket, chat_sessions.revision,
    (extract(epoch FROM chat_sessions.created_at) * 1000000)::bigint,
    (extract(epoch FROM chat_sessions.updated_at) * 1000000)::bigint
"""

CREATE = f"""
INSERT INTO chat_sessions (tenant_id, id, status)
VALUES (%(tenant_id)s, %(id)s::uuid, %(status)s)
ON CONFLICT (tenant_id, id) DO NOTHING
RETURNING {COLUMNS}
"""

GET = f"""
SELECT {COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

LOCK = f"""
SELECT {COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
   FOR UPDATE
"""

LOCK_OF_MESSAGE = """
SELECT s.id::text
  FROM chat_messages m
  JOIN chat_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.session_id
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(message_id)s::uuid
   FOR UPDATE OF s
"""

SET_STATUS = f"""
UPDATE chat_sessions
   SET status = %(status)s,
       revision = revision + 1,
       updated_at = next_change_time(updated_at)
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING {COLUMNS}
"""

DELETE = """
DELETE FROM chat_sessions WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

# The conditions on the hour follow from those beside them, and are there for its index.
FILTER = """
   AND (%(statuses)s::text[] IS NULL OR status = ANY (%(statuses)s::text[]))
   AND (%(has_ticket)s::boolean IS NULL OR has_ticket = %(has_ticket)s::boolean)
   AND (%(created_from)s::timestamptz IS NULL OR created_at >= %(created_from)s::timestamptz)
   AND (%(created_to)s::timestamptz IS NULL OR created_at < %(created_to)s::timestamptz)
   AND (%(updated_from)s::timestamptz IS NULL
        OR (updated_at >= %(updated_from)s::timestamptz
            AND updated_hour > %(updated_from)s::timestamptz - interval '1 hour'))
   AND (%(updated_to)s::timestamptz IS NULL
        OR (updated_at < %(updated_to)s::timestamptz
            AND updated_hour < %(updated_to)s::timestamptz))
"""

LIST_BY_CREATE_TIME = f"""
SELECT {COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s {FILTER}
   AND (created_at, id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY created_at DESC, chat_sessions.id DESC
 LIMIT %(limit)s
"""

LIST_BY_UPDATE_TIME = f"""
SELECT {COLUMNS} FROM chat_sessions
 WHERE tenant_id = %(tenant_id)s {FILTER}
   AND (updated_at, id) < (%(after_time)s::timestamptz, %(after_id)s::uuid)
   AND updated_hour <= %(after_time)s::timestamptz
 ORDER BY updated_hour DESC, updated_at DESC, chat_sessions.id DESC
 LIMIT %(limit)s
"""

# For ten thousand psycopg takes far longer to write arrays than PostgreSQL to split texts.
REVISIONS = """
SELECT watched.tenant_id, watched.id::text, s.revision
  FROM unnest(string_to_array(%(tenant_ids)s::text, chr(10)),
              string_to_array(%(ids)s::text, chr(10))::uuid[],
              string_to_array(%(revisions)s::text, chr(10))::bigint[])
           AS watched (tenant_id, id, revision)
  LEFT JOIN chat_sessions s ON s.tenant_id = watched.tenant_id AND s.id = watched.id
 WHERE s.revision IS DISTINCT FROM watched.revision
"""


def not_found(session_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_session", session_id)


async def create(db: Database, tenant_id: str, session_id: str, status: str) -> Session:
    """Create a session, or return the one that has the id already."""
    params = {"tenant_id": tenant_id, "id": session_id, "status": status}
    created = await db.write(CREATE, params, Session, idempotent=True)
    if created:
        return created[0]
    existing = await db.fetch_one(GET, params, Session)
    if existing is None:  # deleted in between: its id is not for another session
        raise errors.AlreadyExistsError.id_taken("chat_session", session_id)
    return existing


async def get(db: Database, tenant_id: str, session_id: str) -> Session:
    session = await db.fetch_one(GET, {"tenant_id": tenant_id, "id": session_id}, Session)
    if session is None:
        raise not_found(session_id)
    return session


async def page(
    db: Database,
    tenant_id: str,
    chosen: Filter,
    *,
    by_update_time: bool,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[Session]:
    """The newest sessions before (after_time, after_id), newest first."""
    params = {"after_time": after_time, "after_id": after_id, "limit": limit}
    return await db.fetch_all(
        LIST_BY_UPDATE_TIME if by_update_time else LIST_BY_CREATE_TIME,
        {"tenant_id": tenant_id, **params, **chosen._asdict()},
        Session,
        prepare=False,
    )


async def lock(
    transaction: Transaction, tenant_id: str, session_id: str, etag: int | None = None
) -> Session:
    """Lock a session against every other change to it; the first statement of such a change."""
    session = await transaction.fetch_one(LOCK, {"tenant_id": tenant_id, "id": session_id}, Session)
    if session is None:
        raise not_found(session_id)
    if etag is not None and etag != session.revision:
        raise errors.AbortedError(
            f"the session is at revision {session.revision}, not {etag}", reason="ETAG_MISMATCH"
        )
    return session


async def lock_of_message(transaction: Transaction, tenant_id: str, message_id: str) -> str:
    """Lock the session of a message, like `lock`; returns its id.

    The message may be gone when the lock is had: the statement that follows finds out.
    """
    params = {"tenant_id": tenant_id, "message_id": message_id}
    session_id = await transaction.fetch_one(LOCK_OF_MESSAGE, params, str)
    if session_id is None:
        raise errors.NotFoundError("chat_message", message_id)
    return session_id


async def set_status(
    db: Database, tenant_id: str, session_id: str, status: str, etag: int | None
) -> Session:
    """Change the status; what it is already counts as no change."""

    async def body(transaction: Transaction) -> Session:
        session = await lock(transaction, tenant_id, session_id, etag)
        if session.status == status:
            return session
        params = {"tenant_id": tenant_id, "id": session_id, "status": status}
        [changed] = await transaction.fetch_all(SET_STATUS, params, Session)
        return changed

    return await db.transaction(body, idempotent=etag is None)


async def delete(db: Database, tenant_id: str, session_id: str, etag: int | None) -> None:
    """Delete a session with all it holds, unless its ticket is active."""

    async def body(transaction: Transaction) -> None:
        await lock(transaction, tenant_id, session_id, etag)
        await transaction.execute(DELETE, {"tenant_id": tenant_id, "id": session_id})

    try:
        await db.transaction(body, idempotent=False)
    except ConstraintViolation as violation:
        if violation.constraint != "chat_sessions_ticket_status_check":
            raise
        raise errors.FailedPreconditionError(
            "the session's ticket is open or pending",
            reason="SESSION_HAS_ACTIVE_TICKET",
            subject=f"chat_sessions/{session_id}",
        ) from violation


async def revisions(
    db: Database, known: Sequence[tuple[str, str, int]]
) -> list[tuple[str, str, int | None]]:
    """Of (tenant, session, revision), those whose revision is another now, with that one.

    None where the session is gone.
    """
    params = {
        "tenant_ids": "\n".join(tenant_id for tenant_id, _, _ in known),
        "ids": "\n".join(session_id for _, session_id, _ in known),
        "revisions": "\n".join(str(revision) for _, _, revision in known),
    }
    return await db.fetch_all(REVISIONS, params, lambda *row: row)
