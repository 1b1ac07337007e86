"""Chat sessions."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.deletion import missing_allowed
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Session(NamedTuple):
    """A row of chat_sessions; times are microseconds since the Unix epoch."""

    id: Annotated[str, "chat_sessions.id::text"]
    tenant_id: Annotated[str, 'chat_sessions.tenant_id COLLATE "C"']
    status: Annotated[str, "chat_sessions.status"]
    has_ticket: Annotated[bool, "chat_sessions.has_ticket"]
    revision: Annotated[int, "chat_sessions.revision"]
    created_at: Annotated[int, microseconds("chat_sessions.created_at")]
    updated_at: Annotated[int, microseconds("chat_sessions.updated_at")]
    user_id: Annotated[str | None, "chat_sessions.user_id"]
    title: Annotated[str | None, "chat_sessions.title"]
    labels: Annotated[str | None, "chat_sessions.labels::text"]  # a JSON object
    epoch: Annotated[str, "chat_sessions.epoch"]  # see epochs.py


class WatchedCursor(NamedTuple):
    """How much of a session all its watchers have received."""

    tenant_id: str
    session_id: str
    revision: int
    epoch: str


class LargeSession(Exception):  # noqa: N818 - a signal to SessionDeleter, never to a caller
    """The session may have so many messages that its deletion takes seconds."""


class NewSession(NamedTuple):
    """A session to create."""

    id: str
    status: str
    user_id: str | None
    title: str | None
    labels: Mapping[str, str]


class Update(NamedTuple):
    """What to change of a session. None changes nothing.

    An empty `title` removes the title. `labels` replaces all labels. `changed_labels` sets single
    labels, or removes those whose value is None.
    """

    status: str | None
    title: str | None
    labels: Mapping[str, str] | None
    changed_labels: Mapping[str, str | None]


COLUMNS = column_list(Session)

# A session has no more messages than revisions. The deletion of so many takes about a second.
LARGE_REVISION = 100_000

MAX_LABELS = 32

CREATE = f"""
INSERT INTO chat_sessions (tenant_id, id, status, user_id, title, labels)
VALUES (%(tenant_id)s, %(id)s::uuid, %(status)s, %(user_id)s, %(title)s, %(labels)s::jsonb)
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

OF_MESSAGE = """
SELECT session_id::text FROM chat_messages
 WHERE tenant_id = %(tenant_id)s AND id = %(message_id)s::uuid
"""

LOCK_OF_MESSAGE = """
SELECT s.id::text, s.revision
  FROM chat_messages m
  JOIN chat_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.session_id
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(message_id)s::uuid
   FOR UPDATE OF s
"""

UPDATE = f"""
UPDATE chat_sessions
   SET status = %(status)s,
       title = %(title)s,
       labels = %(labels)s::jsonb,
       revision = revision + 1,
       updated_at = next_change_time(updated_at)
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
RETURNING {COLUMNS}
"""

# Until the transaction ends.
NO_STATEMENT_TIMEOUT = "SELECT set_config('statement_timeout', '0', true)"

DELETE = """
DELETE FROM chat_sessions WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

# For 10,000 sessions, psycopg takes far longer to encode arrays than PostgreSQL to split strings.
FIND_MOVED = """
SELECT watched.tenant_id, watched.id::text, s.revision, s.epoch
  FROM unnest(string_to_array(%(tenant_ids)s::text, chr(10)),
              string_to_array(%(ids)s::text, chr(10))::uuid[],
              string_to_array(%(revisions)s::text, chr(10))::bigint[],
              string_to_array(%(epochs)s::text, chr(10)))
           AS watched (tenant_id, id, revision, epoch)
  LEFT JOIN chat_sessions s ON s.tenant_id = watched.tenant_id AND s.id = watched.id
 WHERE s.revision IS DISTINCT FROM watched.revision OR s.epoch IS DISTINCT FROM watched.epoch
