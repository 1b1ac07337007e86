"""Attachments of chat messages. A change to an attachment is a change to its message."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.deletion import missing_allowed
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Attachment(NamedTuple):
    """A row of chat_attachments; the time is in microseconds since the Unix epoch."""

    id: Annotated[str, "a.id::text"]
    message_id: Annotated[str, "a.message_id::text"]
    file_url: Annotated[str, "a.file_url"]
    file_name: Annotated[str, "a.file_name"]
    file_type: Annotated[str, "a.file_type"]
    created_at: Annotated[int, microseconds("a.created_at")]
    updated_at: Annotated[int | None, microseconds("a.updated_at")]  # None until the first change


class NewAttachment(NamedTuple):
    """An attachment to create. The client may assign the id; otherwise the service does."""

    id: str
    has_client_id: bool
    file_url: str
    file_name: str
    file_type: str

    def is_repeat_of(self, stored: Attachment) -> bool:
        """Whether `stored` is the result of an earlier request to create this attachment."""
        return (
            (self.file_name, self.file_type) == (stored.file_name, stored.file_type)
            and (stored.updated_at is not None or self.file_url == stored.file_url)
            and (not self.has_client_id or self.id == stored.id)
        )


class SequencedAttachment(NamedTuple):
    """An attachment and the sequence of its message. Attachments of a session sort by sequence."""

    sequence: int
    attachment: Attachment


COLUMNS = column_list(Attachment)

GET = f"""
SELECT {COLUMNS} FROM chat_attachments a
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
"""

FIND_TAKEN_ID = """
SELECT id::text FROM chat_attachments
 WHERE tenant_id = %(tenant_id)s AND id = ANY (%(ids)s::uuid[])
 LIMIT 1
"""

# Whether the message is redacted, and how many attachments it has.
GET_MESSAGE_STATE = """
SELECT m.redacted,
       (SELECT count(*) FROM chat_attachments a
         WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id)
  FROM chat_messages m
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(message_id)s::uuid
"""

CREATE = """
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
    RETURNING revision, updated_at
), message AS (
    UPDATE chat_messages m
       SET revision = session.revision
      FROM session
     WHERE m.tenant_id = %(tenant_id)s AND m.id = %(message_id)s::uuid
    RETURNING m.id, session.updated_at
)
INSERT INTO chat_attachments AS a
       (tenant_id, id, message_id, file_url, file_name, file_type, created_at)
SELECT %(tenant_id)s, %(id)s::uuid, message.id, %(file_url)s, %(file_name)s, %(file_type)s,
       message.updated_at
  FROM message
RETURNING """ + COLUMNS  # fmt: skip

SESSION = """
SELECT m.session_id::text
  FROM chat_attachments a
  JOIN chat_messages m ON m.tenant_id = a.tenant_id AND m.id = a.message_id
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
"""

LOCK_SESSION = """
SELECT s.id::text
  FROM chat_attachments a
  JOIN chat_messages m ON m.tenant_id = a.tenant_id AND m.id = a.message_id
  JOIN chat_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.session_id
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
   FOR UPDATE OF s
"""

SET_URL = """
WITH message AS (
    SELECT m.id, m.session_id
      FROM chat_attachments a
      JOIN chat_messages m ON m.tenant_id = a.tenant_id AND m.id = a.message_id
     WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid AND a.file_url <> %(file_url)s
), session AS (
    UPDATE chat_sessions s
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
      FROM message
     WHERE s.tenant_id = %(tenant_id)s AND s.id = message.session_id
    RETURNING s.revision, s.updated_at
), updated AS (
    UPDATE chat_messages m
       SET revision = session.revision
      FROM session, message
     WHERE m.tenant_id = %(tenant_id)s AND m.id = message.id
)
UPDATE chat_attachments a
   SET file_url = %(file_url)s, updated_at = session.updated_at
  FROM session
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
"""

DELETE = """
WITH deleted AS (
    DELETE FROM chat_attachments
     WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
    RETURNING message_id
), session AS (
    UPDATE chat_sessions s
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
      FROM deleted
     WHERE s.tenant_id = %(tenant_id)s AND s.id = %(session_id)s::uuid
    RETURNING s.revision, deleted.message_id
)
UPDATE chat_messages m
   SET revision = session.revision
  FROM session
 WHERE m.tenant_id = %(tenant_id)s AND m.id = session.message_id
