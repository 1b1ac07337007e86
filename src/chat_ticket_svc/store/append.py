"""Appending messages to a session in one statement, and finding the messages of a repeated request.

Messages have ids, so appending is idempotent. An append whose ids exist returns the stored messages
if they equal the new ones, and fails otherwise.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from chat_ticket_svc import errors, search_language
from chat_ticket_svc.store import attachments, messages, sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.messages import Message, NewMessage

# One statement is one transaction. The UPDATE locks the session. Each message gets a revision of
# its own, and each row a microsecond of its own. If one of the ids exists, or the session is not at
# the expected revision, nothing is written. After a wait for the lock, PostgreSQL looks at the
# revision again.
APPEND = """
WITH session AS (
    UPDATE chat_sessions
       SET revision = revision + %(count)s::integer,
           updated_at = next_change_time(updated_at)
               + (%(ticks)s::integer - 1) * interval '1 microsecond'
     WHERE tenant_id = %(tenant_id)s AND id = %(session_id)s::uuid
       AND (%(expected_revision)s::bigint IS NULL OR revision = %(expected_revision)s::bigint)
       AND NOT EXISTS (
           SELECT FROM chat_messages
            WHERE tenant_id = %(tenant_id)s AND id = ANY (%(ids)s::uuid[]))
    RETURNING revision - %(count)s::integer AS revision,
              updated_at - (%(ticks)s::integer - 1) * interval '1 microsecond' AS time
), message AS (
    INSERT INTO chat_messages
           (tenant_id, id, session_id, sequence, revision, role, content, language_code,
            search_language, metadata, state, author_kind, author_id, created_at)
    SELECT %(tenant_id)s, new.id, %(session_id)s::uuid,
           session.revision + new.ordinal, session.revision + new.ordinal,
           new.role, new.content, new.language_code,
           coalesce(new.search_language,
                    (SELECT search_language FROM tenant_settings
                      WHERE tenant_id = %(tenant_id)s),
                    %(search_language)s::text),
           new.metadata::jsonb, new.state, new.author_kind, new.author_id,
           session.time + new.tick * interval '1 microsecond'
      FROM session,
           unnest(%(ids)s::uuid[], %(roles)s::text[], %(contents)s::text[],
                  %(language_codes)s::text[], %(search_languages)s::text[],
                  %(metadatas)s::text[], %(states)s::text[], %(author_kinds)s::text[],
                  %(author_ids)s::text[], %(message_ticks)s::integer[])
               WITH ORDINALITY
               AS new (id, role, content, language_code, search_language, metadata, state,
                       author_kind, author_id, tick, ordinal)
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

# The constraints that an id violates if a concurrent call inserted it first, or if it belongs to a
# draft.
ID_CONSTRAINTS = {"chat_messages_pkey", "chat_message_tombstones_pkey", "chat_attachments_pkey"}

FIND_DRAFT = """
SELECT new.ordinal - 1
  FROM unnest(%(ids)s::uuid[]) WITH ORDINALITY AS new (id, ordinal)
  JOIN chat_drafts d ON d.tenant_id = %(tenant_id)s AND d.id = new.id
 ORDER BY new.ordinal LIMIT 1
"""

# Metadata is compared as jsonb text, as 1.0 and 1 are equal as jsonb, but different values to the
# caller. A message that was changed since may have other metadata, and a redacted one has lost its
# content. The state is not compared, as no request has one.
FIND_REPEATS = f"""
SELECT m.id IS NOT NULL, t.message_id IS NOT NULL,
       m.session_id = %(session_id)s::uuid AND m.role = new.role
           AND (m.redacted OR m.content = new.content)
           AND m.language_code IS NOT DISTINCT FROM new.language_code
           AND m.author_kind IS NOT DISTINCT FROM new.author_kind
           AND m.author_id IS NOT DISTINCT FROM new.author_id
           AND (m.revision > m.sequence
                OR m.metadata::text IS NOT DISTINCT FROM new.metadata::jsonb::text),
       {messages.COLUMNS}
  FROM unnest(%(ids)s::uuid[], %(roles)s::text[], %(contents)s::text[],
              %(language_codes)s::text[], %(metadatas)s::text[], %(author_kinds)s::text[],
              %(author_ids)s::text[])
           WITH ORDINALITY AS new (id, role, content, language_code, metadata, author_kind,
                                   author_id, ordinal)
  LEFT JOIN chat_messages m ON m.tenant_id = %(tenant_id)s AND m.id = new.id
  LEFT JOIN chat_message_tombstones t ON t.tenant_id = %(tenant_id)s AND t.message_id = new.id
 ORDER BY new.ordinal
"""


def array_literal(values: Iterable[str | int | None]) -> str:
    """An array in PostgreSQL's text format. psycopg takes ten times as long to encode one."""
    return f"{{{','.join(map(_array_element, values))}}}"


def _array_element(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, str) and ("\\" in value or '"' in value):
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{value}"'


def _message_params(tenant_id: str, session_id: str, new: Sequence[NewMessage]) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "ids": array_literal(message.id for message in new),
        "roles": array_literal(message.role for message in new),
        "contents": array_literal(message.content for message in new),
        "language_codes": array_literal(message.language_code for message in new),
        "metadatas": array_literal(message.metadata for message in new),
        "author_kinds": array_literal(message.author_kind for message in new),
        "author_ids": array_literal(message.author_id for message in new),
    }


