"""Chat messages: appended under the session's lock, read by sequence."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import attachments, sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.database import ConstraintViolation, Database, Transaction


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


class Page(NamedTuple):
    """Some messages in order, and whether there may be more behind them."""

    messages: list[Message]
    more: bool


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

# One statement, so one transaction: the session's update is the lock, and gives every message its
# revision and every row a microsecond of its own. Nothing happens when an id exists already.
APPEND = """
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + %(count)s::integer,
           updated_at = next_change_time(updated_at)
               + (%(ticks)s::integer - 1) * interval '1 microsecond'
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
       AND NOT EXISTS (
           SELECT FROM chat_messages
            WHERE tenant_id = %(tenant_id)s AND id = ANY (%(ids)s::uuid[]))
    RETURNING revision - %(count)s::integer AS revision,
              updated_at - (%(ticks)s::integer - 1) * interval '1 microsecond' AS time
), message AS (
    INSERT INTO chat_messages
           (tenant_id, id, session_id, sequence, revision, role, content, metadata, created_at)
    SELECT %(tenant_id)s, new.id, %(session_id)s::uuid,
           session.revision + new.ordinal, session.revision + new.ordinal,
           new.role, new.content, new.metadata::jsonb,
           session.time + new.tick * interval '1 microsecond'
      FROM session,
           unnest(%(ids)s::uuid[], %(roles)s::text[], %(contents)s::text[],
                  %(metadatas)s::text[], %(message_ticks)s::integer[])
               WITH ORDINALITY AS new (id, role, content, metadata, tick, ordinal)
    RETURNING sequence, metadata::text AS metadata,
              (extract(epoch FROM created_at) * 1000000)::bigint AS created_at
), attachment AS (
    INSERT INTO chat_attachments
           (tenant_id, id, message_id, file_url, file_name, file_type, created_at)
    SELECT %(tenant_id)s, new.id, new.message_id, new.file_url, new.file_name, new.file_type,
           session.time + new.tick * interval '1 microsecond'
      FROM session,
           unnest(%(attachment_ids)s::uuid[], %(attachment_message_ids)s::uuid[],
                  %(file_urls)s::text[], %(file_names)s::text[], %(file_types)s::text[],
                  %(attachment_ticks)s::integer[])
               AS new (id, message_id, file_url, file_name, file_type, tick)
)
SELECT sequence, metadata, created_at FROM message ORDER BY sequence
"""

# The constraints that refuse an id, also when a concurrent call was the first to use it.
TAKEN = {"chat_messages_pkey", "chat_message_tombstones_pkey", "chat_attachments_pkey"}

# Metadata is compared as jsonb prints it: 1.0 and 1 are equal as jsonb, and different as sent.
REPEATED = f"""
SELECT m.id IS NOT NULL, t.message_id IS NOT NULL,
       m.session_id = %(session_id)s::uuid AND m.role = new.role AND m.content = new.content
           AND (m.revision > m.sequence
                OR m.metadata::text IS NOT DISTINCT FROM new.metadata::jsonb::text),
       m.sequence, m.revision, m.metadata::text,
       (extract(epoch FROM m.created_at) * 1000000)::bigint, {ATTACHMENTS}
  FROM unnest(%(ids)s::uuid[], %(roles)s::text[], %(contents)s::text[], %(metadatas)s::text[])
           WITH ORDINALITY AS new (id, role, content, metadata, ordinal)
  LEFT JOIN chat_messages m ON m.tenant_id = %(tenant_id)s AND m.id = new.id
  LEFT JOIN chat_message_tombstones t ON t.tenant_id = %(tenant_id)s AND t.message_id = new.id
 ORDER BY new.ordinal
"""

GET = f"""
SELECT {COLUMNS} FROM chat_messages m
 WHERE m.tenant_id = %(tenant_id)s AND m.id = %(id)s::uuid
