"""Appending messages to sessions, under the sessions' locks; those of many callers together.

A commit waits for the disk, and a statement costs as much again as the row it inserts. So small
messages that come while another statement is on its way are gathered, and go together as the next
one: a group commit across callers, sessions and tenants. What comes when nothing is on its way
goes at once.

The statement waits for nobody. A message whose session is locked, or whose id exists, is left out
and goes alone, in a statement of its own, as do all of them when one row is refused: the one that
is at fault fails by itself. When the connection breaks it is unknown of exactly these whether they
were stored; each goes again alone, which its id makes safe. A caller that leaves before its
message is sent is left out; one that leaves later is not waited for.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable, Sequence
from contextvars import Context
from typing import Any

from chat_ticket_svc import errors
from chat_ticket_svc.store import attachments, messages, sessions
from chat_ticket_svc.store.attachments import Attachment, NewAttachment
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConnectionLost, ConstraintViolation
from chat_ticket_svc.store.messages import Message, NewMessage
from chat_ticket_svc.telemetry import tracing
from chat_ticket_svc.timeouts import Timeout

# One statement of these at most, so that nobody waits long behind the others.
MAX_BATCH_MESSAGES = 64
# How long the next statement waits for three quarters of what the last one had. Without this it
# goes with the first that comes, and all others wait for it and for the next one; one caller alone
# never waits.
GATHER_SECONDS = 0.002
# Larger messages go alone: they are not worth waiting for, nor is anything behind them.
SMALL_BYTES = 8192

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
       (extract(epoch FROM m.created_at) * 1000000)::bigint, {messages.ATTACHMENTS}
  FROM unnest(%(ids)s::uuid[], %(roles)s::text[], %(contents)s::text[], %(metadatas)s::text[])
           WITH ORDINALITY AS new (id, role, content, metadata, ordinal)
  LEFT JOIN chat_messages m ON m.tenant_id = %(tenant_id)s AND m.id = new.id
  LEFT JOIN chat_message_tombstones t ON t.tenant_id = %(tenant_id)s AND t.message_id = new.id
 ORDER BY new.ordinal
"""

# Places are counted among the messages of the same session. The sessions are locked before they
# are updated, as an update waits for a lock. The planner cannot look into what is selected: when
# it knows how many messages there are it plans anew each time, for longer than the rest takes.
APPEND_BATCH = """
WITH new AS MATERIALIZED (
    SELECT new.*,
           row_number() OVER (PARTITION BY tenant_id, session_id ORDER BY ordinal) AS place,
           count(*) OVER (PARTITION BY tenant_id, session_id) AS count
      FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(session_ids)s::uuid[]),
                  (SELECT %(ids)s::uuid[]), (SELECT %(roles)s::text[]),
                  (SELECT %(contents)s::text[]), (SELECT %(metadatas)s::text[]))
               WITH ORDINALITY
               AS new (tenant_id, session_id, id, role, content, metadata, ordinal)
     WHERE NOT EXISTS (
         SELECT FROM chat_messages m
          WHERE m.tenant_id = new.tenant_id AND m.id = new.id OFFSET 0)
), locked AS MATERIALIZED (
    SELECT s.tenant_id, s.id, new.count
      FROM new
      JOIN chat_sessions s ON s.tenant_id = new.tenant_id AND s.id = new.session_id
     WHERE new.place = 1
       FOR NO KEY UPDATE OF s SKIP LOCKED
), session AS (
    UPDATE chat_sessions s
       SET revision = s.revision + locked.count,
           updated_at = next_change_time(s.updated_at)
               + (locked.count - 1) * interval '1 microsecond'
      FROM locked
     WHERE s.tenant_id = locked.tenant_id AND s.id = locked.id
    RETURNING s.tenant_id, s.id, s.revision - locked.count AS revision,
              s.updated_at - (locked.count - 1) * interval '1 microsecond' AS time
), message AS (
    INSERT INTO chat_messages
           (tenant_id, id, session_id, sequence, revision, role, content, metadata, created_at)
    SELECT new.tenant_id, new.id, new.session_id,
           session.revision + new.place, session.revision + new.place,
           new.role, new.content, new.metadata::jsonb,
           session.time + (new.place - 1) * interval '1 microsecond'
      FROM new
      JOIN session ON session.tenant_id = new.tenant_id AND session.id = new.session_id
    RETURNING tenant_id, id::text, sequence, metadata::text,
              (extract(epoch FROM created_at) * 1000000)::bigint
)
SELECT * FROM message
"""


class _Waiting:
    """A message that waits for the next statement, or for its result."""

    def __init__(self, tenant_id: str, session_id: str, message: NewMessage):
        self.session = (tenant_id, session_id)
        self.key = (tenant_id, message.id)
        self.message = message
        # A row of the statement, or None when the message has to go alone.
        self.stored: asyncio.Future[Sequence[Any] | None]
        self.stored = asyncio.get_running_loop().create_future()
        # Whether it may be stored without our knowing.
        self.outcome_unknown = False


