"""A closed loop of unary calls, made in a process of its own.

Each caller makes its next call as soon as it has an answer. A call that ends with another
grpc-status than 0 aborts the measurement.
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

WARM_UP_SECONDS = 0.3
TIMEOUT_SECONDS = 10  # without an answer from the server
MIN_CALLS = 50  # fewer are not worth reporting

# The same session id names a different session in each tenant.
TENANTS = tuple(f"tenant-{number}" for number in range(4))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to call, and the processes whose CPU time is measured meanwhile, by name.

    The requests are sent in turn for `seconds`. With None each is sent once.
    """

    address: str
    path: str
    requests: Sequence[bytes]  # serialised
    callers: int
    seconds: float | None
    watched: Mapping[str, int]
    tenants: Sequence[str] = TENANTS  # assigned to the connections in turn
    connections: int = CONNECTIONS  # at most; never more than callers


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a load. Times are per call."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: Mapping[str, float]  # by process, including the client
    calls: int  # all of them, including those before and after the measured time


def note(outcomes: Sequence[Outcome]) -> str:
    """The latencies and the CPU time of the rounds of a figure."""
    p50 = statistics.median(outcome.p50_ms for outcome in outcomes)
    p99 = statistics.median(outcome.p99_ms for outcome in outcomes)
    return f"p50 {p50:.1f}, p99 {p99:.1f} ms; {cpu_note([each.cpu_us for each in outcomes])}"


def cpu_note(rounds: Sequence[Mapping[str, float]]) -> str:
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    return f"CPU in µs: {', '.join(f'{name} {value:.3g}' for name, value in medians.items())}"


# A connection, the headers of its calls, and the start times of those in flight, by stream.
_ConnectionState = tuple[http2.Connection, bytes, dict[int, float]]


@contextlib.contextmanager
def client() -> Iterator[Callable[[Load], Outcome]]:
    """A function that runs a load in a process of its own."""
    with process() as pool:
        yield lambda load: pool.submit(run, load).result()


def process() -> ProcessPoolExecutor:
    """A new process, which shares no memory with this one."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_initialize_process)


def _initialize_process() -> None:
    gc.disable()  # a garbage collection would count as latency
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and stops us


def run(load: Load) -> Outcome:
    """Run a load in this process, which `process` has made."""
    with contextlib.ExitStack() as stack:
        connections: dict[int, _ConnectionState] = {}
        for number in range(min(load.connections, load.callers)):
            connection = stack.enter_context(contextlib.closing(http2.Connection(load.address)))
            tenant = load.tenants[number % len(load.tenants)]
            headers = http2.request_headers(load.path, tenant)
            connections[connection.fileno()] = connection, headers, {}
        poll = stack.enter_context(select.epoll())
        for descriptor in connections:
            poll.register(descriptor, select.EPOLLIN)
        return _calls(load, connections, poll)


def _calls(load: Load, connections: Mapping[int, _ConnectionState], poll: select.epoll) -> Outcome:
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
        measured_from = clock() + WARM_UP_SECONDS
        end = measured_from + load.seconds
    in_flight = calls = 0
    for connection, headers, started in itertools.islice(
        itertools.cycle(connections.values()), load.callers
    ):
        if body := next(bodies, None):
            started[connection.call(headers, body)] = clock()
            in_flight += 1
    latencies: list[float] = []
    while in_flight:
        if not before and clock() >= measured_from:
            before = _cpu(load.watched)
            measured_from = clock()
        if not after and clock() >= end:
            after = _cpu(load.watched)
        ready = poll.poll(TIMEOUT_SECONDS)
        if not ready:
            raise http2.CallFailedError(f"no answer for {TIMEOUT_SECONDS} seconds")
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
                    in_flight -= 1
    after = after or _cpu(load.watched)
    seconds = min(end, clock()) - measured_from
    if load.seconds is not None and len(latencies) < MIN_CALLS:
        raise http2.CallFailedError(f"{len(latencies)} calls are too few to measure")
    latencies.sort()
    return Outcome(
        calls_per_second=len(latencies) / seconds,
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[len(latencies) * 99 // 100],
        cpu_us={name: 1e6 * (after[name] - before[name]) / len(latencies) for name in after},
        calls=calls,
    )


def _cpu(watched: Mapping[str, int]) -> dict[str, float]:
    """The CPU seconds of each process, including this one."""
    return {"client": time.process_time(), **{n: cpu_seconds(pid) for n, pid in watched.items()}}
