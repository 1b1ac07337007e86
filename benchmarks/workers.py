"""The gain of a second worker process, on a machine that also runs PostgreSQL and the client."""

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

CALLERS = 64  # each on its own connection, which the kernel distributes over the workers
PHASE_SECONDS = 1.5
WARM_UP_SECONDS = 0.5
WORKERS = (1, 2)


def measure(bench: Bench) -> list[Figure]:
    usage = subprocess.run(
        [sys.executable, "-m", "chat_ticket_svc", "serve", "--help"], capture_output=True, text=True
    )
    if "--workers" not in usage.stdout:
        print("workers: skipped, the service lacks --workers")
        return []
    outcomes: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
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
        requests_by_call = calls.requests()
        for number in range(bench.rounds + 1):  # the first is a warm-up
            for what in (calls.GET, calls.CREATE):
                path, requests = requests_by_call[what]
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
                        outcomes[what, count].append(outcome)
    one, two = WORKERS
    figures = []
    for what in (calls.GET, calls.CREATE):
        figures.append(
            Figure(
                part=NAME,
                name=f"{what}, {two} workers",
                unit="calls/s",
                measured=[outcome.calls_per_second for outcome in outcomes[what, two]],
                limit=[outcome.calls_per_second for outcome in outcomes[what, one]],
                against="with one",
                note=load.note(outcomes[what, two]),
                details={str(count): outcomes[what, count] for count in WORKERS},
            )
        )
        figures += [
            Figure(
                part=NAME,
                name=f"PostgreSQL's share of the CPU, {what}, {count} workers",
                unit="%",
                measured=[
                    100 * outcome.cpu_us["postgres"] / sum(outcome.cpu_us.values())
                    for outcome in outcomes[what, count]
                ],
            )
            for count in WORKERS
        ]
    return figures
