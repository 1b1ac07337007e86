"""The feed of a tenant: how soon a change is told, how fast all is read, and what writers pay.

The times from a create to its followers are taken by one client process, by one clock (see
feed_followers.py). Writers are measured on two databases in turn. One lacks what the feed needs:
the index, and the triggers that give a change its position.
"""

import contextlib
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import psycopg

from benchmarks import calls, feed_followers, load, service
from benchmarks.feed_followers import TENANT, Latencies, Reading, Scenario
from benchmarks.figures import Figure
from benchmarks.load import Load
from benchmarks.service import Bench, Server

NAME = "feed"
SECONDS = 120

SESSIONS = 1_000
WRITES_PER_SECOND = 200
PHASE_SECONDS = 2
ONE, TWENTY, CROWDED = (
    f"1 follower, {SESSIONS:,} sessions",
    f"20 followers, {SESSIONS:,} sessions",
    "1 follower, 100,000 sessions that changed last",
)
FOLLOWERS = {ONE: 1, TWENTY: 20, CROWDED: 1}
LATENCY_TARGETS = {"p50": 20, "p99": 100}

ALL_SESSIONS = 1_000_000
READS = 2
READ_TARGET = 50_000  # sessions a second

CALLERS = (16, 64)
CALLERS_SECONDS = 1
APPEND_TARGET = 0.97
UPDATES = 10_000
FEED, BARE = "with the feed", "without its index and triggers"

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"

# As in a shop. Each has changed 20 transactions after the one before, so they are in 306 buckets.
LOAD = """
INSERT INTO chat_sessions
       (tenant_id, id, user_id, title, labels, created_at, updated_at, epoch,
        filter_position, feed_position, feed_bucket)
SELECT %(tenant)s, uuidv7(), 'user-' || n / 10, 'Where is my parcel?',
       jsonb_build_object('plan', 'gold', 'order', 'order-' || n), time, time, '0.' || epoch.id,
       position, position, position >> 16
  FROM (SELECT id, ordinal << 48 FROM chat_epochs) AS epoch (id, start),
       generate_series(1, %(size)s) AS n,
       LATERAL (SELECT now() - n * interval '30 seconds', start + 20 * n) AS last (time, position)
"""
# The read uses none of these. They would take most of the time of the load.
OTHER_INDEXES = """
SELECT indexrelid::regclass FROM pg_index
 WHERE indrelid = 'chat_sessions'::regclass AND NOT indisunique
   AND indexrelid <> 'idx_chat_sessions_feed'::regclass
"""

REMOVE_THE_FEED = (
    "DROP INDEX idx_chat_sessions_feed",
    "ALTER TABLE chat_sessions DISABLE TRIGGER chat_sessions_take_feed_position",
)
# Each is a transaction. They do not wait for the disk, which would hide what they cost.
UPDATE = f"""
DO $$
DECLARE
    ids uuid[] := ARRAY(SELECT id FROM chat_sessions WHERE tenant_id = 'tenant-0');
BEGIN
    PERFORM set_config('synchronous_commit', 'off', false);
    FOR n IN 1..{UPDATES} LOOP
        UPDATE chat_sessions SET revision = revision + 1, updated_at = clock_timestamp()
         WHERE tenant_id = 'tenant-0' AND id = ids[1 + n % cardinality(ids)];
        COMMIT;
    END LOOP;
END
$$;
"""  # noqa: S608 - composed of constants
HOT_UPDATES = """
SELECT n_tup_hot_upd::float / n_tup_upd FROM pg_stat_user_tables WHERE relname = 'chat_sessions'
"""
STATISTICS_SECONDS = 1.5  # until a backend that has become idle has reported


class Appends(NamedTuple):
    """What was measured on the two databases, by how they store."""

    appends: Mapping[tuple[str, int], list[load.Outcome]]  # and by callers
    updates: Mapping[str, list[float]]  # microseconds each
    hot_updates: Mapping[str, float]  # the share of all updates


def measure(bench: Bench) -> list[Figure]:
    return [
        *_latency_figures(_measure_latencies(bench)),
        *_reading_figures(_measure_reading(bench)),
        *_append_figures(_measure_appends(bench)),
    ]