class GroupCommitWriter:
    """Appends to sessions, through one place for all callers of a process."""

    def __init__(self, db: Database):
        self._db = db
        self._waiting: deque[_Waiting] = deque()
        self._writing: asyncio.Task[None] | None = None
        # How many have to wait for the next statement to go, and whether they do.
        self._wanted = 1
        self._enough = asyncio.Event()

    async def append(
        self, tenant_id: str, session_id: str, new: Sequence[NewMessage]
    ) -> list[Message]:
        """Append messages to a session, all or none, in their order, and return them as stored.

        A repeat with the same ids and equal content returns what is stored.
        """
        outcome_unknown = False
        if len(new) == 1 and _is_small(new[0]):
            waiting = _Waiting(tenant_id, session_id, new[0])
            self._waiting.append(waiting)
            if len(self._waiting) >= self._wanted:
                self._enough.set()
            if self._writing is None:
                # Of no caller in particular: with no trace, and as no tenant.
                self._writing = asyncio.create_task(self._write(), context=Context())
            with tracing.statement(APPEND_BATCH):
                stored = await waiting.stored
            if stored is not None:
                return [_stored(session_id, new[0], *stored)]
            outcome_unknown = waiting.outcome_unknown
        return await _append_directly(
            self._db, tenant_id, session_id, new, outcome_unknown=outcome_unknown
        )

    async def _write(self) -> None:
        """Write what waits, until nothing does."""
        try:
            while batch := self._next():
                await self._write_batch(batch)
                await self._gather(len(batch) * 3 // 4)
        finally:
            self._writing = None

    async def _gather(self, wanted: int) -> None:
        """Wait a moment for as many as that: those who were answered come again one by one."""
        self._wanted = wanted
        if len(self._waiting) < wanted:
            self._enough.clear()
            with contextlib.suppress(TimeoutError), Timeout(GATHER_SECONDS):
                await self._enough.wait()

    def _next(self) -> list[_Waiting]:
        batch: dict[tuple[str, str], _Waiting] = {}
        while self._waiting and len(batch) < MAX_BATCH_MESSAGES:
            waiting = self._waiting.popleft()
            if waiting.stored.done():  # its caller has left
                continue
            if waiting.key in batch:  # the same again: a repeat of what is not stored yet
                waiting.stored.set_result(None)
            else:
                batch[waiting.key] = waiting
        return list(batch.values())

    async def _write_batch(self, batch: list[_Waiting]) -> None:
        rows: dict[tuple[str, str], Sequence[Any]] = {}
        try:
            rows = {
                (tenant_id, message_id): stored
                for tenant_id, message_id, *stored in await self._db.write_pipelined(
                    APPEND_BATCH,
                    {
                        "tenant_ids": _array(each.session[0] for each in batch),
                        "session_ids": _array(each.session[1] for each in batch),
                        "ids": _array(each.message.id for each in batch),
                        "roles": _array(each.message.role for each in batch),
                        "contents": _array(each.message.content for each in batch),
                        "metadatas": _array(each.message.metadata for each in batch),
                    },
                )
            }
        except ConnectionLost:
            for each in batch:
                each.outcome_unknown = True
        except errors.UnavailableError as error:  # nothing was sent, nor would be now
            for each in batch:
                if not each.stored.done():
                    own = errors.UnavailableError(str(error), reason=error.reason)
                    each.stored.set_exception(own)
        except Exception:  # noqa: S110 - each finds out alone what it is about, if it is about it
            pass
        for each in batch:
            if not each.stored.done():
                each.stored.set_result(rows.get(each.key))


def _is_small(message: NewMessage) -> bool:
    size = len(message.content) + len(message.metadata or "")
    return size <= SMALL_BYTES and not message.attachments


def _array(values: Iterable[str | int | None]) -> str:
    """An array as PostgreSQL reads it; psycopg takes ten times as long to write one."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _params(tenant_id: str, session_id: str, new: Sequence[NewMessage]) -> dict[str, Any]:
    return {
        "tenant_id": tenant_id,
        "session_id": session_id,
        "ids": _array(message.id for message in new),
        "roles": _array(message.role for message in new),
        "contents": _array(message.content for message in new),
        "metadatas": _array(message.metadata for message in new),
    }


async def _append_directly(
    db: Database,
    tenant_id: str,
    session_id: str,
    new: Sequence[NewMessage],
    *,
    outcome_unknown: bool,
) -> list[Message]:
    """`outcome_unknown` says that an attempt whose connection broke may have stored them."""
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
        "message_ticks": _array(message_ticks),
        "attachment_ids": _array(attachment.id for attachment, _, _ in attached),
        "attachment_message_ids": _array(message_id for _, message_id, _ in attached),
        "file_urls": _array(attachment.file_url for attachment, _, _ in attached),
        "file_names": _array(attachment.file_name for attachment, _, _ in attached),
        "file_types": _array(attachment.file_type for attachment, _, _ in attached),
        "attachment_ticks": _array(tick for _, _, tick in attached),
    }
    refused = None
    try:
        rows = await db.write(
            APPEND, params, lambda *row: row, idempotent=True, outcome_unknown=outcome_unknown
        )
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
    rows = await db.fetch_all(REPEATED, _params(tenant_id, session_id, new), lambda *row: row)
    stored: list[Message] = []
    taken: int | None = None
    for index, (message, row) in enumerate(zip(new, rows, strict=True)):
        exists, tombstoned, same, sequence, revision, metadata, created_at, files = row
        existing = messages.attachments_of(files)
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
