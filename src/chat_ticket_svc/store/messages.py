"""Chat messages: reading, changing, redacting and deleting one. The session's lock orders the changes.

append.py and group_commit.py add messages; message_listing.py lists them.
"""

from typing import Annotated, Any, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import attachments, sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.transaction import Transaction

# A page of messages ends at the message that reaches this size, so that responses stay small.
PAGE_BYTES = 1024 * 1024

ATTACHMENTS = f"""
    (SELECT json_agg(json_build_array({attachments.COLUMNS}) ORDER BY a.created_at, a.id)
       FROM chat_attachments a
      WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id)
"""


class Message(NamedTuple):
    """A row of chat_messages with its attachments.

    `metadata` is JSON text, and the time is in microseconds since the Unix epoch. `state` is None
    if the message is whole.
    """

    id: Annotated[str, "m.id::text"]
    session_id: Annotated[str, "m.session_id::text"]
    sequence: Annotated[int, "m.sequence"]
    revision: Annotated[int, "m.revision"]
    role: Annotated[str, "m.role"]
    content: Annotated[str, "m.content"]
    language_code: Annotated[str | None, "m.language_code"]
    metadata: Annotated[str | None, "m.metadata::text AS metadata"]
    state: Annotated[str | None, "m.state"]
    created_at: Annotated[int, microseconds("m.created_at")]
    author_kind: Annotated[str | None, "m.author_kind"]
    author_id: Annotated[str | None, "m.author_id"]
    redacted: Annotated[bool, "m.redacted"]
    attachments: Annotated[tuple[Attachment, ...], f"{ATTACHMENTS} AS attachments"]


class NewMessage(NamedTuple):
    """A message to append. The client may assign the id; otherwise the service does.

    Only the message that a draft becomes has a state.
    """

    id: str
    role: str
    content: str
    language_code: str | None
    metadata: str | None
    attachments: tuple[NewAttachment, ...]
    author_kind: str | None
    author_id: str | None
    state: str | None = None


COLUMNS = column_list(Message)

# The approximate size of a message in a response: its long fields, and 256 bytes for all others.
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
              AND NOT m.redacted
              AND m.metadata::text IS DISTINCT FROM %(metadata)s::jsonb::text)
    RETURNING revision
)
UPDATE chat_messages m
   SET metadata = %(metadata)s::jsonb, revision = session.revision
  FROM session
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
"""

REDACT = """
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
       AND EXISTS (
           SELECT FROM chat_messages m
            WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
              AND NOT m.redacted
              AND (%(etag)s::bigint IS NULL OR m.revision = %(etag)s::bigint))
    RETURNING revision
), attachment AS (
    DELETE FROM chat_attachments a
     USING session
     WHERE a.tenant_id = %(tenant_id)s AND a.message_id = %(id)s::uuid
)
UPDATE chat_messages m
   SET content = '[redacted]', metadata = NULL, redacted = true, revision = session.revision
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


def from_row(*row: Any) -> Message:
    """A Message from the values of COLUMNS."""
    return Message._make((*row[:-1], attachments_from_json(row[-1])))


def attachments_from_json(rows: list[list[Any]] | None) -> tuple[Attachment, ...]:
    """The attachments from the value of ATTACHMENTS."""
    return tuple(Attachment(*row) for row in rows) if rows else ()


async def get(db: Database, tenant_id: str, message_id: str) -> Message:
    message = await db.fetch_by_key(GET, {"tenant_id": tenant_id, "id": message_id}, from_row)
    if message is None:
        raise not_found(message_id)
    return message


async def set_metadata(
    db: Database, tenant_id: str, message_id: str, metadata: str | None
) -> Message:
    """Replace the metadata. Equal metadata changes nothing, not even the revision."""

    async def body(transaction: Transaction) -> Message:
        session_id = await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        await transaction.execute(
            SET_METADATA, {**params, "session_id": session_id, "metadata": metadata}
        )
        message = await transaction.fetch_one(GET, params, from_row)
        if message is None:  # deleted during the wait for the lock
            raise not_found(message_id)
        if message.redacted:
            raise errors.MessageRedactedError(message_id)
        return message

    session_id = await sessions.of_message(db, tenant_id, message_id)
    return await db.transaction(body, idempotent=True, locks=[session_id])


async def redact(db: Database, tenant_id: str, message_id: str, etag: int | None) -> Message:
    """Replace the content by a mark, and remove the metadata and the attachments.

    A redacted message is returned as it is. Raises AbortedError if `etag` is given and differs from
    the revision of the message.
    """

    async def body(transaction: Transaction) -> Message:
        session_id = await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        await transaction.execute(REDACT, {**params, "session_id": session_id, "etag": etag})
        message = await transaction.fetch_one(GET, params, from_row)
        if message is None:  # deleted during the wait for the lock
            raise not_found(message_id)
        if not message.redacted:
            raise errors.AbortedError(
                f"the message is at revision {message.revision}, not {etag}",
                reason="ETAG_MISMATCH",
                metadata={"revision": str(message.revision)},
            )
        return message

    session_id = await sessions.of_message(db, tenant_id, message_id)
    return await db.transaction(body, idempotent=True, locks=[session_id])


async def delete(db: Database, tenant_id: str, message_id: str) -> str:
    """Delete a message and its attachments, and leave a tombstone; return the session's id."""

    async def body(transaction: Transaction) -> str:
        await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        session_id = await transaction.fetch_one(DELETE, params, str)
        if session_id is None:
            raise not_found(message_id)
        return session_id

    session_id = await sessions.of_message(db, tenant_id, message_id)
    return await db.transaction(body, idempotent=False, locks=[session_id])
