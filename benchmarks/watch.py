"""Watching: the time from a create to its events, and what watchers cost writers.

One client process takes both times, by one clock: before it writes the create to a socket, and
after it has read the event from another. It decodes the event only afterwards.
"""

import statistics
import uuid
from collections import defaultdict
from collections.abc import Sequence

import psycopg

from benchmarks import load, service, variants, watchers
from benchmarks.figures import Figure
from benchmarks.service import Bench, Server
from benchmarks.watchers import TENANT, Outcome, Scenario

NAME = "watch"
SECONDS = 90

WATCHERS = 1_000
IDLE = 10_000

MANY, ONE, BARE, IDLE_MANY = (
    f"{WATCHERS:,} watchers of {WATCHERS:,} sessions",
    f"{WATCHERS:,} watchers of one session",
    f"{WATCHERS:,} watchers of one session, gRPC alone",
    f"{IDLE:,} watchers of {IDLE:,} sessions",
)
WRITES_PER_SECOND = {MANY: 150, ONE: 5, BARE: 5, IDLE_MANY: 50}
PHASE_SECONDS = {MANY: 4, ONE: 4, BARE: 4, IDLE_MANY: 4}
TARGETS = {MANY: {"p50": 4, "p99": 20}, ONE: {"p50": 20, "p99": 60}}

CALLERS = 16
CALLERS_SECONDS = 2
OFF, ON, WATCHED = "watch off", "watch on", f"{WATCHERS:,} watchers of the written sessions"

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"


def measure(bench: Bench) -> list[Figure]:
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    with (
        bench.postgres.database() as url,
        psycopg.connect(url, autocommit=True) as db,
        load.process() as client,
    ):

        def sessions(count: int) -> list[str]:
            ids = [str(uuid.uuid4()) for _ in range(count)]
            db.execute(CREATE_SESSIONS, (TENANT, ids))
            return ids

        def run(what: str, scenario: Scenario) -> None:
            bench.progress(f"round {len(outcomes[what]) + 1}, {what}")
            outcomes[what].append(client.submit(watchers.run, scenario).result())

        def measure_latency(
            what: str, server: Server, ids: Sequence[str], watched: Sequence[str]
        ) -> None:
            scenario = Scenario(
                address=server.address,
                server=server.pid,
                postgres=bench.postgres.pid,
                sessions=ids,
                watched=watched,
                callers=CALLERS,
                writes_per_second=WRITES_PER_SECOND[what],
                seconds=PHASE_SECONDS[what],
            )
            run(what, scenario)

        def measure_writes(what: str, server: Server, watched: int) -> None:
            ids = sessions(WATCHERS)
            scenario = Scenario(
                address=server.address,
                server=server.pid,
                postgres=bench.postgres.pid,
                sessions=ids,
                watched=ids[:watched],
                callers=CALLERS,
                seconds=CALLERS_SECONDS,
            )
            run(what, scenario)

        with (
            service.server(url, log=bench.directory / "server.log") as server,
            service.server(
                url,
                variants.WITHOUT_WATCH,
                log=bench.directory / "unwatched.log",
                module="benchmarks.variants",
            ) as unwatched,
            service.server(
                url,
                variants.BARE,
                log=bench.directory / "bare.log",
                module="benchmarks.variants",
            ) as bare,
        ):
            for _ in range(bench.rounds):
                ids = sessions(WATCHERS)
                measure_latency(MANY, server, ids, ids)
                ids = sessions(1)
                measure_latency(ONE, server, ids, ids * WATCHERS)
                if bench.with_limits:
                    measure_latency(BARE, bare, ids, ids * WATCHERS)
                    measure_writes(OFF, unwatched, 0)
                measure_writes(ON, server, 0)
                measure_writes(WATCHED, server, WATCHERS)
        with service.server(url, log=bench.directory / "idle.log") as server:
            ids = sessions(IDLE)
            measure_latency(IDLE_MANY, server, ids, ids)
    return _figures(outcomes)


def _figures(outcomes: dict[str, list[Outcome]]) -> list[Figure]:
    figures = [
        Figure(
            part=NAME,
            name=f"{what}, {WRITES_PER_SECOND[what]} writes/s, {percentile}",
            unit="ms",
            measured=[outcome.latency_ms[percentile] for outcome in outcomes[what]],
            must=TARGETS.get(what, {}).get(percentile),
            at_most=True,
            note=_describe(outcomes[what]),
            details={"rounds": outcomes[what]},
        )
        for what in (MANY, ONE, BARE, IDLE_MANY)
        if what in outcomes
        for percentile in ("p50", "p99")
    ]
    figures += [
        Figure(
            part=NAME,
            name=f"CPU of the server, a write with its events, {what}",
            unit="µs",
            measured=[outcome.cpu_us["server"] for outcome in outcomes[what]],
            at_most=True,
        )
        for what in (MANY, ONE, ON)
    ]
    figures.append(
        Figure(
            part=NAME,
            name=f"memory of a watcher, {IDLE_MANY}",
            unit="KiB",
            measured=[outcome.watcher_bytes / 1024 for outcome in outcomes[IDLE_MANY]],
            at_most=True,
        )
    )
    for what, must in ((ON, 0.9), (WATCHED, None)):
        figures.append(
            Figure(
                part=NAME,
                name=f"CreateChatMessage, {CALLERS} callers, {what}",
                unit="calls/s",
                measured=[outcome.writes_per_second for outcome in outcomes[what]],
                limit=[outcome.writes_per_second for outcome in outcomes[OFF]],
                against=OFF,
                must=must,
                note=_describe(outcomes[what]),
                details={"off": outcomes[OFF], "rounds": outcomes[what]},
            )
        )
    return figures


def _describe(rounds: Sequence[Outcome]) -> str:
    rate = statistics.median(outcome.writes_per_second for outcome in rounds)
    return f"{rate:.0f} writes/s; {load.cpu_note([outcome.cpu_us for outcome in rounds])}"
