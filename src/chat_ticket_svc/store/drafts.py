"""Chat drafts: messages that are being written. Beginning, reading and finishing one.

A draft belongs to the writer that took it over last. Its fencing token says who that is: each
takeover raises it, and every write of a writer names the token that it has. draft_commit.py adds
text. draft_expiry.py finishes the drafts of lost writers.
"""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

from chat_ticket_svc import errors
from chat_ticket_svc.store import append, attachments, messages, sessions
from chat_ticket_svc.store.attachments import NewAttachment
from chat_ticket_svc.store.columns import column_list, microseconds
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConstraintViolation
from chat_ticket_svc.store.messages import Message, NewMessage
from chat_ticket_svc.store.transaction import Transaction

# Of one session. A follower reads all of them at once.
MAX_OPEN_DRAFTS = 8
# Of several writers that take a draft over at once, each attempt of one succeeds.
OPEN_ATTEMPTS = 10

CONTENT = """
    (SELECT coalesce(string_agg(p.content, '' ORDER BY p.start_offset), '')
       FROM chat_draft_pieces p
      WHERE p.tenant_id = d.tenant_id AND p.draft_id = d.id)
"""


class Draft(NamedTuple):
    """A row of chat_drafts with its content.

    `metadata` is JSON text, and the times are in microseconds since the Unix epoch.
    """

    id: Annotated[str, "d.id::text"]
    session_id: Annotated[str, "d.session_id::text"]
    role: Annotated[str, "d.role"]
    content: Annotated[str, f"{CONTENT} AS content"]
    length: Annotated[int, "d.length"]
    metadata: Annotated[str | None, "d.metadata::text AS metadata"]
    language_code: Annotated[str | None, "d.language_code"]
    created_at: Annotated[int, microseconds("d.created_at")]
    expires_at: Annotated[int, microseconds("d.expires_at")]
    author_kind: Annotated[str | None, "d.author_kind"]
    author_id: Annotated[str | None, "d.author_id"]


class NewDraft(NamedTuple):
    """A draft to begin or to take over. The client assigns the id."""

    id: str
    role: str
    language_code: str | None
    metadata: str | None
    author_kind: str | None
    author_id: str | None


class Lease(NamedTuple):
    """What a writer gets: its fencing token, the length of the draft, the session's revision."""

    fencing_token: int
    length: int
    revision: int
    is_takeover: bool


COLUMNS = column_list(Draft)

GET = f"""
SELECT {COLUMNS} FROM chat_drafts d
 WHERE d.tenant_id = %(tenant_id)s AND d.id = %(id)s::uuid
"""

OF_SESSION = f"""
SELECT {COLUMNS} FROM chat_drafts d
 WHERE d.tenant_id = %(tenant_id)s AND d.session_id = %(session_id)s::uuid
 ORDER BY d.created_at, d.id
"""

IDS_OF_SESSION = """
SELECT id::text FROM chat_drafts
 WHERE tenant_id = %(tenant_id)s AND session_id = %(session_id)s::uuid
 ORDER BY created_at, id
"""

SESSION_OF = """
SELECT session_id::text FROM chat_drafts
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

# For each of the three that can have the id, whether it is what the caller has in mind; NULL when
# there is none.
FIND = """
SELECT CASE WHEN d.id IS NOT NULL THEN
           d.session_id = %(session_id)s::uuid AND d.role = %(role)s
           AND d.language_code IS NOT DISTINCT FROM %(language_code)s
           AND d.author_kind IS NOT DISTINCT FROM %(author_kind)s
           AND d.author_id IS NOT DISTINCT FROM %(author_id)s END,
       CASE WHEN m.id IS NOT NULL THEN
           m.session_id = %(session_id)s::uuid AND m.role = %(role)s
           AND m.language_code IS NOT DISTINCT FROM %(language_code)s
           AND m.author_kind IS NOT DISTINCT FROM %(author_kind)s
           AND m.author_id IS NOT DISTINCT FROM %(author_id)s END,
       t.message_id IS NOT NULL, d.fencing_token
  FROM (SELECT %(tenant_id)s::text AS tenant_id, %(id)s::uuid AS id) AS wanted
  LEFT JOIN chat_drafts d ON d.tenant_id = wanted.tenant_id AND d.id = wanted.id
  LEFT JOIN chat_messages m ON m.tenant_id = wanted.tenant_id AND m.id = wanted.id
  LEFT JOIN chat_message_tombstones t
         ON t.tenant_id = wanted.tenant_id AND t.message_id = wanted.id
"""

# The clock of the database, not of the servers, decides when a writer is lost.
EXPIRES_AT = "clock_timestamp() + %(lease_seconds)s::float8 * interval '1 second'"

# A draft that was dropped can begin again. Its fencing token is then another than before, so that
# a writer of the time before is still fenced.
BEGIN = f"""
INSERT INTO chat_drafts (tenant_id, id, session_id, fencing_token, role, language_code, metadata,
                         author_kind, author_id, expires_at)
