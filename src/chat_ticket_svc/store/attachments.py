"""Attachments of chat messages. Each change to one is a change to its message."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.transaction import Transaction


class Attachment(NamedTuple):
    """A row of chat_attachments."""

    id: str
    message_id: str
    file_url: str
    file_name: str
    file_type: str
    created_at: int


class NewAttachment(NamedTuple):
    """An attachment to create; the id is the client's or ours."""

    id: str
    id_is_chosen: bool
    file_url: str
    file_name: str
    file_type: str

    def repeats(self, stored: Attachment) -> bool:
        """Whether creating this again has nothing to do."""
        return (
            (self.file_url, self.file_name, self.file_type)
            == (stored.file_url, stored.file_name, stored.file_type)
        ) and (not self.id_is_chosen or self.id == stored.id)


class Placed(NamedTuple):
    """An attachment with the sequence of its message, which orders those of a session."""

    sequence: int
    attachment: Attachment


COLUMNS = """
    a.id::text, a.message_id::text, a.file_url, a.file_name, a.file_type,
    (extract(epoch FROM a.created_at) * 1000000)::bigint
"""

GET = f"""
SELECT {COLUMNS} FROM chat_attachments a
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
"""

FIRST_TAKEN = """
SELECT id::text FROM chat_attachments
 WHERE tenant_id = %(tenant_id)s AND id = ANY (%(ids)s::uuid[])
 LIMIT 1
"""

COUNT = """
SELECT count(*) FROM chat_attachments
 WHERE tenant_id = %(tenant_id)s AND message_id = %(message_id)s::uuid
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

LOCK_SESSION = """
SELECT s.id::text
  FROM chat_attachments a
  JOIN chat_messages m ON m.tenant_id = a.tenant_id AND m.id = a.message_id
  JOIN chat_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.session_id
 WHERE a.tenant_id = %(tenant_id)s AND a.id = %(id)s::uuid
   FOR UPDATE OF s
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

# The messages in their order, each asked for its attachments, until the page is full: never by
# reading all attachments of the tenant, which is what else the planner may think of.
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


def _repeat(new: NewAttachment, message_id: str, stored: Attachment | None) -> Attachment | None:
    if stored is not None and not (stored.message_id == message_id and new.repeats(stored)):
        raise errors.AlreadyExistsError.id_taken("chat_attachment", new.id)
    return stored


async def repeated(
    db: Database, tenant_id: str, message_id: str, new: NewAttachment
) -> Attachment | None:
    """The stored attachment that `new` repeats, or None when its id does not exist.

    Raises AlreadyExistsError when the id belongs to another attachment.
    """
    stored = await db.fetch_one(GET, {"tenant_id": tenant_id, "id": new.id}, Attachment)
    return _repeat(new, message_id, stored)


async def create(
    db: Database, tenant_id: str, message_id: str, new: NewAttachment, *, limit: int
) -> tuple[Attachment, str]:
    """Add an attachment to a message that has fewer than `limit`; also returns its session's id.

    A repeat with the same id and equal content returns what is stored.
    """

    async def body(transaction: Transaction) -> tuple[Attachment, str]:
        session_id = await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": new.id}
        stored = _repeat(new, message_id, await transaction.fetch_one(GET, params, Attachment))
        if stored is not None:
            return stored, session_id
        params |= {"session_id": session_id, "message_id": message_id}
        [count] = await transaction.fetch_all(COUNT, params, int)
        if count >= limit:
            raise errors.FailedPreconditionError(
                f"the message has {count} attachments, the most it can have",
                reason="TOO_MANY_ATTACHMENTS",
                subject=f"chat_messages/{message_id}",
            )
        params |= {
            "file_url": new.file_url,
            "file_name": new.file_name,
            "file_type": new.file_type,
        }
        created = await transaction.fetch_one(CREATE, params, Attachment)
        if created is None:  # the message was deleted while we waited for the lock
            raise errors.NotFoundError("chat_message", message_id)
        return created, session_id

    try:
        return await db.transaction(body, idempotent=True)
    except ConstraintViolation as violation:
        if violation.constraint != "chat_attachments_pkey":
            raise
        raise errors.AlreadyExistsError.id_taken("chat_attachment", new.id) from violation


async def id_taken(
    db: Database, tenant_id: str, new: Sequence[NewAttachment]
) -> errors.AlreadyExistsError:
    """What to raise when one of `new` has the id of another attachment: names it."""
    params = {"tenant_id": tenant_id, "ids": [attachment.id for attachment in new]}
    taken = await db.fetch_all(FIRST_TAKEN, params, str)
    return errors.AlreadyExistsError.id_taken("chat_attachment", taken[0] if taken else new[0].id)


async def get(db: Database, tenant_id: str, attachment_id: str) -> Attachment:
    attachment = await db.fetch_one(GET, {"tenant_id": tenant_id, "id": attachment_id}, Attachment)
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
) -> list[Placed]:
    """The attachments of a message or a session after (sequence, time, id)."""
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
        lambda sequence, *columns: Placed(sequence, Attachment(*columns)),
    )


async def delete(db: Database, tenant_id: str, attachment_id: str) -> str:
    """Remove an attachment from its message; returns the id of its session."""

    async def body(transaction: Transaction) -> str:
        params = {"tenant_id": tenant_id, "id": attachment_id}
        session_id = await transaction.fetch_one(LOCK_SESSION, params, str)
        if session_id is not None:
            session_id = await transaction.fetch_one(
                DELETE, {**params, "session_id": session_id}, str
            )
        if session_id is None:
            raise not_found(attachment_id)
        return session_id

    return await db.transaction(body, idempotent=False)