RETURNING m.session_id::text
"""

LIST_OF_MESSAGE = f"""
SELECT m.sequence, {COLUMNS}
  FROM chat_messages m
  JOIN chat_attachments a ON a.tenant_id = m.tenant_id AND a.message_id = m.id
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(parent_id)s::uuid
   AND (m.sequence, a.created_at, a.id)
       > (%(after_sequence)s, %(after_time)s::timestamptz, %(after_id)s::uuid)
 ORDER BY m.sequence, a.created_at, a.id
 LIMIT %(limit)s
"""

# LATERAL reads the attachments message by message, in order, until the page is full. A plain join
# lets the planner choose to read all attachments of the tenant.
LIST_OF_SESSION = f"""
SELECT m.sequence, {COLUMNS}
  FROM chat_messages m
 CROSS JOIN LATERAL (
      SELECT * FROM chat_attachments
       WHERE tenant_id = m.tenant_id AND message_id = m.id
         AND (m.sequence, created_at, id)
             > (%(after_sequence)s, %(after_time)s::timestamptz, %(after_id)s::uuid)
       ORDER BY created_at, id
       LIMIT %(limit)s) AS a
 WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(parent_id)s::uuid
   AND m.sequence >= %(after_sequence)s
 ORDER BY m.sequence, a.created_at, a.id
 LIMIT %(limit)s