"""

# No row at all says that the session is gone, a row without a message that there is none left.
LIST_ASC = f"""
SELECT page.* FROM chat_sessions s
  LEFT JOIN LATERAL (
      SELECT id, session_id, sequence, revision, role, content, metadata, created_at, attachments,
             count(*) OVER () AS fetched, {SIZE} AS size,
             sum({SIZE}) OVER (ORDER BY sequence) AS total
        FROM (SELECT {COLUMNS} FROM chat_messages m
               WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
                 AND m.sequence > %(after)s AND m.sequence < %(before)s
                 AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
               ORDER BY m.sequence LIMIT %(limit)s) AS found
  ) AS page ON page.total <= %(bytes)s OR page.total = page.size
 WHERE s.tenant_id = %(tenant_id)s AND s.id = %(session_id)s::uuid
 ORDER BY page.sequence
"""

LIST_DESC = f"""
SELECT page.* FROM chat_sessions s
  LEFT JOIN LATERAL (
      SELECT id, session_id, sequence, revision, role, content, metadata, created_at, attachments,
             count(*) OVER () AS fetched, {SIZE} AS size,
             sum({SIZE}) OVER (ORDER BY sequence DESC) AS total
        FROM (SELECT {COLUMNS} FROM chat_messages m
               WHERE m.tenant_id = %(tenant_id)s AND m.session_id = %(session_id)s::uuid
                 AND m.sequence > %(after)s AND m.sequence < %(before)s
                 AND (%(roles)s::text[] IS NULL OR m.role = ANY (%(roles)s::text[]))
               ORDER BY m.sequence DESC LIMIT %(limit)s) AS found
  ) AS page ON page.total <= %(bytes)s OR page.total = page.size
 WHERE s.tenant_id = %(tenant_id)s AND s.id = %(session_id)s::uuid
 ORDER BY page.sequence DESC
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
    return Message._make((*row[:-1], _attachments(row[-1])))


def _attachments(found: list[list[Any]] | None) -> tuple[Attachment, ...]:
    return tuple(Attachment(*columns) for columns in found) if found else ()


def _params(tenant_id: str, session_id: str, new: Sequence[NewMessage]) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "ids": [message.id for message in new],
        "roles": [message.role for message in new],
        "contents": [message.content for message in new],
        "metadatas": [message.metadata for message in new],
    }


async def append(
    db: Database, tenant_id: str, session_id: str, new: Sequence[NewMessage]
) -> list[Message]:
    """Append messages to a session, all or none, in their order, and return them as stored.

    A repeat with the same ids and equal content returns what is stored.
    """
    params = _params(tenant_id, session_id, new)
    ticks = 0
    message_ticks: list[int] = []
    attached: list[tuple[NewAttachment, str, int]] = []
    for message in new:
        message_ticks.append(ticks)
        for attachment in message.attachments:
            ticks += 1
            attached.append((attachment, message.id, ticks))
        ticks += 1
    params |= {
        "count": len(new),
        "ticks": ticks,
        "message_ticks": message_ticks,
        "attachment_ids": [attachment.id for attachment, _, _ in attached],
        "attachment_message_ids": [message_id for _, message_id, _ in attached],
        "file_urls": [attachment.file_url for attachment, _, _ in attached],
        "file_names": [attachment.file_name for attachment, _, _ in attached],
        "file_types": [attachment.file_type for attachment, _, _ in attached],
        "attachment_ticks": [tick for _, _, tick in attached],
    }
    refused = None
    try:
        rows = await db.write(APPEND, params, lambda *row: row, repeatable=True)
        if rows:
            return [
                _stored(session_id, message, *row) for message, row in zip(new, rows, strict=True)
            ]
    except ConstraintViolation as violation:
        if violation.constraint not in TAKEN:
            raise
        refused = violation
    repeat = await repeated(db, tenant_id, session_id, new)
    if repeat is not None:
        return repeat
    if refused is not None and refused.constraint == "chat_attachments_pkey":
        new_attachments = [attachment for attachment, _, _ in attached]
        raise await attachments.id_taken(db, tenant_id, new_attachments) from refused
    await sessions.get(db, tenant_id, session_id)
    # An id existed when the statement looked and is gone: its session was deleted in between.
    raise errors.ContentionError from refused


