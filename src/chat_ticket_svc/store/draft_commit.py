"""Group commit of drafts: adding the text of all writers of a process in one statement.

A writer sends a few words at a time, many times a second. What all writers have sent while a
statement is in flight is added by the next one, with one commit for all of them. What one writer
has sent meanwhile becomes one piece. A writer alone never waits.

The statement locks no session, and waits for no draft that is locked. It adds a piece only where
the draft still has the writer's fencing token and the length that the piece begins at. So a piece
is added once, however often it is sent, and never by a writer that another has replaced. For the
pieces that were not added, the draft is read, to find out why.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.store import drafts
from chat_ticket_svc.store.append import array_literal
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.drafts import EXPIRES_AT, Lease
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics

DraftKey = tuple[str, str]  # (tenant id, draft id)
SessionKey = tuple[str, str]  # (tenant id, session id)

# Bounds the time that a piece waits for the others of its statement.
MAX_BATCH_DRAFTS = 256
MAX_BATCH_BYTES = 1024 * 1024
# A locked draft is tried again after this time, this often.
LOCKED_RETRY_SECONDS = 0.02
LOCKED_RETRIES = 100
# The pieces of a statement that failed are added alone, so many at a time. More would fill the
# queue for connections.
ADDED_ALONE = 4

# The arrays are selected so that the planner does not see their length. If it does, it plans the
# statement for every execution.
ADD_PIECES = f"""
WITH new AS MATERIALIZED (
    SELECT *
      FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(ids)s::uuid[]),
                  (SELECT %(fencing_tokens)s::bigint[]), (SELECT %(start_offsets)s::bigint[]),
                  (SELECT %(contents)s::text[]))
               AS new (tenant_id, id, fencing_token, start_offset, content)
), locked AS MATERIALIZED (
    SELECT d.tenant_id, d.id, new.start_offset, new.content
      FROM new
      JOIN chat_drafts d ON d.tenant_id = new.tenant_id AND d.id = new.id
     WHERE d.fencing_token = new.fencing_token AND d.length = new.start_offset
       FOR NO KEY UPDATE OF d SKIP LOCKED
), draft AS (
    UPDATE chat_drafts d
       SET length = d.length + octet_length(locked.content), expires_at = {EXPIRES_AT}
      FROM locked
     WHERE d.tenant_id = locked.tenant_id AND d.id = locked.id
    RETURNING d.tenant_id, d.id, d.fencing_token
), piece AS (
    INSERT INTO chat_draft_pieces (tenant_id, draft_id, start_offset, content)
    SELECT locked.tenant_id, locked.id, locked.start_offset, locked.content
      FROM locked
     WHERE locked.content <> ''
)
SELECT tenant_id, id::text, fencing_token FROM draft
"""

FIND_LEASE = """
SELECT fencing_token, length FROM chat_drafts
 WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""

FIND_LEASES = """
SELECT d.tenant_id, d.id::text, d.fencing_token
  FROM unnest(string_to_array(%(tenant_ids)s::text, chr(10)),
              string_to_array(%(ids)s::text, chr(10))::uuid[])
           AS written (tenant_id, id)
  JOIN chat_drafts d ON d.tenant_id = written.tenant_id AND d.id = written.id
"""


class DraftEnded(Exception):  # noqa: N818 - a signal to the service, never to a caller
    """The draft is gone: stopped, finished as expired, or deleted with its session."""