"""


def not_found(attachment_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_attachment", attachment_id)


def _checked_repeat(
    new: NewAttachment, message_id: str, stored: Attachment | None
) -> Attachment | None:
    if stored is not None and not (stored.message_id == message_id and new.is_repeat_of(stored)):
        raise errors.AlreadyExistsError.id_taken("chat_attachment", new.id)
    return stored


async def find_repeat(
    db: Database, tenant_id: str, message_id: str, new: NewAttachment
) -> Attachment | None:
    """The stored attachment that an earlier request for `new` created, or None.

    Raises AlreadyExistsError if the id belongs to a different attachment.
    """
    stored = await db.fetch_by_key(GET, {"tenant_id": tenant_id, "id": new.id}, Attachment)
    return _checked_repeat(new, message_id, stored)


async def create(
    db: Database, tenant_id: str, message_id: str, new: NewAttachment, *, limit: int
) -> tuple[Attachment, str]:
    """Add an attachment to a message; also return the id of the session.

    A repeated request with the same id and content returns the stored attachment. Raises
    FailedPreconditionError if the message already has `limit` attachments.
    """

    async def body(transaction: Transaction) -> tuple[Attachment, str]:
        session_id, _ = await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": new.id}
        existing = await transaction.fetch_one(GET, params, Attachment)
        stored = _checked_repeat(new, message_id, existing)
        if stored is not None:
            return stored, session_id
        params |= {"session_id": session_id, "message_id": message_id}
        found = await transaction.fetch_one(GET_MESSAGE_STATE, params, lambda *row: row)
        if found is None:  # deleted during the wait for the lock
            raise errors.NotFoundError("chat_message", message_id)
        is_redacted, count = found
        if is_redacted:
            raise errors.MessageRedactedError(message_id)
        if count >= limit:
            raise errors.FailedPreconditionError(
                f"the message has {count} attachments, at most {limit} are allowed",
                reason="TOO_MANY_ATTACHMENTS",
                subject=f"chat_messages/{message_id}",
            )
        params |= {
            "file_url": new.file_url,
            "file_name": new.file_name,
            "file_type": new.file_type,
        }
        [created] = await transaction.fetch_all(CREATE, params, Attachment)
        return created, session_id

    session_id = await sessions.of_message(db, tenant_id, message_id)
    try:
        return await db.transaction(body, idempotent=True, locks=[session_id])
    except ConstraintViolation as violation:
        if violation.constraint != "chat_attachments_pkey":
            raise
        raise errors.AlreadyExistsError.id_taken("chat_attachment", new.id) from violation


async def id_taken_error(
    db: Database, tenant_id: str, new: Sequence[NewAttachment]
) -> errors.AlreadyExistsError:
    """The error to raise when the id of one of `new` belongs to another attachment. It names it."""
    params = {"tenant_id": tenant_id, "ids": [attachment.id for attachment in new]}
    taken_ids = await db.fetch_all(FIND_TAKEN_ID, params, str)
    taken_id = taken_ids[0] if taken_ids else new[0].id
    return errors.AlreadyExistsError.id_taken("chat_attachment", taken_id)


async def get(db: Database, tenant_id: str, attachment_id: str) -> Attachment:
    attachment = await db.fetch_by_key(
        GET, {"tenant_id": tenant_id, "id": attachment_id}, Attachment
    )
    if attachment is None:
        raise not_found(attachment_id)
    return attachment


async def page(
    db: Database,
    tenant_id: str,
    parent_id: str,
    *,
    of_session: bool,
    after_sequence: int,
    after_time: datetime,
    after_id: str,
    limit: int,
) -> list[SequencedAttachment]:
    """A page of the attachments of a message or a session, after (sequence, time, id)."""
    params = {
        "tenant_id": tenant_id,
        "parent_id": parent_id,
        "after_sequence": after_sequence,
        "after_time": after_time,
        "after_id": after_id,
        "limit": limit,
    }
    return await db.fetch_all(
        LIST_OF_SESSION if of_session else LIST_OF_MESSAGE,
        params,
        lambda sequence, *columns: SequencedAttachment(sequence, Attachment(*columns)),
    )


async def find_with_url(
    db: Database, tenant_id: str, attachment_id: str, file_url: str
) -> Attachment | None:
    """The attachment, if it has this URL already. Raises NotFoundError if it does not exist."""
    attachment = await get(db, tenant_id, attachment_id)
    return attachment if attachment.file_url == file_url else None


async def set_url(
    db: Database, tenant_id: str, attachment_id: str, file_url: str
) -> tuple[Attachment, str]:
    """Replace the URL; also return the id of the session. An equal URL changes nothing."""
    params = {"tenant_id": tenant_id, "id": attachment_id}

    async def body(transaction: Transaction) -> Attachment:
        await transaction.fetch_one(LOCK_SESSION, params, str)
        await transaction.execute(SET_URL, {**params, "file_url": file_url})
        attachment = await transaction.fetch_one(GET, params, Attachment)
        if attachment is None:  # deleted before the lock
            raise not_found(attachment_id)
        return attachment

    session_id = await _session_of(db, tenant_id, attachment_id)
    return await db.transaction(body, idempotent=True, locks=[session_id]), session_id


async def delete(
    db: Database, tenant_id: str, attachment_id: str, *, allow_missing: bool
) -> str | None:
    """Delete an attachment; return the id of its session.

    With `allow_missing`, returns None if the attachment does not exist.
    """

    params = {"tenant_id": tenant_id, "id": attachment_id}

    async def body(transaction: Transaction) -> None:
        locked = await transaction.fetch_one(LOCK_SESSION, params, str)
        if locked is None:
            raise not_found(attachment_id)
        if await transaction.fetch_one(DELETE, {**params, "session_id": locked}, str) is None:
            raise not_found(attachment_id)

    session_id = None
    with missing_allowed(allow_missing):
        session_id = await _session_of(db, tenant_id, attachment_id)
        await db.transaction(body, idempotent=allow_missing, locks=[session_id])
    return session_id


async def _session_of(db: Database, tenant_id: str, attachment_id: str) -> str:
    params = {"tenant_id": tenant_id, "id": attachment_id}
    session_id = await db.fetch_by_key(SESSION, params, str)
    if session_id is None:
        raise not_found(attachment_id)
    return session_id