def search_language_literal(language_codes: Iterable[str | None]) -> str:
    """The array of the search languages of these codes, with NULL where there is no code."""
    return array_literal(code and search_language.of_language_code(code) for code in language_codes)


def append_params(
    tenant_id: str,
    session_id: str,
    new: Sequence[NewMessage],
    default_search_language: str,
    expected_revision: int | None = None,
) -> dict[str, Any]:
    """The parameters of APPEND. See append_messages."""
    ticks = 0
    message_ticks: list[int] = []
    new_attachments: list[tuple[NewAttachment, str, int]] = []
    for message in new:
        message_ticks.append(ticks)
        for attachment in message.attachments:
            ticks += 1
            new_attachments.append((attachment, message.id, ticks))
        ticks += 1
    return _message_params(tenant_id, session_id, new) | {
        "search_languages": search_language_literal(message.language_code for message in new),
        "search_language": default_search_language,
        "expected_revision": expected_revision,
        "states": array_literal(message.state for message in new),
        "count": len(new),
        "ticks": ticks,
        "message_ticks": array_literal(message_ticks),
        "attachment_ids": array_literal(attachment.id for attachment, _, _ in new_attachments),
        "attachment_message_ids": array_literal(message_id for _, message_id, _ in new_attachments),
        "file_urls": array_literal(attachment.file_url for attachment, _, _ in new_attachments),
        "file_names": array_literal(attachment.file_name for attachment, _, _ in new_attachments),
        "file_types": array_literal(attachment.file_type for attachment, _, _ in new_attachments),
        "attachment_ticks": array_literal(tick for _, _, tick in new_attachments),
    }


def stored_message(
    session_id: str, new: NewMessage, sequence: int, metadata: str | None, created_at: int
) -> Message:
    """The stored form of a new message, from the values that its INSERT returned."""
    stored_attachments: tuple[Attachment, ...] = ()
    if new.attachments:
        stored_attachments = tuple(
            Attachment(a.id, new.id, a.file_url, a.file_name, a.file_type, created_at + tick, None)
            for tick, a in enumerate(new.attachments, start=1)
        )
    return Message(
        new.id, session_id, sequence, sequence, new.role, new.content, new.language_code,
        metadata, new.state, created_at, new.author_kind, new.author_id, False, stored_attachments,
    )  # fmt: skip


def stored_messages(
    session_id: str, new: Sequence[NewMessage], rows: Sequence[Sequence[Any]]
) -> list[Message]:
    """The stored form of new messages, from the rows that APPEND returned."""
    return [
        stored_message(session_id, message, *row) for message, row in zip(new, rows, strict=True)
    ]


