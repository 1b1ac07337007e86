"""What it costs PostgreSQL to store an answer piece by piece, in several ways. Used by `drafts`.

Each way stores the same answers through one connection, by statements of one or of many pieces, as
a group commit sends them, and then makes a message of each. Nothing waits for the disk.
"""

import contextlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import uuid_utils

from benchmarks import chats
from benchmarks.service import Bench, Postgres, cpu_seconds
from chat_ticket_svc.store import append, draft_commit, drafts, group_commit
from chat_ticket_svc.store.append import array_literal
from chat_ticket_svc.store.messages import NewMessage

TENANT = "acme"
PIECE_BYTES = 100

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"

# As ADD_PIECES, but the content is a column of the draft. PostgreSQL compresses it as it does by
# default: without, it takes less CPU, and more WAL and space.
CONTENT_COLUMN = "ALTER TABLE chat_drafts ADD COLUMN content text NOT NULL DEFAULT ''"
ADD_CONTENT = f"""
WITH new AS MATERIALIZED (
    SELECT *
      FROM unnest((SELECT %(tenant_ids)s::text[]), (SELECT %(ids)s::uuid[]),
                  (SELECT %(fencing_tokens)s::bigint[]), (SELECT %(start_offsets)s::bigint[]),
                  (SELECT %(contents)s::text[]))
               AS new (tenant_id, id, fencing_token, start_offset, content)
), locked AS MATERIALIZED (
    SELECT d.tenant_id, d.id, new.content
      FROM new
      JOIN chat_drafts d ON d.tenant_id = new.tenant_id AND d.id = new.id
     WHERE d.fencing_token = new.fencing_token AND d.length = new.start_offset
       FOR NO KEY UPDATE OF d SKIP LOCKED
)
UPDATE chat_drafts d
   SET length = d.length + octet_length(locked.content), expires_at = {drafts.EXPIRES_AT},
       content = d.content || locked.content
  FROM locked
 WHERE d.tenant_id = locked.tenant_id AND d.id = locked.id
RETURNING d.tenant_id, d.id::text
"""  # noqa: S608 - composed of constants
READ_CONTENT_COLUMN = """
SELECT content FROM chat_drafts WHERE tenant_id = %(tenant_id)s AND id = %(id)s::uuid
"""
LEASE_SECONDS = "60"

# Commits with a wait for the disk.
FLUSH = """
SELECT set_config('synchronous_commit', 'on', true), pg_logical_emit_message(true, 'bench', '')
"""
WAL = """
SELECT sum(record_size)::bigint, sum(fpi_size)::bigint
  FROM pg_get_wal_stats(%s, pg_current_wal_flush_lsn())
"""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to store pieces. `setup` is run after the migrations."""

    name: str
    statement: str
    setup: Sequence[str] = ()
    read: str = ""  # the whole content; empty if the pieces are messages

    @property
    def tables(self) -> Sequence[str]:
        return ("chat_drafts", "chat_draft_pieces") if self.read else ("chat_messages",)


PIECES = Way(name="rows of pieces", statement=draft_commit.ADD_PIECES, read=drafts.READ_CONTENT)
REWRITTEN = Way(
    name="content || piece",
    statement=ADD_CONTENT,
    setup=(CONTENT_COLUMN,),
    read=READ_CONTENT_COLUMN,
)
MESSAGES = Way(name="a message per piece", statement=group_commit.APPEND_BATCH)

WAYS = (PIECES, REWRITTEN, MESSAGES)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Answers of `pieces` pieces. `together` answers are written at once, one statement for each
    `grouped` of them.
    """

    name: str
    pieces: int
    answers: int
    together: int = 1
    grouped: int = 1


