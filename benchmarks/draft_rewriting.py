"""Writing answers by UPDATE content = content || piece, in plain SQL. Used by `drafts`.

One connection writes for all answers, as a group commit does: a statement has the pieces of all
answers that came while the one before was in flight. There is no service between, and no follower.
"""

import time
import uuid
from collections import Counter

import psycopg

from benchmarks import chats, draft_clients, draft_storage
from benchmarks.draft_clients import PIECE_BYTES, PIECES_BEFORE, Meter, Outcome, Scenario

MAX_ANSWERS = 256  # of a statement
LATE_SECONDS = 10  # how far the statements may fall behind


def run(scenario: Scenario) -> Outcome:
    """Write at the scenario's rate, into a database that is set up for a column of the content."""
    with (
        psycopg.connect(scenario.database_url, autocommit=True, prepare_threshold=0) as db,
        psycopg.connect(scenario.database_url, autocommit=True) as metered,
    ):
        return _Writing(scenario, db).run(metered)


class _Writing:
    def __init__(self, scenario: Scenario, db: psycopg.Connection):
        self._scenario = scenario
        self._db = db
        seconds = draft_clients.WARM_UP_SECONDS + scenario.seconds + LATE_SECONDS
        count = PIECES_BEFORE + int(seconds * scenario.pieces_per_second)
        self._pieces = chats.pieces(count, PIECE_BYTES)
        self._ids = [str(uuid.uuid4()) for _ in scenario.sessions]
        self._written: Counter[str] = Counter()  # pieces, by draft

    def run(self, metered: psycopg.Connection) -> Outcome:
        for draft_id, session_id in zip(self._ids, self._scenario.sessions, strict=True):
            draft_storage.begin(self._db, draft_id, session_id)
        self._add(Counter(dict.fromkeys(self._ids, PIECES_BEFORE)))
        clock = draft_clients.clock
        pause = 1 / self._scenario.pieces_per_second / len(self._ids)
        start = clock()
        begin, end = start + draft_clients.WARM_UP_SECONDS, float("inf")
        meter = None
        latencies: list[float] = []
        number = 0  # of the next piece
        while (now := clock()) < end:
            if meter is None and now >= begin:
                meter = Meter(metered, {"postgres": self._scenario.postgres})
                begin = clock()
                end = begin + self._scenario.seconds
            due_at = []
            due: Counter[str] = Counter()
            while (at := start + number * pause) <= now and len(due) < MAX_ANSWERS:
                due_at.append(at)
                due[self._ids[number % len(self._ids)]] += 1
                number += 1
            if due:
                self._add(due)
                done = clock()
                latencies += [done - at for at in due_at if at >= begin and meter]
            else:
                time.sleep(at - now)
        if meter is None:
            raise RuntimeError("nothing was measured")
        cpu_us, wal_bytes = meter.per_piece(len(latencies))
        return Outcome(
            pieces_per_second=len(latencies) / self._scenario.seconds,
            acknowledged_ms=draft_clients.percentiles(latencies),
            followed_ms={},
            cpu_us=cpu_us,
            wal_bytes=wal_bytes,
        )

    def _add(self, counts: Counter[str]) -> None:
        """Add the next pieces of these drafts, durably."""
        starts = {draft_id: self._written[draft_id] for draft_id in counts}
        rows = self._db.execute(
            draft_storage.ADD_CONTENT,
            draft_storage.piece_params(
                list(counts),
                [PIECE_BYTES * start for start in starts.values()],
                ["".join(self._pieces[start : start + counts[i]]) for i, start in starts.items()],
            ),
        ).fetchall()
        if len(rows) != len(counts):
            raise RuntimeError(f"{len(rows)} of {len(counts)} drafts are written")
        self._written += counts
