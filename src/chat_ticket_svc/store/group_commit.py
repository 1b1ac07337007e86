"""Group commit: appending small messages of many callers in one statement.

A commit waits for the disk, and a statement costs as much again as the row that it inserts. So
small messages that arrive while a statement is in flight are collected, and the next statement
inserts them all, across callers, sessions and tenants. A message that arrives when no statement is
in flight is sent at once.

The statement waits for no lock. A message is skipped if its session is locked or is not at the
revision that the message expects, or if its id exists. It is then appended in a statement of its
own (see append.py). A message that expects a revision is the only one of its session in a
statement, so that no other is skipped with it. If a row is invalid, the statement fails, and all
its messages are appended one by one, so that only the invalid one fails. If the connection is lost,
the outcome of the messages in flight is unknown. They too are appended one by one, which is safe as
they have ids. If a caller is cancelled before its message is sent, the message is dropped. If it is
cancelled later, the statement goes on for the others.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Sequence
from contextvars import Context
from typing import Any

from chat_ticket_svc import errors
from chat_ticket_svc.store import append
from chat_ticket_svc.store.append import array_literal
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.driver_errors import ConnectionLost
from chat_ticket_svc.store.messages import Message, NewMessage
from chat_ticket_svc.telemetry import tracing
from chat_ticket_svc.timeouts import Timeout

# Bounds the time that a message waits for the others of its statement.
MAX_BATCH_MESSAGES = 64
# How long the next statement waits until it has three quarters as many messages as the last one.
# Without this wait, the first of the callers just answered sends its next message alone, and all
# others wait for that statement and for the next one. A single caller never waits.
MAX_BATCH_DELAY_SECONDS = 0.002
# Messages over 8 KiB are written alone, so that no small message waits behind them.
MAX_BATCHED_MESSAGE_BYTES = 8192

# `position` counts the messages of one session. The sessions are locked in a SELECT, as an UPDATE
# cannot SKIP LOCKED. It compares the revision of the row that it locks, which can be newer than its
# snapshot. The arrays are selected so that the planner does not see their length. If it does, it
# plans the statement for every execution, which takes longer than executing it.
#
# An id is looked up as a range, in order, which only the primary key has. On a table that was never
# analyzed, all indexes that begin with the tenant cost the same to the planner, and it took one in
# which it reads the whole tenant.
APPEND_BATCH = """
WITH new AS MATERIALIZED (
    SELECT new.*,
           row_number() OVER (PARTITION BY tenant_id, session_id ORDER BY ordinal) AS position,
           count(*) OVER (PARTITION BY tenant_id, session_id) AS count
      FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(session_ids)s::uuid[]),
                  (SELECT %(ids)s::uuid[]), (SELECT %(roles)s::text[]),
                  (SELECT %(contents)s::text[]), (SELECT %(language_codes)s::text[]),
                  (SELECT %(search_languages)s::text[]), (SELECT %(metadatas)s::text[]),
                  (SELECT %(author_kinds)s::text[]), (SELECT %(author_ids)s::text[]),
                  (SELECT %(expected_revisions)s::bigint[]))
               WITH ORDINALITY
               AS new (tenant_id, session_id, id, role, content, language_code, search_language,
                       metadata, author_kind, author_id, expected_revision, ordinal)
     WHERE NOT EXISTS (
         SELECT FROM chat_messages m
          WHERE m.tenant_id = new.tenant_id AND m.id BETWEEN new.id AND new.id
          ORDER BY m.id OFFSET 0)
), locked AS MATERIALIZED (
    SELECT s.tenant_id, s.id, new.count
      FROM new
      JOIN chat_sessions s ON s.tenant_id = new.tenant_id AND s.id = new.session_id
     WHERE new.position = 1
       AND (new.expected_revision IS NULL OR s.revision = new.expected_revision)
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
           (tenant_id, id, session_id, sequence, revision, role, content, language_code,
            search_language, metadata, author_kind, author_id, created_at)
    SELECT new.tenant_id, new.id, new.session_id,
           session.revision + new.position, session.revision + new.position,
           new.role, new.content, new.language_code,
           coalesce(new.search_language,
                    (SELECT t.search_language FROM tenant_settings t
                      WHERE t.tenant_id = new.tenant_id),
                    %(search_language)s::text),
           new.metadata::jsonb, new.author_kind, new.author_id,
           session.time + (new.position - 1) * interval '1 microsecond'
      FROM new
      JOIN session ON session.tenant_id = new.tenant_id AND session.id = new.session_id
    RETURNING tenant_id, id::text, sequence, metadata::text,
              (extract(epoch FROM created_at) * 1000000)::bigint
)
SELECT * FROM message
"""


class _PendingAppend:
    """A message that waits to be sent, or for its result."""

    def __init__(
        self,
        tenant_id: str,
        session_id: str,
        message: NewMessage,
        expected_revision: int | None,
        loop: asyncio.AbstractEventLoop,
    ):
        self.tenant_id = tenant_id
        self.session_id = session_id
        self.message = message
        self.expected_revision = expected_revision
        self.key = (tenant_id, message.id)
        # The row that was inserted, or None if the message has to be appended alone.
        self.row: asyncio.Future[Sequence[Any] | None] = loop.create_future()
        # Whether a statement that lost its connection may have stored the message.
        self.outcome_unknown = False


class GroupCommitWriter:
    """Appends messages to sessions, for all callers of a process."""

    def __init__(self, db: Database, default_search_language: str):
        self._db = db
        self._default_search_language = default_search_language
        self._pending: deque[_PendingAppend] = deque()
        self._writing: asyncio.Task[None] | None = None
        # The next statement is sent when so many messages are pending.
        self._target_size = 1
        self._target_reached = asyncio.Event()

    async def append(
        self,
        tenant_id: str,
        session_id: str,
        new: Sequence[NewMessage],
        expected_revision: int | None,
    ) -> list[Message]:
        """Append messages to a session, in order, all or none, and return them as stored.

        A repeated request with the same ids and content returns the stored messages. Otherwise
        raises AbortedError if the session is not at `expected_revision`, when that is given.
        """
        outcome_unknown = False
        if len(new) == 1 and _is_small(new[0]):
            if self._writing is None:
                # An empty context: the statement belongs to no single caller, trace or tenant.
                self._writing = asyncio.create_task(self._write(), context=Context())
            loop = self._writing.get_loop()  # the running one, which is slow to ask for
            pending = _PendingAppend(tenant_id, session_id, new[0], expected_revision, loop)
            self._pending.append(pending)
            if len(self._pending) >= self._target_size:
                self._target_reached.set()
            with tracing.statement(APPEND_BATCH):
                row = await pending.row
            if row is not None:
                return [append.stored_message(session_id, new[0], *row)]
            outcome_unknown = pending.outcome_unknown
        return await append.append_messages(
            self._db,
            tenant_id,
            session_id,
            new,
            default_search_language=self._default_search_language,
            expected_revision=expected_revision,
            outcome_unknown=outcome_unknown,
        )

    async def _write(self) -> None:
        """Write batches until no message is pending."""
        try:
            while batch := self._next_batch():
                await self._write_batch(batch)
                await self._wait_for_messages(len(batch) * 3 // 4)
        finally:
            self._writing = None

    async def _wait_for_messages(self, target_size: int) -> None:
        """Wait briefly until so many messages are pending."""
        self._target_size = target_size
        if len(self._pending) < target_size:
            self._target_reached.clear()
            with contextlib.suppress(TimeoutError), Timeout(MAX_BATCH_DELAY_SECONDS):
                await self._target_reached.wait()

    def _next_batch(self) -> list[_PendingAppend]:
        batch: dict[tuple[str, str], _PendingAppend] = {}
        # For each session, whether its message in the batch expects a revision.
        sessions: dict[tuple[str, str], bool] = {}
        deferred: list[_PendingAppend] = []
        while self._pending and len(batch) < MAX_BATCH_MESSAGES:
            pending = self._pending.popleft()
            if pending.row.done():  # its caller was cancelled
                continue
            session = (pending.tenant_id, pending.session_id)
            has_expectation = pending.expected_revision is not None
            if pending.key in batch:  # a repeated request, while the first one is pending
                pending.row.set_result(None)
            elif has_expectation and session in sessions:
                # It most likely loses. Of many that wait, the losers would fill a batch each.
                pending.row.set_result(None)
            elif sessions.setdefault(session, has_expectation) and not has_expectation:
                deferred.append(pending)
            else:
                batch[pending.key] = pending
        self._pending.extendleft(reversed(deferred))
        return list(batch.values())

    async def _write_batch(self, batch: list[_PendingAppend]) -> None:
        rows: dict[tuple[str, str], Sequence[Any]] = {}
        language_codes = [pending.message.language_code for pending in batch]
        try:
            rows = {
                (tenant_id, message_id): row
                for tenant_id, message_id, *row in await self._db.write_pipelined(
                    APPEND_BATCH,
                    {
                        "tenant_ids": array_literal(pending.tenant_id for pending in batch),
                        "session_ids": array_literal(pending.session_id for pending in batch),
                        "ids": array_literal(pending.message.id for pending in batch),
                        "roles": array_literal(pending.message.role for pending in batch),
                        "contents": array_literal(pending.message.content for pending in batch),
                        "language_codes": array_literal(language_codes),
                        "search_languages": append.search_language_literal(language_codes),
                        "search_language": self._default_search_language,
                        "metadatas": array_literal(pending.message.metadata for pending in batch),
                        "author_kinds": array_literal(
                            pending.message.author_kind for pending in batch
                        ),
                        "author_ids": array_literal(pending.message.author_id for pending in batch),
                        "expected_revisions": array_literal(
                            pending.expected_revision for pending in batch
                        ),
                    },
                )
            }
        except ConnectionLost:
            for pending in batch:
                pending.outcome_unknown = True
        except errors.StatementCanceledError:
            pass  # the callers did not ask for it: each message is appended alone
        except errors.UnavailableError as error:  # nothing was sent, and a retry would fail too
            for pending in batch:
                if not pending.row.done():
                    # Each caller gets an instance of its own, as each raise adds a traceback.
                    pending.row.set_exception(
                        errors.UnavailableError(str(error), reason=error.reason)
                    )
        except Exception:  # noqa: S110 - each message meets its own error when it is appended alone
            pass
        for pending in batch:
            if not pending.row.done():
                pending.row.set_result(rows.get(pending.key))


def _is_small(message: NewMessage) -> bool:
    size = len(message.content) + len(message.metadata or "")
    return size <= MAX_BATCHED_MESSAGE_BYTES and not message.attachments