"""


def not_found(session_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_session", session_id)


def _deleted(session_id: str) -> errors.AlreadyExistsError:
    return errors.AlreadyExistsError(
        f"id {session_id} belongs to a deleted chat session",
        reason="CHAT_SESSION_DELETED",
        resource="chat_session",
        resource_id=session_id,
    )


async def create(db: Database, tenant_id: str, new: NewSession) -> Session:
    """Create a session. If the id exists, return the session that has it, if it is this user's.

    Raises AlreadyExistsError if it belonged to a session that was deleted.
    """
    params = {"tenant_id": tenant_id, **new._asdict(), "labels": _json(new.labels)}
    try:
        created = await db.write(CREATE, params, Session, idempotent=True)
    except ConstraintViolation as violation:
        if violation.constraint != "chat_session_tombstones_pkey":
            raise
        raise _deleted(new.id) from violation
    if created:
        return created[0]
    existing = await db.fetch_by_key(GET, params, Session, outcome_unknown=True)
    if existing is None:  # deleted between the two statements
        raise _deleted(new.id)
    if existing.user_id != new.user_id:
        raise errors.AlreadyExistsError.id_taken("chat_session", new.id)
    return existing


async def get(db: Database, tenant_id: str, session_id: str) -> Session:
    session = await db.fetch_by_key(GET, {"tenant_id": tenant_id, "id": session_id}, Session)
    if session is None:
        raise not_found(session_id)
    return session


async def get_in(transaction: Transaction, tenant_id: str, session_id: str) -> Session:
    """As `get`, as the transaction sees it."""
    params = {"tenant_id": tenant_id, "id": session_id}
    session = await transaction.fetch_one(GET, params, Session)
    if session is None:
        raise not_found(session_id)
    return session


async def lock(
    transaction: Transaction, tenant_id: str, session_id: str, etag: int | None = None
) -> Session:
    """Lock a session until the transaction ends.

    Every transaction that changes a session or its messages starts with this statement. That orders
    the changes and prevents deadlocks between them. Raises AbortedError if `etag` is given and
    differs from the current revision.
    """
    session = await transaction.fetch_one(LOCK, {"tenant_id": tenant_id, "id": session_id}, Session)
    if session is None:
        raise not_found(session_id)
    check_revision(session.revision, etag)
    return session


def check_revision(revision: int, expected: int | None, entity: str = "session") -> None:
    """Raise EtagMismatchError if the session, or `entity`, is expected at another revision."""
    if expected is not None and expected != revision:
        raise errors.EtagMismatchError(entity, revision, expected)


async def of_message(db: Database, tenant_id: str, message_id: str) -> str:
    """The id of the session of a message. It never changes."""
    params = {"tenant_id": tenant_id, "message_id": message_id}
    session_id = await db.fetch_by_key(OF_MESSAGE, params, str)
    if session_id is None:
        raise errors.NotFoundError("chat_message", message_id)
    return session_id


async def lock_of_message(
    transaction: Transaction, tenant_id: str, message_id: str
) -> tuple[str, int]:
    """Lock the session of a message, like `lock`, and return the session's id and revision.

    The message may be deleted while this waits for the lock. The next statement must check that.
    """
    params = {"tenant_id": tenant_id, "message_id": message_id}
    locked = await transaction.fetch_one(LOCK_OF_MESSAGE, params, lambda *row: row)
    if locked is None:
        raise errors.NotFoundError("chat_message", message_id)
    return locked


async def update(
    db: Database, tenant_id: str, session_id: str, changes: Update, etag: int | None
) -> Session:
    """Change a session in one revision. Setting the current values changes nothing."""

    async def body(transaction: Transaction) -> Session:
        session = await lock(transaction, tenant_id, session_id, etag)
        old_labels: dict[str, str] = json.loads(session.labels or "{}")
        labels = _changed_labels(old_labels, changes)
        if len(labels) > MAX_LABELS:
            raise errors.FailedPreconditionError(
                f"the session would have {len(labels)} labels, at most {MAX_LABELS}",
                reason="TOO_MANY_LABELS",
                subject=f"chat_sessions/{session_id}",
            )
        status = session.status if changes.status is None else changes.status
        title = session.title if changes.title is None else changes.title or None
        if (status, title, labels) == (session.status, session.title, old_labels):
            return session
        [changed] = await transaction.fetch_all(
            UPDATE,
            {
                "tenant_id": tenant_id,
                "id": session_id,
                "status": status,
                "title": title,
                "labels": _json(labels),
            },
            Session,
        )
        return changed

    return await db.transaction(body, idempotent=etag is None, locks=[session_id])


def _changed_labels(labels: Mapping[str, str], changes: Update) -> dict[str, str]:
    replaced = labels if changes.labels is None else changes.labels
    merged = {**replaced, **changes.changed_labels}
    return {key: value for key, value in merged.items() if value is not None}


def _json(labels: Mapping[str, str]) -> str | None:
    """The labels as they are stored: NULL means none."""
    return json.dumps(dict(labels)) if labels else None


async def delete(
    db: Database,
    tenant_id: str,
    session_id: str,
    etag: int | None,
    *,
    allow_missing: bool,
    may_be_large: bool = False,
) -> None:
    """Delete a session and its contents, unless its ticket is open or pending.

    With `allow_missing`, does nothing if it does not exist.

    Raises LargeSession, and deletes nothing, if it is large. With `may_be_large`, deletes it
    without a statement timeout.
    """

    async def body(transaction: Transaction) -> None:
        session = await lock(transaction, tenant_id, session_id, etag)
        if may_be_large:
            await transaction.execute(NO_STATEMENT_TIMEOUT, {})
        elif session.revision > LARGE_REVISION:
            raise LargeSession
        await transaction.execute(DELETE, {"tenant_id": tenant_id, "id": session_id})

    try:
        with missing_allowed(allow_missing):
            await db.transaction(body, idempotent=allow_missing, locks=[session_id])
    except ConstraintViolation as violation:
        if violation.constraint != "chat_sessions_ticket_status_check":
            raise
        raise errors.FailedPreconditionError(
            "the session's ticket is open or pending",
            reason="SESSION_HAS_ACTIVE_TICKET",
            subject=f"chat_sessions/{session_id}",
        ) from violation


async def find_moved(
    db: Database, cursors: Sequence[WatchedCursor]
) -> list[tuple[str, str, int | None, str | None]]:
    """The (tenant, session, current revision, current epoch) of the cursors that are out of date.

    The current revision and epoch of a deleted session are None.
    """
    params = {
        "tenant_ids": "\n".join(cursor.tenant_id for cursor in cursors),
        "ids": "\n".join(cursor.session_id for cursor in cursors),
        "revisions": "\n".join(str(cursor.revision) for cursor in cursors),
        "epochs": "\n".join(cursor.epoch for cursor in cursors),
    }
    return await db.fetch_all(FIND_MOVED, params, lambda *row: row)
