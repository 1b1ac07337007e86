"""Following: how long after a create its events come, and what it costs those who write.

Both moments are taken in one client process, by one clock: before the create goes to its socket,
and after the event was read from its own. What the client does with an event comes after that.
"""

import statistics
import uuid
from collections import defaultdict
from collections.abc import Sequence

import psycopg

from benchmarks import load, service, variants, watchers
from benchmarks.figures import Figure
from benchmarks.service import Bench, Server
from benchmarks.watchers import TENANT, Outcome, Scene

NAME = "follow"
SECONDS = 130

WATCHERS = 1_000
IDLE = 10_000

MANY, ONE, BARE, IDLES = (
    f"{WATCHERS:,} watchers of {WATCHERS:,} sessions",
    f"{WATCHERS:,} watchers of one session",
    f"{WATCHERS:,} watchers of one session, by gRPC alone",
    f"{IDLE:,} watchers of {IDLE:,} sessions",
)
WRITES_PER_SECOND = {MANY: 150, ONE: 5, BARE: 5, IDLES: 50}
PHASE_SECONDS = {MANY: 4, ONE: 4, BARE: 4, IDLES: 4}
MUST = {MANY: {"p50": 4, "p99": 20}, ONE: {"p50": 20, "p99": 60}}

CALLERS = 16
CALLERS_SECONDS = 2
OFF, ON, WATCHED = "following off", "following on", f"{WATCHERS:,} watchers of what is written"

CREATE_SESSIONS = "INSERT INTO chat_sessions (tenant_id, id) SELECT %s, unnest(%s::uuid[])"


def measure(bench: Bench) -> list[Figure]:
    found: dict[str, list[Outcome]] = defaultdict(list)
    with (
        bench.postgres.database() as url,
        psycopg.connect(url, autocommit=True) as db,
        load.process() as client,
    ):

        def sessions(count: int) -> list[str]:
            ids = [str(uuid.uuid4()) for _ in range(count)]
            db.execute(CREATE_SESSIONS, (TENANT, ids))
            return ids

        def play(what: str, scene: Scene) -> None:
            bench.progress(f"round {len(found[what]) + 1}, {what}")
            found[what].append(client.submit(watchers.play, scene).result())

        def follow(what: str, server: Server, ids: Sequence[str], watched: Sequence[str]) -> None:
            scene = Scene(
                address=server.address,
                server=server.pid,
                postgres=bench.postgres.pid,
                sessions=ids,
                watched=watched,
                callers=CALLERS,
                writes_per_second=WRITES_PER_SECOND[what],
                seconds=PHASE_SECONDS[what],
            )
            play(what, scene)

        def write(what: str, server: Server, watched: int) -> None:
            ids = sessions(WATCHERS)
            scene = Scene(
                address=server.address,
                server=server.pid,
                postgres=bench.postgres.pid,
                sessions=ids,
                watched=ids[:watched],
                callers=CALLERS,
                seconds=CALLERS_SECONDS,
            )
            play(what, scene)

        with (
            service.server(url, log=bench.directory / "server.log") as server,
            service.server(
                url,
                variants.UNFOLLOWED,
                log=bench.directory / "unfollowed.log",
                module="benchmarks.variants",
            ) as unfollowed,
            service.server(
                url,
                variants.BARE,
                log=bench.directory / "bare.log",
                module="benchmarks.variants",
            ) as bare,
        ):
            for _ in range(bench.rounds):
                ids = sessions(WATCHERS)
                follow(MANY, server, ids, ids)
                ids = sessions(1)
                follow(ONE, server, ids, ids * WATCHERS)
                follow(BARE, bare, ids, ids * WATCHERS)
                write(OFF, unfollowed, 0)
                write(ON, server, 0)
                write(WATCHED, server, WATCHERS)
        with service.server(url, log=bench.directory / "idle.log") as server:
            ids = sessions(IDLE)
            follow(IDLES, server, ids, ids)
    return _figures(found)


def _figures(found: dict[str, list[Outcome]]) -> list[Figure]:
    figures = [
        Figure(
            part=NAME,
            name=f"{what}, {WRITES_PER_SECOND[what]} writes/s, {percentile}",
            unit="ms",
            measured=[outcome.latency_ms[percentile] for outcome in found[what]],
            must=MUST.get(what, {}).get(percentile),
            at_most=True,
            note=_note(found[what]),
            details={"rounds": found[what]},
        )
        for what in (MANY, ONE, BARE, IDLES)
        for percentile in ("p50", "p99")
    ]
    figures.append(
        Figure(
            part=NAME,
            name=f"memory of a watcher, {IDLES}",
            unit="KiB",
            measured=[outcome.watcher_bytes / 1024 for outcome in found[IDLES]],
        )
    )
    for what, must in ((ON, 0.9), (WATCHED, None)):
        figures.append(
            Figure(
                part=NAME,
                name=f"CreateChatMessage, {CALLERS} callers, {what}",
                unit="calls/s",
                measured=[outcome.writes_per_second for outcome in found[what]],
                limit=[outcome.writes_per_second for outcome in found[OFF]],
                against=OFF,
                must=must,
                note=_note(found[what]),
                details={"off": found[OFF], "rounds": found[what]},
            )
        )
    return figures


def _note(outcomes: Sequence[Outcome]) -> str:
    rate = statistics.median(outcome.writes_per_second for outcome in outcomes)
    return f"{rate:.0f} writes/s; {load.cpu_note([each.cpu_us for each in outcomes])}"
