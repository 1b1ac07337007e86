"""Chat messages, read by sequence and changed under the session's lock; appends.py adds them."""

from typing import Any, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.transaction import Transaction


class Message(NamedTuple):
    """A row of chat_messages with its attachments; `metadata` is JSON text."""

    id: str
    session_id: str
    sequence: int
    revision: int
    role: str
    content: str
    metadata: str | None
    created_at: int
    attachments: tuple[Attachment, ...]


class NewMessage(NamedTuple):
    """A message to append; the id is the client's or ours."""

    id: str
    role: str
    content: str
    metadata: str | None
    attachments: tuple[NewAttachment, ...]


# Rows are cut off where they reach this many bytes, so that a page of large ones stays small.
PAGE_BYTES = 1024 * 1024

ATTACHMENTS = """
    (SELECT json_agg(
                json_build_array(
                    a.id, a.message_id, a.file_url, a.file_name, a.file_type,
                    (extract(epoch FROM a.created_at) * 1000000)::bigint)
                ORDER BY a.created_at, a.id)
       FROM chat_attachments a
      WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id)
"""

COLUMNS = f"""
    m.id::text AS id, m.session_id::text AS session_id, m.sequence, m.revision, m.role, m.content,
    m.metadata::text AS metadata,
    (extract(epoch FROM m.created_at) * 1000000)::bigint AS created_at,
    {ATTACHMENTS} AS attachments
"""

# What a row weighs in a response: its long fields, and something for the short ones.
SIZE = """
    256 + octet_length(content) + coalesce(octet_length(metadata), 0)
        + coalesce(octet_length(attachments::text), 0)
"""

GET = f"""
SELECT {COLUMNS} FROM chat_messages m
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
"""

SET_METADATA = """
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
       AND EXISTS (
           SELECT FROM chat_messages m
            WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
              AND m.metadata::text IS DISTINCT FROM %(metadata)s::jsonb::text)
    RETURNING revision
)
UPDATE chat_messages m
   SET metadata = %(metadata)s::jsonb, revision = session.revision
  FROM session
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
"""

DELETE = """
WITH deleted AS (
    DELETE FROM chat_messages
     WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
    RETURNING session_id
), session AS (
    UPDATE chat_sessions s
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
      FROM deleted
     WHERE s.tenant_id = %(tenant_id)s AND s.id = deleted.session_id
    RETURNING s.id, s.revision
)
INSERT INTO chat_message_tombstones (tenant_id, session_id, message_id, revision)
SELECT %(tenant_id)s, session.id, %(id)s::uuid, session.revision FROM session
RETURNING session_id::text
"""


def not_found(message_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_message", message_id)


def make(*row: Any) -> Message:
    """A Message from COLUMNS."""
    return Message._make((*row[:-1], attachments_of(row[-1])))


def attachments_of(found: list[list[Any]] | None) -> tuple[Attachment, ...]:
    return tuple(Attachment(*columns) for columns in found) if found else ()


async def get(db: Database, tenant_id: str, message_id: str) -> Message:
    message = await db.fetch_one(GET, {"tenant_id": tenant_id, "id": message_id}, make)
    if message is None:
        raise not_found(message_id)
    return message


async def set_metadata(
    db: Database, tenant_id: str, message_id: str, metadata: str | None
) -> Message:
    """Replace the metadata; what it is already counts as no change."""

    async def body(transaction: Transaction) -> Message:
        session_id = await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        await transaction.execute(
            SET_METADATA, {**params, "session_id": session_id, "metadata": metadata}
        )
        message = await transaction.fetch_one(GET, params, make)
        if message is None:  # deleted while we waited for the lock
            raise not_found(message_id)
        return message

    return await db.transaction(body, idempotent=True)


async def delete(db: Database, tenant_id: str, message_id: str) -> str:
    """Delete a message and its attachments, leaving a tombstone; returns its session's id."""

    async def body(transaction: Transaction) -> str:
        await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        session_id = await transaction.fetch_one(DELETE, params, str)
        if session_id is None:
            raise not_found(message_id)
        return session_id

    return await db.transaction(body, idempotent=False)