ALONE = Workload(name="4 KiB, alone", pieces=40, answers=50)
TOGETHER = Workload(name="4 KiB, 200 at once", pieces=40, answers=600, together=200, grouped=50)
LONG = Workload(name="64 KiB, alone", pieces=640, answers=2)
WORKLOADS = (ALONE, TOGETHER, LONG)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What storing costs: per piece while it is written, and per answer when it is finished."""

    wal_bytes: float  # without full-page images
    full_page_bytes: float  # of the first change of each page after a checkpoint
    cpu_us: float  # of the connection's process
    all_cpu_us: float  # of all processes of PostgreSQL
    finish_wal_bytes: float
    finish_cpu_us: float
    table_bytes: int  # with indexes and TOAST, when all answers are finished


def measure(bench: Bench, way: Way, workload: Workload) -> Cost:
    with (
        bench.postgres.database() as url,
        psycopg.connect(url, autocommit=True, prepare_threshold=0) as db,
    ):
        db.execute("CREATE EXTENSION pg_walinspect")
        db.execute("SET synchronous_commit = off")
        for statement in way.setup:
            db.execute(statement)
        run = _Run(bench.postgres, db, way, workload)
        run.store_answers()  # a warm-up
        db.execute("VACUUM ANALYZE")  # and plans that know the tables
        db.execute("CHECKPOINT")
        run.reset()
        for _ in range(workload.answers // workload.together):
            run.store_answers()
        return run.cost()


def begin(db: psycopg.Connection, draft_id: str, session_id: str) -> None:
    """Begin a draft, with any of the ways that have one."""
    # With the fencing token 1, which piece_params names.
    db.execute(
        """
        INSERT INTO chat_drafts (tenant_id, id, session_id, role, expires_at)
        VALUES (%s, %s::uuid, %s::uuid, 'assistant', now() + interval '1 hour')
        """,
        (TENANT, draft_id, session_id),
    )


def piece_params(
    ids: Sequence[str], start_offsets: Sequence[int], contents: Sequence[str]
) -> Mapping[str, Any]:
    """The parameters that add a piece to each of these drafts."""
    return {
        "tenant_ids": array_literal([TENANT] * len(ids)),
        "ids": array_literal(ids),
        "fencing_tokens": array_literal([1] * len(ids)),
        "start_offsets": array_literal(start_offsets),
        "contents": array_literal(contents),
        "lease_seconds": LEASE_SECONDS,
    }


class _Run:
    def __init__(self, postgres: Postgres, db: psycopg.Connection, way: Way, workload: Workload):
        self._postgres = postgres
        self._db = db
        self._way = way
        self._workload = workload
        self._pieces = chats.pieces(workload.pieces, PIECE_BYTES)
        self.reset()

    def reset(self) -> None:
        self._writing = dict.fromkeys(("wal", "full_page", "cpu", "all_cpu"), 0.0)
        self._finishing = dict(self._writing)

    def cost(self) -> Cost:
        pieces = self._workload.answers * self._workload.pieces
        return Cost(
            wal_bytes=self._writing["wal"] / pieces,
            full_page_bytes=self._writing["full_page"] / pieces,
            cpu_us=1e6 * self._writing["cpu"] / pieces,
            all_cpu_us=1e6 * self._writing["all_cpu"] / pieces,
            finish_wal_bytes=self._finishing["wal"] / self._workload.answers,
            finish_cpu_us=1e6 * self._finishing["cpu"] / self._workload.answers,
            table_bytes=sum(
                self._row("SELECT pg_total_relation_size(%s)", (table,))[0]
                for table in self._way.tables
            ),
        )

    def store_answers(self) -> None:
        """Store as many answers as are written at once."""
        ids = [str(uuid_utils.uuid7()) for _ in range(self._workload.together)]
        session_ids = [str(uuid.uuid4()) for _ in ids]
        self._db.execute(CREATE_SESSIONS, (TENANT, session_ids))
        if self._way.read:
            for draft_id, session_id in zip(ids, session_ids, strict=True):
                begin(self._db, draft_id, session_id)
        with self._measured(self._writing):
            self._write(ids, session_ids)
        if self._way.read:
            with self._measured(self._finishing):
                for draft_id, session_id in zip(ids, session_ids, strict=True):
                    self._finish(draft_id, session_id)

    def _write(self, ids: Sequence[str], session_ids: Sequence[str]) -> None:
        for number, piece in enumerate(self._pieces):
            for at in range(0, len(ids), self._workload.grouped):
                group = slice(at, at + self._workload.grouped)
                written = self._db.execute(
                    self._way.statement,
                    self._params(ids[group], session_ids[group], number * PIECE_BYTES, piece),
                ).fetchall()
                if len(written) != len(ids[group]):
                    raise RuntimeError(f"{len(written)} of {len(ids[group])} pieces are written")

    def _params(
        self, ids: Sequence[str], session_ids: Sequence[str], offset: int, piece: str
    ) -> Mapping[str, Any]:
        count = len(ids)
        if self._way.read:
            return piece_params(ids, [offset] * count, [piece] * count)
        nulls = array_literal([None] * count)
        return {
            "tenant_ids": array_literal([TENANT] * count),
            "session_ids": array_literal(session_ids),
            "ids": array_literal(str(uuid_utils.uuid7()) for _ in ids),
            "roles": array_literal(["assistant"] * count),
            "contents": array_literal([piece] * count),
            "language_codes": nulls,
            "search_languages": nulls,
            "search_language": "english",
            "metadatas": nulls,
            "author_kinds": nulls,
            "author_ids": nulls,
            "expected_revisions": nulls,
        }

    def _finish(self, draft_id: str, session_id: str) -> None:
        """Make the message of a draft."""
        params = {"tenant_id": TENANT, "id": draft_id}
        with self._db.transaction():
            self._db.execute(drafts.LOCK, params)
            content = self._row(self._way.read, params)[0]
            if content != "".join(self._pieces):
                raise RuntimeError("the content is not what was written")
            self._db.execute(drafts.DELETE, params)
            message = NewMessage(draft_id, "assistant", content, None, None, (), None, None)
            self._db.execute(
                append.APPEND, append.append_params(TENANT, session_id, [message], "english")
            )

    @contextlib.contextmanager
    def _measured(self, total: dict[str, float]) -> Iterator[None]:
        """Add what PostgreSQL uses meanwhile."""
        [position] = self._row("SELECT pg_current_wal_insert_lsn()")
        cpu, all_cpu = self._cpu_seconds(), cpu_seconds(self._postgres.pid)
        yield
        total["cpu"] += self._cpu_seconds() - cpu
        total["all_cpu"] += cpu_seconds(self._postgres.pid) - all_cpu
        self._db.execute(FLUSH)
        records, images = self._row(WAL, (position,))
        total["wal"] += records
        total["full_page"] += images

    def _cpu_seconds(self) -> float:
        """The CPU time of the connection's process, more exact than in /proc/PID/stat."""
        statistics = Path(f"/proc/{self._db.info.backend_pid}/schedstat").read_text()
        return int(statistics.split()[0]) / 1e9

    def _row(self, statement: str, params: Any = None) -> tuple[Any, ...]:
        [row] = self._db.execute(statement, params).fetchall()
        return row
