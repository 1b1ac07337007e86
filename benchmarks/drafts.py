"""Drafts: the time from a piece of an answer to its acknowledgement and to its followers.

The same answers are also written as a message per piece, through the same server, and by UPDATE
content = content || piece, in plain SQL without a server. PostgreSQL's part is then measured alone.
"""

import contextlib
import statistics
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import psycopg

from benchmarks import draft_clients, draft_rewriting, draft_storage, load, service
from benchmarks.draft_clients import PIECE_BYTES, TENANT, Outcome, Scenario
from benchmarks.draft_storage import Cost, Way, Workload
from benchmarks.figures import Figure
from benchmarks.service import Bench

NAME = "drafts"
SECONDS = 100

WRITERS = 200
FOLLOWERS = 1_000
PIECES_PER_SECOND = 20
PHASE_SECONDS = 3

ALONE = "one answer"
MANY = f"{WRITERS} answers"
ONE = f"{FOLLOWERS:,} followers of one answer"
MESSAGES, REWRITTEN = "a message per piece", "content || piece in SQL"
MANY_MESSAGES, MANY_REWRITTEN = f"{MANY}, {MESSAGES}", f"{MANY}, {REWRITTEN}"

ACKNOWLEDGED, FOLLOWED = "to its acknowledgement", "to its follower"
TARGETS = {
    (ALONE, FOLLOWED): {"p50": 5},
    (MANY, ACKNOWLEDGED): {"p50": 60, "p99": 250},
    (MANY, FOLLOWED): {"p50": 60, "p99": 250},
}

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"


def measure(bench: Bench) -> list[Figure]:
    outcomes, costs = _measure_writing(bench), _measure_storage(bench)
    return _latency_figures(outcomes) + _cost_figures(outcomes) + _storage_figures(costs)


def _measure_writing(bench: Bench) -> dict[str, list[Outcome]]:
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        rewritten_url = stack.enter_context(bench.postgres.database())
        server = stack.enter_context(service.server(url, log=bench.directory / "server.log"))
        client = stack.enter_context(load.process())
        with psycopg.connect(rewritten_url, autocommit=True) as db:
            for statement in draft_storage.REWRITTEN.setup:
                db.execute(statement)

        def run(
            what: str,
            measured: Callable[[Scenario], Outcome],
            writers: int,
            followers: int,
            database_url: str = url,
        ) -> None:
            bench.progress(f"round {len(outcomes[what]) + 1}, {what}")
            session_ids = [str(uuid.uuid4()) for _ in range(writers)]
            with psycopg.connect(database_url, autocommit=True) as db:
                db.execute(CREATE_SESSIONS, (TENANT, session_ids))
                db.execute("ANALYZE chat_sessions")
            scenario = Scenario(
                address=server.address,
                database_url=database_url,
                server=server.pid,
                postgres=bench.postgres.pid,
                sessions=session_ids,
                followers=followers,
                pieces_per_second=PIECES_PER_SECOND,
                seconds=PHASE_SECONDS,
            )
            outcomes[what].append(client.submit(measured, scenario).result())

        for _ in range(bench.rounds):
            run(ALONE, draft_clients.run_drafts, 1, 1)
            run(MANY, draft_clients.run_drafts, WRITERS, 1)
            run(MANY_MESSAGES, draft_clients.run_messages, WRITERS, 1)
            run(MANY_REWRITTEN, draft_rewriting.run, WRITERS, 0, rewritten_url)
            run(ONE, draft_clients.run_drafts, 1, FOLLOWERS)
    return outcomes


def _measure_storage(bench: Bench) -> dict[tuple[Workload, Way], Cost]:
    costs = {}
    for workload in draft_storage.WORKLOADS:
        for way in draft_storage.WAYS:
            bench.progress(f"{workload.name}, {way.name}")
            costs[workload, way] = draft_storage.measure(bench, way, workload)
    return costs


def _latency_figures(outcomes: Mapping[str, Sequence[Outcome]]) -> list[Figure]:
    figures = []
    for what, rounds in outcomes.items():
        latencies = {
            ACKNOWLEDGED: [outcome.acknowledged_ms for outcome in rounds],
            FOLLOWED: [outcome.followed_ms for outcome in rounds if outcome.followed_ms],
        }
        figures += [
            Figure(
                part=NAME,
                name=f"{what}, piece {end}, {percentile}",
                unit="ms",
                measured=[latency[percentile] for latency in measured],
                must=TARGETS.get((what, end), {}).get(percentile),
                at_most=True,
                note=_describe(rounds),
                details={"rounds": rounds},
            )
            for end, measured in latencies.items()
            if measured
            for percentile in ("p50", "p99")
        ]
    return figures


def _cost_figures(outcomes: Mapping[str, Sequence[Outcome]]) -> list[Figure]:
    """The costs of a piece of many answers, compared with the other ways to write them."""
    figures = []
    for what, against in ((MANY_MESSAGES, MESSAGES), (MANY_REWRITTEN, REWRITTEN)):
        costs = [_costs(rounds) for rounds in (outcomes[MANY], outcomes[what])]
        figures += [
            Figure(
                part=NAME,
                name=f"{MANY}, {name}",
                unit="bytes/piece" if name == "WAL" else "µs/piece",
                measured=costs[0][name],
                limit=limit,
                against=against,
                at_most=True,
            )
            for name, limit in costs[1].items()
        ]
    return figures


def _costs(rounds: Sequence[Outcome]) -> dict[str, list[float]]:
    processes = {"server": "CPU of the server", "postgres": "PostgreSQL's CPU"}
    return {"WAL": [outcome.wal_bytes for outcome in rounds]} | {
        name: [outcome.cpu_us[process] for outcome in rounds]
        for process, name in processes.items()
        if process in rounds[0].cpu_us
    }


def _describe(rounds: Sequence[Outcome]) -> str:
    rate = statistics.median(outcome.pieces_per_second for outcome in rounds)
    wal = statistics.median(outcome.wal_bytes for outcome in rounds)
    cpu = load.cpu_note([outcome.cpu_us for outcome in rounds])
    return f"{rate:,.0f} pieces/s of {PIECE_BYTES} bytes; WAL {wal:,.0f} bytes; {cpu}"


def _storage_figures(costs: Mapping[tuple[Workload, Way], Cost]) -> list[Figure]:
    """Of one round: the bytes are the same in each."""
    figures = []
    for (workload, way), cost in costs.items():
        if way is draft_storage.PIECES:
            continue
        ours = costs[workload, draft_storage.PIECES]
        for name, unit, measured, limit in (
            ("WAL", "bytes/piece", ours.wal_bytes, cost.wal_bytes),
            ("PostgreSQL's CPU", "µs/piece", ours.cpu_us, cost.cpu_us),
            ("tables afterwards", "MB", ours.table_bytes / 1e6, cost.table_bytes / 1e6),
        ):
            figures.append(
                Figure(
                    part=NAME,
                    name=f"storage alone, {workload.name}, {name}",
                    unit=unit,
                    measured=[measured],
                    limit=[limit],
                    against=way.name,
                    at_most=True,
                    details={"ours": ours, "other": cost},
                )
            )
    return figures