class DraftWriter:
    """One stream's hold on a draft: what is durable, and what is on its way."""

    def __init__(self, tenant_id: str, session_id: str, draft_id: str, lease: Lease):
        self.tenant_id = tenant_id
        self.session_id = session_id
        self.draft_id = draft_id
        self.fencing_token = lease.fencing_token
        # In bytes of UTF-8: what is durable, and what the writer has sent.
        self.length = lease.length
        self.accepted_length = lease.length
        # How many times something was committed, be it only that the writer is alive.
        self.commits = 0
        # Set when one of these or `error` changes.
        self.changed = asyncio.Event()
        # Why nothing more can be written.
        self.error: Exception | None = None
        self.pending: list[str] = []
        self.is_writing = False

    @property
    def key(self) -> DraftKey:
        return self.tenant_id, self.draft_id

    @property
    def unwritten_bytes(self) -> int:
        return self.accepted_length - self.length

    def fail(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            self.changed.set()

    async def wait_until_written(self, unwritten_bytes: int = 0) -> None:
        """Wait until at most so many bytes are not durable; raises why they cannot be."""
        while self.unwritten_bytes > unwritten_bytes:
            if self.error is not None:
                raise self.error
            self.changed.clear()
            await self.changed.wait()


class DraftGroupCommit:
    """Adds text to drafts, for all writers of a process.

    `on_written` gets (tenant, session) of each draft that has more durable text.
    """

    def __init__(
        self, db: Database, *, lease_seconds: float, on_written: Callable[[str, str], object]
    ):
        self._db = db
        self._lease_seconds = lease_seconds
        self._on_written = on_written
        self._writers: defaultdict[SessionKey, set[DraftWriter]] = defaultdict(set)
        # The writers with text to add, in the order in which they got it.
        self._dirty: dict[DraftWriter, None] = {}
        self._writing: asyncio.Task[None] | None = None
        self._adding_alone = asyncio.Semaphore(ADDED_ALONE)
        # The event loop holds only weak references to its tasks.
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_draining = False

    @contextmanager
    def writing(self, writer: DraftWriter) -> Iterator[None]:
        """Let a writer add text, and tell it when its draft ends, for the duration of the block."""
        key = (writer.tenant_id, writer.session_id)
        self.raise_if_draining()
        self._writers[key].add(writer)
        metrics.DRAFT_WRITERS.inc()
        try:
            yield
        finally:
            metrics.DRAFT_WRITERS.dec()
            self._dirty.pop(writer, None)
            writer.pending.clear()
            self._writers[key].remove(writer)
            if not self._writers[key]:
                del self._writers[key]

    def append(self, writer: DraftWriter, text: str, size: int) -> None:
        """Add text of `size` bytes at the end. Without text, only renew the lease.

        `writer.changed` is set when it is durable.
        """
        writer.accepted_length += size
        writer.pending.append(text)
        self._dirty[writer] = None
        self._start_writing()

    def _start_writing(self) -> None:
        if self._writing is None:
            # An empty context: the statement belongs to no single caller, trace or tenant.
            self._writing = asyncio.create_task(self._write(), context=Context())

    @contextmanager
    def renewing(self, writer: DraftWriter) -> Iterator[None]:
        """Renew the writer's lease from time to time, for the duration of the block."""
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def renew() -> None:
            nonlocal timer
            self.append(writer, "", 0)
            timer = loop.call_later(self._lease_seconds / 3, renew)

        timer = loop.call_later(self._lease_seconds / 3, renew)
        try:
            yield
        finally:
            timer.cancel()

    def raise_if_draining(self) -> None:
        if self._is_draining:
            raise errors.DrainingError()

    def drain(self) -> None:
        """End all writers, present and future, with UNAVAILABLE: the clients resume elsewhere."""
        self._is_draining = True
        for writer in self._all_writers():
            writer.fail(errors.DrainingError())

    async def close(self) -> None:
        await cancel_and_wait(*self._tasks, self._writing)

    def check_drafts(self, key: SessionKey) -> None:
        """Tell the writers of a session whose drafts have ended or were taken over."""
        if writers := self._writers.get(key):
            self._spawn(self._check_drafts(list(writers)))

    def check_all_drafts(self) -> None:
        """As `check_drafts`, for all sessions: notifications may get lost."""
        if writers := self._all_writers():
            self._spawn(self._check_drafts(writers))

    def _all_writers(self) -> list[DraftWriter]:
        return [writer for writers in self._writers.values() for writer in writers]

    async def _check_drafts(self, writers: list[DraftWriter]) -> None:
        try:
            rows = await self._db.fetch_all(
                FIND_LEASES,
                {
                    "tenant_ids": "\n".join(writer.tenant_id for writer in writers),
                    "ids": "\n".join(writer.draft_id for writer in writers),
                },
                lambda *row: row,
            )
        except Exception:  # any error: the next check, or the writer's next text, finds it
            return
        tokens = {(tenant_id, draft_id): token for tenant_id, draft_id, token in rows}
        for writer in writers:
            self._check(writer, tokens.get(writer.key))

    def _check(self, writer: DraftWriter, fencing_token: int | None) -> bool:
        """Whether the draft is still the writer's. Otherwise the writer is told."""
        if fencing_token == writer.fencing_token:
            return True
        if fencing_token is None:
            writer.fail(DraftEnded())
        else:
            writer.fail(drafts.taken_over(writer.draft_id))
        return False

    async def _write(self) -> None:
        """Write batches until no text is pending."""
        try:
            while batch := self._next_batch():
                await self._write_batch(batch)
        finally:
            self._writing = None

    def _next_batch(self) -> list[tuple[DraftWriter, str]]:
        batch: list[tuple[DraftWriter, str]] = []
        size = 0
        for writer in list(self._dirty):
            if len(batch) == MAX_BATCH_DRAFTS or size >= MAX_BATCH_BYTES:
                break
            if writer.is_writing:  # its last piece is still being looked for
                continue
            del self._dirty[writer]
            if writer.error is not None:
                continue
            text = "".join(writer.pending)
            writer.pending.clear()
            writer.is_writing = True
            size += len(text)
            batch.append((writer, text))
        return batch

    async def _write_batch(self, batch: list[tuple[DraftWriter, str]]) -> None:
        started_at = asyncio.get_running_loop().time()
        added: set[tuple[str, str, int]] = set()
        try:
            rows = await self._db.write_pipelined(ADD_PIECES, self._params(batch))
            added = set(rows)
        except errors.StatementCanceledError:
            pass  # the writers did not ask for it: each piece is added alone
        except errors.UnavailableError as error:  # nothing was sent, and a retry would fail too
            for writer, _ in batch:
                # Each writer gets an instance of its own, as each raise adds a traceback.
                writer.fail(errors.UnavailableError(str(error), reason=error.reason))
        except Exception:  # noqa: S110 - each writer meets its own error when its piece is added alone
            pass
        for writer, text in batch:
            # A batch can have a draft twice: of its writer, and of one that was replaced.
            if (*writer.key, writer.fencing_token) in added:
                self._on_added(writer, text)
            elif writer.error is None:
                self._spawn(self._add_alone(writer, text))
            else:
                writer.is_writing = False
        metrics.DRAFT_COMMIT_SECONDS.observe(asyncio.get_running_loop().time() - started_at)
        metrics.DRAFT_COMMIT_DRAFTS.observe(len(batch))

    def _params(self, batch: list[tuple[DraftWriter, str]]) -> dict[str, Any]:
        return {
            "tenant_ids": array_literal(writer.tenant_id for writer, _ in batch),
            "ids": array_literal(writer.draft_id for writer, _ in batch),
            "fencing_tokens": array_literal(writer.fencing_token for writer, _ in batch),
            "start_offsets": array_literal(writer.length for writer, _ in batch),
            "contents": array_literal(text for _, text in batch),
            "lease_seconds": str(self._lease_seconds),
        }

    def _on_added(self, writer: DraftWriter, text: str) -> None:
        """Acknowledge a piece that is committed."""
        size = len(text) if text.isascii() else len(text.encode())
        writer.length += size
        writer.commits += 1
        self._end_writing(writer)
        writer.changed.set()
        if size:
            metrics.DRAFT_PIECES.inc()
            metrics.DRAFT_BYTES.inc(size)
            self._on_written(writer.tenant_id, writer.session_id)

    def _end_writing(self, writer: DraftWriter) -> None:
        writer.is_writing = False
        if writer in self._dirty:
            self._start_writing()

    async def _add_alone(self, writer: DraftWriter, text: str) -> None:
        """Find out whether a piece was added, and add it if it can be."""
        request_context.set_tenant(writer.tenant_id)
        params = {"tenant_id": writer.tenant_id, "id": writer.draft_id}
        start, end = writer.length, writer.length + len(text.encode())
        try:
            for _ in range(LOCKED_RETRIES):
                async with self._adding_alone:
                    token, length = await self._db.fetch_by_key(
                        FIND_LEASE, params, lambda *row: row
                    ) or (None, None)
                    if not self._check(writer, token):
                        return
                    if length not in (start, end):  # a failover has lost what was committed
                        raise errors.ContentionError
                    if (text and length == end) or await self._db.write(
                        ADD_PIECES,
                        self._params([(writer, text)]),
                        lambda *row: row,
                        idempotent=True,
                    ):
                        self._on_added(writer, text)
                        return
                await asyncio.sleep(LOCKED_RETRY_SECONDS)
            raise errors.ContentionError
        except Exception as error:  # any error: the writer learns it, and resumes
            writer.fail(error)
        finally:
            self._end_writing(writer)

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
