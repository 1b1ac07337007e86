"""What a second worker process costs and brings, on a machine with PostgreSQL and the client.

A second worker brings more calls only where there is CPU for it. So each rate stands beside the
rate at which the CPU of all three would be used up, as a call takes it. Where the CPU time of a
call stays the same with a second worker, the rate grows with the cores.

Two workers are measured with the callers of one worker, and with as many for each. With the same
callers each worker has half of them, so half as many messages share a statement of group commit,
and a worker that waits more often wakes up for fewer calls. With the same callers per worker, each
has as many callers as the one worker, on average. That is what a second worker is added for.

In some rounds the servers, and the others, have cores of their own: one for each worker, if that
leaves one for the others. With two cores that is only possible for one worker.
"""

import contextlib
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg

from benchmarks import calls, load, service
from benchmarks.figures import Figure
from benchmarks.load import Load, Outcome
from benchmarks.service import Bench

NAME = "workers"
SECONDS = 60

CALLERS = 64  # of one worker; each on its own connection, which the kernel gives to a worker
PHASE_SECONDS = 1.5
WARM_UP_SECONDS = 0.5
ONE, TWO = WORKERS = (1, 2)
# What two workers are measured with, beside one worker with CALLERS.
CALLERS_OF_TWO = {"same callers": CALLERS, "same callers per worker": TWO * CALLERS}
LOADS = ((ONE, CALLERS), *((TWO, callers) for callers in CALLERS_OF_TWO.values()))

CORES = sorted(os.sched_getaffinity(0))

# By call, numbers of workers and callers, and whether the workers have cores of their own.
Outcomes = dict[tuple[str, int, int, bool], list[Outcome]]


def measure(bench: Bench) -> list[Figure]:
    outcomes: Outcomes = defaultdict(list)
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
        client = stack.enter_context(load.process())
        client_pid = client.submit(os.getpid).result()
        requests_by_call = calls.requests()

        def run(number: int, what: str, count: int, callers: int, *, has_cores: bool) -> None:
            bench.progress(f"round {number}, {what}, {count} workers, {callers} callers")
            path, requests = requests_by_call[what]
            server = servers[count]
            outcome = client.submit(
                load.run,
                Load(
                    address=server.address,
                    path=path,
                    requests=requests,
                    callers=callers,
                    connections=callers,
                    seconds=PHASE_SECONDS if number else WARM_UP_SECONDS,
                    watched={"servers": server.pid, "postgres": bench.postgres.pid},
                ),
            ).result()
            if number:
                outcomes[what, count, callers, has_cores].append(outcome)

        for number in range(bench.rounds + 1):  # the first is a warm-up
            for what in (calls.GET, calls.CREATE):
                for count, callers in LOADS:
                    run(number, what, count, callers, has_cores=False)
                    if number and count < len(CORES):
                        others = [bench.postgres.pid, client_pid]
                        with _on(CORES[:count], [servers[count].pid]), _on(CORES[count:], others):
                            run(number, what, count, callers, has_cores=True)
    return list(_figures(outcomes))


@contextlib.contextmanager
def _on(cores: Sequence[int], pids: Sequence[int]) -> Iterator[None]:
    """Let these processes, and what they start, run only on these cores."""
    _set_cores(pids, cores)
    try:
        yield
    finally:
        _set_cores(pids, CORES)


def _set_cores(pids: Sequence[int], cores: Sequence[int]) -> None:
    for member in (member for pid in pids for member in service.tree(pid)):
        with contextlib.suppress(OSError):  # it has exited
            for thread in Path(f"/proc/{member}/task").iterdir():
                os.sched_setaffinity(int(thread.name), cores)


def _figures(outcomes: Outcomes) -> Iterator[Figure]:
    for what in (calls.GET, calls.CREATE):
        one = outcomes[what, ONE, CALLERS, False]
        for load_name, callers in CALLERS_OF_TWO.items():
            two = outcomes[what, TWO, callers, False]
            yield Figure(
                part=NAME,
                name=f"CPU of the servers, {what}, {TWO} workers, {load_name}",
                unit="µs",
                measured=_cpu(two),
                limit=_cpu(one),
                against="with one",
                must=1.05,
                at_most=True,
                noise_of="cpu",
            )
            yield Figure(
                part=NAME,
                name=f"{what}, {TWO} workers, {load_name}",
                unit="calls/s",
                measured=[outcome.calls_per_second for outcome in two],
                limit=[outcome.calls_per_second for outcome in one],
                against="with one",
                note=load.note(two),
                details={str(ONE): one, str(TWO): two},
            )
        for count, callers in LOADS:
            for has_cores in (False, True):
                if rounds := outcomes.get((what, count, callers, has_cores)):
                    yield _growth_figure(what, count, callers, rounds, has_cores=has_cores)


def _growth_figure(
    what: str, count: int, callers: int, rounds: list[Outcome], *, has_cores: bool
) -> Figure:
    """The rate, compared with what the CPU allows, and the cores that each used."""
    used = {
        name: statistics.median(each.calls_per_second * each.cpu_us[name] / 1e6 for each in rounds)
        for name in rounds[0].cpu_us
    }
    of_cores = f"{count} of {len(CORES)} cores their own" if has_cores else "sharing all cores"
    return Figure(
        part=NAME,
        name=f"{what}, workers: {count}, callers: {callers}, {of_cores}",
        unit="calls/s",
        measured=[each.calls_per_second for each in rounds],
        limit=[_possible_rate(each, count, has_cores=has_cores) for each in rounds],
        against="that the cores allow",
        note=f"cores in use: {', '.join(f'{name} {cores:.2f}' for name, cores in used.items())}",
        details={"rounds": rounds},
    )


def _possible_rate(outcome: Outcome, workers: int, *, has_cores: bool) -> float:
    """The calls per second at which the CPU time that a call takes uses up the cores.

    A worker cannot use more than one core.
    """
    servers = outcome.cpu_us["servers"]
    others = sum(outcome.cpu_us.values()) - servers
    rest = (len(CORES) - workers) / others if has_cores else len(CORES) / (servers + others)
    return 1e6 * min(workers / servers, rest)


def _cpu(rounds: Sequence[Outcome]) -> list[float]:
    return [outcome.cpu_us["servers"] for outcome in rounds]