VALUES (%(tenant_id)s, %(id)s::uuid, %(session_id)s::uuid,
        {microseconds("clock_timestamp()")}, %(role)s, %(language_code)s,
        %(metadata)s::jsonb, %(author_kind)s, %(author_id)s, {EXPIRES_AT})
ON CONFLICT (tenant_id, id) DO NOTHING
RETURNING fencing_token, length
"""

# Once from each token: a statement that the network delivers late, after its server has given it
# up, does not fence the writer that came after it.
TAKE_OVER = f"""
UPDATE chat_drafts d
   SET fencing_token = d.fencing_token + 1, expires_at = {EXPIRES_AT}
  FROM chat_sessions s
 WHERE d.tenant_id = %(tenant_id)s AND d.id = %(id)s::uuid
   AND d.fencing_token = %(fencing_token)s
   AND s.tenant_id = %(tenant_id)s AND s.id = d.session_id
RETURNING d.fencing_token, d.length, s.revision, true
"""

LOCK = """
SELECT fencing_token, role, language_code, metadata::text, author_kind, author_id,
       expires_at < clock_timestamp()
  FROM chat_drafts
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
   FOR UPDATE
"""

# For the drafts of lost writers: others wait behind one whose session is locked for long.
SHORT_LOCK_TIMEOUT = "SELECT set_config('lock_timeout', '250ms', true)"

# A statement of its own, after LOCK: the pieces that the lock waited for are in its snapshot.
READ_CONTENT = f"""
SELECT {CONTENT} FROM (SELECT %(tenant_id)s::text AS tenant_id, %(id)s::uuid AS id) AS d
"""

DELETE = """
DELETE FROM chat_drafts WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""


def not_found(draft_id: str) -> errors.NotFoundError:
    return errors.NotFoundError("chat_draft", draft_id)


def taken_over(draft_id: str) -> errors.AbortedError:
    return errors.AbortedError(
        f"another stream has taken over the draft {draft_id}", reason="DRAFT_TAKEN_OVER"
    )


async def find(db: Database, tenant_id: str, draft_id: str) -> Draft | None:
    drafts = await db.fetch_all(GET, {"tenant_id": tenant_id, "id": draft_id}, Draft)
    return drafts[0] if drafts else None


async def get(db: Database, tenant_id: str, draft_id: str) -> Draft:
    draft = await find(db, tenant_id, draft_id)
    if draft is None:
        raise not_found(draft_id)
    return draft


async def of_session(db: Database, tenant_id: str, session_id: str) -> list[Draft]:
    params = {"tenant_id": tenant_id, "session_id": session_id}
    drafts = await db.fetch_all(OF_SESSION, params, Draft)
    if not drafts:
        await sessions.get(db, tenant_id, session_id)
    return drafts


async def open_(
    db: Database,
    tenant_id: str,
    session_id: str,
    new: NewDraft,
    *,
    exclusive: bool,
    expected_revision: int | None,
    lease_seconds: float,
) -> Lease | Message:
    """Begin a draft, or take over the open one that has its id.

    Returns the message if the draft was finished meanwhile.
    """
    params = {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "lease_seconds": lease_seconds,
        **new._asdict(),
    }
    # The draft may begin, end or be taken over between two statements.
    for _ in range(OPEN_ATTEMPTS):
        [found] = await db.fetch_pipelined(FIND, params)
        is_draft, is_message, is_deleted, fencing_token = found
        if is_message is False or is_deleted:
            raise errors.AlreadyExistsError.id_taken("chat_message", new.id)
        if is_message:
            return await messages.get(db, tenant_id, new.id)
        if is_draft is False:
            raise errors.AlreadyExistsError.id_taken("chat_draft", new.id)
        if is_draft:
            taking_over = {**params, "fencing_token": fencing_token}
            leases = await db.write(TAKE_OVER, taking_over, Lease, idempotent=True)
            lease = leases[0] if leases else None
        else:
            lease = await _begin(db, params, exclusive=exclusive, revision=expected_revision)
        if lease is not None:
            return lease
    raise errors.ContentionError


