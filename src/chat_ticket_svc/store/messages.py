"""Chat messages: reading, changing, redacting and deleting one. A session's lock orders changes.

append.py and group_commit.py add messages; message_listing.py lists them.
"""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import attachments, sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.deletion import missing_allowed
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

# A patch that leaves nothing of metadata that is not there leaves it so. Metadata is compared as
# text, as 1.0 and 1 are equal as jsonb, but different values to the caller. OFFSET 0 keeps the
# planner from merging a second time for the comparison. `|| '{}'` decompresses long metadata once,
# and not for each member of the patch.
GET_WITH_NEW_METADATA = f"""
SELECT new.metadata, new.metadata IS DISTINCT FROM m.metadata::text, {COLUMNS}
  FROM chat_messages m
 CROSS JOIN LATERAL (
     SELECT (CASE
         WHEN %(patch)s::text IS NULL THEN %(metadata)s::text::jsonb
         WHEN m.metadata IS NULL
         THEN nullif(json_merge_patch(NULL, %(patch)s::text::jsonb), '{{}}')
         ELSE json_merge_patch(m.metadata || '{{}}', %(patch)s::text::jsonb)
     END)::text
     OFFSET 0
 ) AS new (metadata)
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
"""

SET_METADATA = f"""
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + 1, updated_at = next_change_time(updated_at)
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
    RETURNING revision
)
UPDATE chat_messages m
   SET metadata = %(metadata)s::text::jsonb, revision = session.revision
  FROM session
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
RETURNING {COLUMNS}
"""

GET_REVISION = """
SELECT revision FROM chat_messages
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
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
    db: Database,
    tenant_id: str,
    message_id: str,
    metadata: str | None,
    *,
    patch: str | None,
    check_result: Callable[[str], None],
    etag: int | None,
    expected_revision: int | None,
) -> Message:
    """Replace the metadata, or apply `patch` to it, a JSON merge patch.

    Equal metadata changes nothing, not even the revision. `check_result` raises if the metadata
    that a patch results in is not allowed. Raises AbortedError if the message is not at revision
    `etag`, or the session not at `expected_revision`, when they are given. A repeat with
    `expected_revision` finds the revision that it has made.
    """
    params = {"tenant_id": tenant_id, "id": message_id}

    async def body(transaction: Transaction) -> Message:
        session_id, revision = await sessions.lock_of_message(transaction, tenant_id, message_id)
        found = await transaction.fetch_one(
            GET_WITH_NEW_METADATA,
            {**params, "metadata": metadata, "patch": patch},
            lambda new, is_change, *row: (new, is_change, from_row(*row)),
        )
        if found is None:  # deleted during the wait for the lock
            raise not_found(message_id)
        new, is_change, message = found
        if message.redacted:
            raise errors.MessageRedactedError(message_id)
        sessions.check_revision(message.revision, etag, "message")
        is_own_change = not is_change and message.revision - 1 == expected_revision
        if not is_own_change:
            sessions.check_revision(revision, expected_revision)
        if not is_change:
            return message
        if patch is not None and new is not None:
            check_result(new)
        [changed] = await transaction.fetch_all(
            SET_METADATA, {**params, "session_id": session_id, "metadata": new}, from_row
        )
        return changed

    session_id = await sessions.of_message(db, tenant_id, message_id)
    # Repeated after its own success, the call meets a revision that is not its etag.
    return await db.transaction(body, idempotent=etag is None, locks=[session_id])


async def redact(db: Database, tenant_id: str, message_id: str, etag: int | None) -> Message:
    """Replace the content by a mark, and remove the metadata and the attachments.

    A redacted message is returned as it is. Raises AbortedError if `etag` is given and differs from
    the revision of the message.
    """
    params = {"tenant_id": tenant_id, "id": message_id}

    async def body(transaction: Transaction) -> Message:
        session_id, _ = await sessions.lock_of_message(transaction, tenant_id, message_id)
        await transaction.execute(REDACT, {**params, "session_id": session_id, "etag": etag})
        message = await transaction.fetch_one(GET, params, from_row)
        if message is None:  # deleted during the wait for the lock
            raise not_found(message_id)
        if not message.redacted:
            sessions.check_revision(message.revision, etag, "message")
        return message

    session_id = await sessions.of_message(db, tenant_id, message_id)
    return await db.transaction(body, idempotent=True, locks=[session_id])


async def delete(
    db: Database,
    tenant_id: str,
    message_id: str,
    *,
    etag: int | None,
    expected_revision: int | None,
    allow_missing: bool,
) -> str | None:
    """Delete a message and its attachments, and leave a tombstone; return the session's id.

    Raises AbortedError if the message is not at revision `etag`, or the session not at
    `expected_revision`, when they are given. With `allow_missing`, returns None if the message does
    not exist.
    """
    params = {"tenant_id": tenant_id, "id": message_id}

    async def body(transaction: Transaction) -> None:
        _, session_revision = await sessions.lock_of_message(transaction, tenant_id, message_id)
        if etag is not None or expected_revision is not None:
            # A message that is gone is not found, whatever the revision of its session is by now.
            revision = await transaction.fetch_one(GET_REVISION, params, int)
            if revision is None:
                raise not_found(message_id)
            sessions.check_revision(revision, etag, "message")
            sessions.check_revision(session_revision, expected_revision)
        if await transaction.fetch_one(DELETE, params, str) is None:
            raise not_found(message_id)

    session_id = None
    with missing_allowed(allow_missing):
        session_id = await sessions.of_message(db, tenant_id, message_id)
        # Repeated after its own success, the call finds no message, whatever it expects.
        await db.transaction(body, idempotent=allow_missing, locks=[session_id])
    return session_id
