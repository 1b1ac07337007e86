"""What a second worker process adds, where PostgreSQL and the client take their share as well."""

import contextlib
import subprocess
import sys
from collections import defaultdict

import psycopg

from benchmarks import calls, load, service
from benchmarks.figures import Figure
from benchmarks.load import Load, Outcome
from benchmarks.service import Bench

NAME = "workers"
SECONDS = 50

CALLERS = 64  # each on a connection of its own: the kernel spreads those over the workers
PHASE_SECONDS = 1.5
WARM_UP_SECONDS = 0.5
WORKERS = (1, 2)


def measure(bench: Bench) -> list[Figure]:
    usage = subprocess.run(
        [sys.executable, "-m", "chat_ticket_svc", "serve", "--help"], capture_output=True, text=True
    )
    if "--workers" not in usage.stdout:
        print("workers: skipped, the service has no such option")
        return []
    found: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(bench.postgres.database())
        with psycopg.connect(url, autocommit=True) as db:
            calls.create_sessions(db)
        servers = {
            count: stack.enter_context(
                service.server(url, log=bench.directory / f"{count}.log", workers=count)
            )
            for count in WORKERS
        }
        call = stack.enter_context(load.client())
        prepared = calls.requests()
        for number in range(bench.rounds + 1):  # the first warms up
            for what in (calls.GET, calls.CREATE):
                path, requests = prepared[what]
                for count, server in servers.items():
                    bench.progress(f"round {number}, {what}, {count} workers")
                    outcome = call(
                        Load(
                            address=server.address,
                            path=path,
                            requests=requests,
                            callers=CALLERS,
                            connections=CALLERS,
                            seconds=PHASE_SECONDS if number else WARM_UP_SECONDS,
                            watched={"servers": server.pid, "postgres": bench.postgres.pid},
                        )
                    )
                    if number:
                        found[what, count].append(outcome)
    one, two = WORKERS
    figures = []
    for what in (calls.GET, calls.CREATE):
        figures.append(
            Figure(
                part=NAME,
                name=f"{what}, {two} workers",
                unit="calls/s",
                measured=[outcome.calls_per_second for outcome in found[what, two]],
                limit=[outcome.calls_per_second for outcome in found[what, one]],
                against="with one",
                note=load.note(found[what, two]),
                details={str(count): found[what, count] for count in WORKERS},
            )
        )
        figures += [
            Figure(
                part=NAME,
                name=f"PostgreSQL's share of the CPU, {what}, {count} workers",
                unit="%",
                measured=[
                    100 * outcome.cpu_us["postgres"] / sum(outcome.cpu_us.values())
                    for outcome in found[what, count]
                ],
            )
            for count in WORKERS
        ]
    return figures