async def _begin(
    db: Database,
    params: dict[str, str | float | None],
    *,
    exclusive: bool,
    revision: int | None,
) -> Lease | None:
    """Begin a draft. Returns None if its id was used meanwhile."""
    tenant_id, session_id = str(params["tenant_id"]), str(params["session_id"])

    async def body(transaction: Transaction) -> Lease | None:
        # The session's lock also orders the drafts that begin at once, so they see each other.
        session = await sessions.lock(transaction, tenant_id, session_id)
        open_ids = await transaction.fetch_all(IDS_OF_SESSION, params, str)
        if params["id"] in open_ids:
            return None
        if revision not in (None, session.revision) or (exclusive and open_ids):
            # The draft may have begun and become a message since it was looked for.
            [found] = await transaction.fetch_all(FIND, params, lambda *row: row)
            _, is_message, is_deleted, _ = found
            if is_message is not None or is_deleted:
                return None
        sessions.check_revision(session.revision, revision)
        if exclusive and open_ids:
            raise errors.AlreadyExistsError(
                f"the session has the open draft {open_ids[0]}",
                reason="DRAFT_OPEN",
                resource="chat_draft",
                resource_id=open_ids[0],
            )
        if len(open_ids) >= MAX_OPEN_DRAFTS:
            raise errors.FailedPreconditionError(
                f"the session has {len(open_ids)} open drafts, at most {MAX_OPEN_DRAFTS}",
                reason="TOO_MANY_DRAFTS",
                subject=f"chat_sessions/{session_id}",
            )
        return await transaction.fetch_one(
            BEGIN, params, lambda token, length: Lease(token, length, session.revision, False)
        )

    try:
        return await db.transaction(body, idempotent=True, locks=[session_id])
    except ConstraintViolation as violation:
        if violation.constraint != "chat_drafts_message_id_check":
            raise
        return None


async def finish(
    db: Database,
    tenant_id: str,
    session_id: str,
    draft_id: str,
    state: str | None,
    *,
    default_search_language: str,
    fencing_token: int | None = None,
    metadata: str | None = None,
    new_attachments: Sequence[NewAttachment] = (),
    only_expired: bool = False,
) -> Message | None:
    """Make the message of a draft, in one transaction with the removal of the draft.

    Returns the message, or None if the draft was empty. If the draft is gone, this is the message
    that it became. With `fencing_token`, raises AbortedError if another writer has taken it over.
    With `only_expired`, raises NotFoundError unless the draft is there and its writer counts as
    lost. `metadata` replaces that of the draft.
    """
    params = {"tenant_id": tenant_id, "id": draft_id}

    async def body(transaction: Transaction) -> Message | None:
        if only_expired:
            await transaction.execute(SHORT_LOCK_TIMEOUT, {})
        # First, as in every transaction that changes a session.
        await sessions.lock(transaction, tenant_id, session_id)
        draft = await transaction.fetch_one(LOCK, params, lambda *row: row)
        if draft is None and only_expired:
            raise not_found(draft_id)
        if draft is None:
            return await transaction.fetch_one(messages.GET, params, messages.from_row)
        token, role, language_code, draft_metadata, author_kind, author_id, is_expired = draft
        if fencing_token not in (None, token):
            raise taken_over(draft_id)
        if only_expired and not is_expired:
            raise not_found(draft_id)
        content = await transaction.fetch_one(READ_CONTENT, params, str)
        await transaction.execute(DELETE, params)
        if not content:
            return None
        new = NewMessage(
            draft_id,
            role,
            content,
            language_code,
            metadata or draft_metadata,
            tuple(new_attachments),
            author_kind,
            author_id,
            state,
        )
        rows = await transaction.fetch_all(
            append.APPEND,
            append.append_params(tenant_id, session_id, [new], default_search_language),
            lambda *row: row,
        )
        [message] = append.stored_messages(session_id, [new], rows)
        return message

    try:
        return await db.transaction(body, idempotent=True, locks=[session_id])
    except ConstraintViolation as violation:
        if violation.constraint != "chat_attachments_pkey":
            raise
        raise await attachments.id_taken_error(db, tenant_id, new_attachments) from violation


async def stop(
    db: Database, tenant_id: str, draft_id: str, *, default_search_language: str
) -> tuple[str, Message | None]:
    """Stop a draft. Returns its session's id, and its message unless it was empty.

    If it has become a message already, returns this.
    """
    params = {"tenant_id": tenant_id, "id": draft_id}
    session_id = await db.fetch_by_key(SESSION_OF, params, str)
    if session_id is None:
        return await _message_of(db, tenant_id, draft_id)
    try:
        message = await finish(
            db,
            tenant_id,
            session_id,
            draft_id,
            "stopped",
            default_search_language=default_search_language,
        )
    except errors.NotFoundError as error:  # the session was deleted meanwhile
        raise not_found(draft_id) from error
    return session_id, message


async def _message_of(db: Database, tenant_id: str, draft_id: str) -> tuple[str, Message]:
    try:
        message = await messages.get(db, tenant_id, draft_id)
    except errors.NotFoundError as error:
        raise not_found(draft_id) from error
    return message.session_id, message


async def outcome(db: Database, tenant_id: str, session_id: str, draft_id: str) -> Message | None:
    """What became of a draft that is gone: its message, or None if it was empty.

    Raises NotFoundError if its session is deleted.
    """
    params = {"tenant_id": tenant_id, "id": draft_id}
    message = await db.fetch_by_key(messages.GET, params, messages.from_row)
    if message is None:
        await sessions.get(db, tenant_id, session_id)
    return message