async def append_messages(
    db: Database,
    tenant_id: str,
    session_id: str,
    new: Sequence[NewMessage],
    *,
    default_search_language: str,
    expected_revision: int | None,
    outcome_unknown: bool,
) -> list[Message]:
    """Append messages to a session, in order, all or none, and return them as stored.

    A repeated request with the same ids and content returns the stored messages. Otherwise raises
    AbortedError if the session is not at `expected_revision`, when that is given. Messages without
    a language code, of a tenant without a search language, get `default_search_language`.
    `outcome_unknown` says that an earlier attempt lost its connection and may have stored them.
    """
    id_violation = None
    try:
        rows = await db.write(
            APPEND,
            append_params(tenant_id, session_id, new, default_search_language, expected_revision),
            lambda *row: row,
            idempotent=True,
            outcome_unknown=outcome_unknown,
            locks=[session_id],
        )
        if rows:
            return stored_messages(session_id, new, rows)
    except ConstraintViolation as violation:
        if violation.constraint not in ID_CONSTRAINTS:
            raise
        id_violation = violation
    stored = await find_repeat(db, tenant_id, session_id, new, outcome_unknown=True)
    if stored is not None:
        return stored
    if id_violation is not None and id_violation.constraint == "chat_attachments_pkey":
        raise await attachments.id_taken_error(
            db, tenant_id, [attachment for message in new for attachment in message.attachments]
        ) from id_violation
    session = await sessions.get(db, tenant_id, session_id)
    sessions.check_revision(session.revision, expected_revision)
    await _refuse_draft(db, tenant_id, new)
    # The statement found one of the ids, which is gone now: its session was deleted in between, or
    # its draft was dropped. Or the session has reached the expected revision since.
    raise errors.ContentionError from id_violation


async def _refuse_draft(db: Database, tenant_id: str, new: Sequence[NewMessage]) -> None:
    """Raise AlreadyExistsError, with the index, if an id belongs to a draft that is still open."""
    params = {"tenant_id": tenant_id, "ids": array_literal(message.id for message in new)}
    for index in await db.fetch_all(FIND_DRAFT, params, int):
        raise errors.AlreadyExistsError(
            f"id {new[index].id} belongs to an open draft",
            reason="CHAT_MESSAGE_ALREADY_EXISTS",
            resource="chat_message",
            resource_id=new[index].id,
            metadata={"index": str(index)},
        )


async def find_repeat(
    db: Database,
    tenant_id: str,
    session_id: str,
    new: Sequence[NewMessage],
    *,
    outcome_unknown: bool = False,
) -> list[Message] | None:
    """The stored messages that an earlier request for `new` created, or None if no id exists.

    Raises AlreadyExistsError, with the index, if an id exists and this is not a repeated request.
    `outcome_unknown` says that the call itself may have stored them.
    """
    params = _message_params(tenant_id, session_id, new)
    rows = await db.fetch_all(
        FIND_REPEATS, params, lambda *row: row, outcome_unknown=outcome_unknown
    )
    stored: list[Message] = []
    taken_index: int | None = None
    for index, (message, row) in enumerate(zip(new, rows, strict=True)):
        exists, is_deleted, is_equal, *columns = row
        if is_deleted or (exists and not is_equal):
            taken_index = index
            break
        if exists:
            found = messages.from_row(*columns)
            is_unchanged = found.revision == found.sequence
            if is_unchanged and not _is_repeat(message.attachments, found.attachments):
                taken_index = index
                break
            stored.append(found)
    if taken_index is None and stored and len(stored) < len(new):
        ids = [message.id for message in new]
        taken_index = ids.index(stored[0].id)
    if taken_index is not None:
        raise errors.AlreadyExistsError.id_taken(
            "chat_message", new[taken_index].id, {"index": str(taken_index)}
        )
    return stored or None


def _is_repeat(new: Sequence[NewAttachment], stored: Sequence[Attachment]) -> bool:
    return len(new) == len(stored) and all(
        attachment.is_repeat_of(existing) for attachment, existing in zip(new, stored, strict=True)
    )