def _measure_latencies(bench: Bench) -> dict[str, list[Latencies]]:
    latencies: dict[str, list[Latencies]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(load.process())
        servers: dict[str, Server] = {}
        ids: dict[str, list[str]] = {}
        for crowd in (0, 100_000):
            url = stack.enter_context(bench.postgres.database())
            log = bench.directory / f"latency-{crowd}.log"
            server = stack.enter_context(service.server(url, log=log))
            names = [CROWDED] if crowd else [ONE, TWENTY]
            written = [str(uuid.uuid4()) for _ in range(SESSIONS)]
            others = [str(uuid.uuid4()) for _ in range(crowd)]
            with psycopg.connect(url, autocommit=True) as db:
                db.execute(CREATE_SESSIONS, (TENANT, written + others))
                db.execute("VACUUM ANALYZE chat_sessions")
            servers |= dict.fromkeys(names, server)
            ids |= dict.fromkeys(names, written)
        for number in range(1, bench.rounds + 1):
            for what, server in servers.items():
                bench.progress(f"round {number}, {what}")
                scenario = Scenario(
                    address=server.address,
                    server=server.pid,
                    postgres=bench.postgres.pid,
                    sessions=ids[what],
                    followers=FOLLOWERS[what],
                    writes_per_second=WRITES_PER_SECOND,
                    seconds=PHASE_SECONDS,
                )
                latencies[what].append(client.submit(feed_followers.follow, scenario).result())
    return latencies


def _latency_figures(latencies: Mapping[str, Sequence[Latencies]]) -> list[Figure]:
    return [
        Figure(
            part=NAME,
            name=f"{what}, {WRITES_PER_SECOND} creates/s, commit to told, {percentile}",
            unit="ms",
            measured=[each.told_ms[percentile] for each in rounds],
            must=None if what == CROWDED else LATENCY_TARGETS[percentile],
            at_most=True,
            note=_describe(rounds, percentile),
            details={"rounds": rounds},
        )
        for what, rounds in latencies.items()
        for percentile in LATENCY_TARGETS
    ]


def _describe(rounds: Sequence[Latencies], percentile: str) -> str:
    whole = statistics.median(each.from_create_ms[percentile] for each in rounds)
    responses = statistics.median(each.responses_per_second for each in rounds)
    cpu = load.cpu_note([each.cpu_us for each in rounds])
    return f"{whole:.1f} ms from the create; {responses:.0f} responses/s; {cpu}"


def _measure_reading(bench: Bench) -> list[Reading]:
    with (
        bench.postgres.database() as url,
        load.process() as client,
    ):
        bench.progress(f"loading {ALL_SESSIONS:,} sessions")
        with psycopg.connect(url, autocommit=True) as db:
            db.execute("SET session_replication_role = replica")  # the trigger gives no position
            for (index,) in db.execute(OTHER_INDEXES).fetchall():
                db.execute(f"DROP INDEX {index}")
            db.execute(LOAD, {"tenant": TENANT, "size": ALL_SESSIONS})
            # Otherwise some of these transactions would be in the future.
            db.execute("SELECT begin_chat_epoch()")
            db.execute("VACUUM (ANALYZE)")
            db.execute("CHECKPOINT")
        readings = []
        with service.server(url, log=bench.directory / "reading.log") as server:
            for number in range(min(READS, bench.rounds)):
                bench.progress(f"read {number + 1}, {ALL_SESSIONS:,} sessions")
                readings.append(
                    client.submit(
                        feed_followers.read_from_the_beginning,
                        server.address,
                        server.pid,
                        bench.postgres.pid,
                        ALL_SESSIONS,
                    ).result()
                )
    return readings


def _reading_figures(readings: Sequence[Reading]) -> list[Figure]:
    size = readings[0].bytes / ALL_SESSIONS
    return [
        Figure(
            part=NAME,
            name=f"{ALL_SESSIONS:,} sessions from the beginning",
            unit="sessions/s",
            measured=[reading.sessions_per_second for reading in readings],
            must=READ_TARGET,
            note=f"{size:.0f} bytes each; {load.cpu_note([each.cpu_us for each in readings])}",
            details={"rounds": readings},
        )
    ]


def _measure_appends(bench: Bench) -> Appends:
    appends: dict[tuple[str, int], list[load.Outcome]] = defaultdict(list)
    updates: dict[str, list[float]] = defaultdict(list)
    path, requests = calls.requests()[calls.CREATE]
    with contextlib.ExitStack() as stack:
        call = stack.enter_context(load.client())
        urls, servers = {}, {}
        for what in (FEED, BARE):
            url = urls[what] = stack.enter_context(bench.postgres.database())
            with psycopg.connect(url, autocommit=True) as db:
                calls.create_sessions(db)
                for statement in REMOVE_THE_FEED if what == BARE else ():
                    db.execute(statement)
            log = bench.directory / f"appends {what}.log"
            servers[what] = stack.enter_context(service.server(url, log=log))

        def append(what: str, callers: int, seconds: float) -> load.Outcome:
            return call(
                Load(
                    address=servers[what].address,
                    path=path,
                    requests=requests,
                    callers=callers,
                    seconds=seconds,
                    watched={"server": servers[what].pid, "postgres": bench.postgres.pid},
                )
            )

        for what in servers:
            append(what, CALLERS[-1], CALLERS_SECONDS)  # a warm-up
            # Otherwise appends slow down until autovacuum comes, to one database before the other.
            with psycopg.connect(urls[what], autocommit=True) as db:
                db.execute("VACUUM (ANALYZE)")
        for number in range(1, bench.rounds + 1):
            # Each is the first one as often as the other.
            order = (FEED, BARE) if number % 2 else (BARE, FEED)
            for callers in CALLERS:
                for what in order:
                    bench.progress(f"round {number}, {callers} callers, {what}")
                    appends[what, callers].append(append(what, callers, CALLERS_SECONDS))
            for what in order:
                seconds = bench.postgres.psql_seconds(urls[what], UPDATE)
                updates[what].append(1e6 * seconds / UPDATES)
        time.sleep(STATISTICS_SECONDS)
        return Appends(appends, updates, {what: _hot_updates(url) for what, url in urls.items()})


def _hot_updates(url: str) -> float:
    with psycopg.connect(url) as db:
        row = db.execute(HOT_UPDATES).fetchone()
    return float(row[0]) if row else 0.0


def _append_figures(measured: Appends) -> list[Figure]:
    figures = []
    for callers in CALLERS:
        ours, bare = measured.appends[FEED, callers], measured.appends[BARE, callers]
        figures += [
            Figure(
                part=NAME,
                name=f"CreateChatMessage, {callers} callers, {FEED}",
                unit="calls/s",
                measured=[outcome.calls_per_second for outcome in ours],
                limit=[outcome.calls_per_second for outcome in bare],
                against="without",
                must=APPEND_TARGET,
                note=load.note(ours),
                details={"with": ours, "without": bare},
            ),
            Figure(
                part=NAME,
                name=f"CPU of CreateChatMessage, {callers} callers, {FEED}",
                unit="µs",
                measured=[_cpu(outcome) for outcome in ours],
                limit=[_cpu(outcome) for outcome in bare],
                against="without",
                at_most=True,
                note="server and PostgreSQL",
            ),
        ]
    return [
        *figures,
        Figure(
            part=NAME,
            name=f"UPDATE of a session in plain SQL, {FEED}",
            unit="µs",
            measured=measured.updates[FEED],
            limit=measured.updates[BARE],
            against="without",
            at_most=True,
            note="one transaction each, without waiting for the disk",
        ),
        Figure(
            part=NAME,
            name=f"HOT updates among all updates of sessions, {FEED}",
            unit="",
            measured=[measured.hot_updates[FEED]],
            limit=[measured.hot_updates[BARE]],
            against="without",
        ),
    ]


def _cpu(outcome: load.Outcome) -> float:
    return outcome.cpu_us["server"] + outcome.cpu_us["postgres"]
