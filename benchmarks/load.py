"""A closed loop of unary calls, made in a process of its own.

Each caller calls again as soon as it is answered. That every call ended with grpc-status 0 is
part of what is measured: one that did not ends the measurement.
"""

import contextlib
import gc
import itertools
import math
import multiprocessing
import select
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from benchmarks import http2
from benchmarks.service import CONNECTIONS, cpu_seconds

LEAD_SECONDS = 0.3  # before what is measured
PATIENCE_SECONDS = 10  # with a server that does not answer
FEWEST_CALLS = 200

# A session of the same id in each of them is another session.
TENANTS = tuple(f"tenant-{number}" for number in range(4))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to call, and the processes whose CPU time is looked at meanwhile, by name.

    Calls go on for `seconds`, the requests taken in turn; or, for None, until each was sent once.
    """

    address: str
    path: str
    requests: Sequence[bytes]  # serialised
    callers: int
    seconds: float | None
    watched: Mapping[str, int]
    tenants: Sequence[str] = TENANTS  # of the connections, in turn
    connections: int = CONNECTIONS  # at most: not more than callers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it; times are of a call."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: Mapping[str, float]  # with the client's own
    calls: int  # all there were, also before and after what was measured


def note(outcomes: Sequence[Outcome]) -> str:
    """What else there is to see of the rounds of a figure."""
    p50 = statistics.median(outcome.p50_ms for outcome in outcomes)
    p99 = statistics.median(outcome.p99_ms for outcome in outcomes)
    return f"p50 {p50:.1f}, p99 {p99:.1f} ms; {cpu_note([each.cpu_us for each in outcomes])}"


def cpu_note(rounds: Sequence[Mapping[str, float]]) -> str:
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return f"CPU in µs: {', '.join(f'{name} {value:.3g}' for name, value in medians.items())}"


# A connection, the headers of its calls, and when those that run were begun.
_Callers = tuple[http2.Connection, bytes, dict[int, float]]


@contextlib.contextmanager
def client() -> Iterator[Callable[[Load], Outcome]]:
    """A process that makes calls."""
    with process() as pool:
        yield lambda load: pool.submit(_run, load).result()


def process() -> ProcessPoolExecutor:
    """A process of its own, without what ours has in memory."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_begin)


def _begin() -> None:
    gc.disable()  # a collection would be in somebody's latency
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for our parent, who ends us


def _run(load: Load) -> Outcome:
    with contextlib.ExitStack() as stack:
        connections: dict[int, _Callers] = {}
        for number in range(min(load.connections, load.callers)):
            connection = stack.enter_context(contextlib.closing(http2.Connection(load.address)))
            tenant = load.tenants[number % len(load.tenants)]
            headers = http2.request_headers(load.path, tenant)
            connections[connection.fileno()] = connection, headers, {}
        poll = stack.enter_context(select.epoll())
        for descriptor in connections:
            poll.register(descriptor, select.EPOLLIN)
        return _calls(load, connections, poll)


def _calls(load: Load, connections: Mapping[int, _Callers], poll: select.epoll) -> Outcome:
    clock = time.perf_counter
    framed = [http2.message(request) for request in load.requests]
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    if load.seconds is None:
        bodies: Iterator[bytes] = iter(framed)
        before = _cpu(load.watched)
        measured_from, end = clock(), math.inf
    else:
        bodies = itertools.cycle(framed)
        measured_from = clock() + LEAD_SECONDS
        end = measured_from + load.seconds
    running = calls = 0
    for connection, headers, started in itertools.islice(
        itertools.cycle(connections.values()), load.callers
    ):
        if body := next(bodies, None):
            started[connection.call(headers, body)] = clock()
            running += 1
    latencies: list[float] = []
    while running:
        if not before and clock() >= measured_from:
            before = _cpu(load.watched)
            measured_from = clock()
        if not after and clock() >= end:
            after = _cpu(load.watched)
        ready = poll.poll(PATIENCE_SECONDS)
        if not ready:
            raise http2.CallFailedError(f"no answer for {PATIENCE_SECONDS} seconds")
        for descriptor, _ in ready:
            connection, headers, started = connections[descriptor]
            for stream, data in connection.receive():
                if data is not None:
                    continue
                now = clock()
                calls += 1
                latency = now - started.pop(stream)
                if measured_from <= now < end:
                    latencies.append(latency)
                if now < end and (body := next(bodies, None)):
                    started[connection.call(headers, body)] = now
                else:
                    running -= 1
    after = after or _cpu(load.watched)
    seconds = min(end, clock()) - measured_from
    if load.seconds is not None and len(latencies) < FEWEST_CALLS:
        raise http2.CallFailedError(f"{len(latencies)} calls are too few to tell anything")
    latencies.sort()
    return Outcome(
        calls_per_second=len(latencies) / seconds,
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[len(latencies) * 99 // 100],
        cpu_us={name: 1e6 * (after[name] - before[name]) / len(latencies) for name in after},
        calls=calls,
    )


def _cpu(watched: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds of each of the processes, and of this one."""
    return {"client": time.process_time(), **{n: cpu_seconds(pid) for n, pid in watched.items()}}