def _stored(
    session_id: str, new: NewMessage, sequence: int, metadata: str | None, created_at: int
) -> Message:
    stored = tuple(
        Attachment(a.id, new.id, a.file_url, a.file_name, a.file_type, created_at + tick)
        for tick, a in enumerate(new.attachments, start=1)
    )
    return Message(
        new.id, session_id, sequence, sequence, new.role, new.content, metadata, created_at,
        stored,
    )  # fmt: skip


async def repeated(
    db: Database, tenant_id: str, session_id: str, new: Sequence[NewMessage]
) -> list[Message] | None:
    """The stored messages that `new` repeats, or None when not one of its ids exists.

    Raises AlreadyExistsError, naming the index, when an id exists and this is not a repeat.
    """
    rows = await db.rows(REPEATED, _params(tenant_id, session_id, new), lambda *row: row)
    stored: list[Message] = []
    taken: int | None = None
    for index, (message, row) in enumerate(zip(new, rows, strict=True)):
        exists, tombstoned, same, sequence, revision, metadata, created_at, files = row
        existing = _attachments(files)
        if tombstoned or (exists and not same):
            taken = index
            break
        if exists:
            if revision == sequence and not _same_attachments(message.attachments, existing):
                taken = index
                break
            stored.append(
                Message(
                    message.id, session_id, sequence, revision, message.role, message.content,
                    metadata, created_at, existing,
                )
            )  # fmt: skip
    if taken is None and stored and len(stored) < len(new):
        ids = [message.id for message in new]
        taken = ids.index(stored[0].id)
    if taken is not None:
        raise errors.AlreadyExistsError.id_taken(
            "chat_message", new[taken].id, {"index": str(taken)}
        )
    return stored or None


def _same_attachments(new: Sequence[NewAttachment], stored: Sequence[Attachment]) -> bool:
    return len(new) == len(stored) and all(
        one.repeats(other) for one, other in zip(new, stored, strict=True)
    )


async def get(db: Database, tenant_id: str, message_id: str) -> Message:
    message = await db.row(GET, {"tenant_id": tenant_id, "id": message_id}, make)
    if message is None:
        raise not_found(message_id)
    return message


async def page(
    db: Database,
    tenant_id: str,
    session_id: str,
    *,
    after: int,
    before: int,
    descending: bool,
    roles: list[str] | None,
    limit: int,
) -> Page:
    """The messages with after < sequence < before, in order; fewer than `limit` if large."""
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "after": after,
        "before": before,
        "roles": roles,
        "limit": limit,
        "bytes": PAGE_BYTES,
    }
    rows = await db.rows(LIST_DESC if descending else LIST_ASC, params, lambda *row: row)
    if not rows:
        raise sessions.not_found(session_id)
    if rows[0][0] is None:
        return Page([], more=False)
    fetched = rows[0][-3]
    return Page([make(*row[:-3]) for row in rows], more=len(rows) < fetched or fetched == limit)


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
        message = await transaction.row(GET, params, make)
        if message is None:  # deleted while we waited for the lock
            raise not_found(message_id)
        return message

    return await db.transaction(body, repeatable=True)


async def delete(db: Database, tenant_id: str, message_id: str) -> str:
    """Delete a message and its attachments, leaving a tombstone; returns its session's id."""

    async def body(transaction: Transaction) -> str:
        await sessions.lock_of_message(transaction, tenant_id, message_id)
        params = {"tenant_id": tenant_id, "id": message_id}
        session_id = await transaction.row(DELETE, params, str)
        if session_id is None:
            raise not_found(message_id)
        return session_id

    return await db.transaction(body, repeatable=False)
