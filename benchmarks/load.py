"""A closed loop of unary calls, made in a process of its own.

Each caller calls again as soon as it is answered. That every call ended with grpc-status 0 is
part of what is measured: one that did not ends the measurement.
"""

import contextlib
import gc
import itertools
import multiprocessing
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from typing import Any

from benchmarks import http2
from benchmarks.service import CONNECTIONS, cpu_seconds

LEAD_SECONDS = 0.3  # before what is measured
PATIENCE_SECONDS = 10  # with a server that does not answer
FEWEST_CALLS = 200

# A session of the same id in each of them is another session.
TENANTS = [f"tenant-{number}" for number in range(4)]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What to call, and the processes whose CPU time is looked at meanwhile, by name."""

    address: str
    path: str
    requests: Sequence[bytes]  # serialised, taken in turn
    callers: int
    seconds: float
    watched: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of it; times are of a call."""

    calls_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: Mapping[str, float]  # with the client's own
    calls: int  # all there were, also before and after what was measured


@contextlib.contextmanager
def client() -> Iterator[Callable[[Load], Outcome]]:
    """A process that makes calls."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_obey, args=(theirs,))
    process.start()
    theirs.close()

    def run(load: Load) -> Outcome:
        ours.send(load)
        answer = ours.recv()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Outcome)  # noqa: S101 - for the type checker
        return answer

    try:
        yield run
    finally:
        ours.close()
        process.join()


def _obey(orders: Pipe) -> None:
    gc.disable()  # a collection would be in somebody's latency
    with contextlib.suppress(EOFError):
        while True:
            load = orders.recv()
            try:
                orders.send(_run(load))
            except Exception as error:
                orders.send(error)


def _run(load: Load) -> Outcome:
    with contextlib.ExitStack() as stack:
        connections: dict[int, tuple[http2.Connection, bytes, dict[int, float]]] = {}
        for number in range(CONNECTIONS):
            connection = stack.enter_context(contextlib.closing(http2.Connection(load.address)))
            headers = http2.request_headers(load.path, TENANTS[number % len(TENANTS)])
            connections[connection.fileno()] = connection, headers, {}
        return _calls(load, connections)


def _calls(load: Load, connections: Mapping[int, Any]) -> Outcome:
    clock = time.perf_counter
    bodies = itertools.cycle([http2.message(request) for request in load.requests])
    poll = select.epoll()
    for descriptor in connections:
        poll.register(descriptor, select.EPOLLIN)

    begin = clock()
    measured_from = begin + LEAD_SECONDS
    end = measured_from + load.seconds
    for _ in range(load.callers // len(connections)):
        for connection, headers, started in connections.values():
            started[connection.call(headers, next(bodies))] = clock()

    running, calls = load.callers, 0
    latencies: list[float] = []
    cpu_before: dict[str, float] = {}
    taken: dict[str, float] = {}
    while running:
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
                if now < end:
                    started[connection.call(headers, next(bodies))] = now
                else:
                    running -= 1
                if measured_from <= now < end:
                    latencies.append(latency)
        if not cpu_before and clock() >= measured_from:
            measured_from = clock()
            cpu_before = _cpu(load.watched)
        elif not taken and clock() >= end:
            taken = {name: at - cpu_before[name] for name, at in _cpu(load.watched).items()}
    poll.close()
    if len(latencies) < FEWEST_CALLS:
        raise http2.CallFailedError(f"{len(latencies)} calls are too few to tell anything")
    latencies.sort()
    return Outcome(
        calls_per_second=len(latencies) / (end - measured_from),
        p50_ms=1000 * latencies[len(latencies) // 2],
        p99_ms=1000 * latencies[len(latencies) * 99 // 100],
        cpu_us={name: 1e6 * seconds / len(latencies) for name, seconds in taken.items()},
        calls=calls,
    )


def _cpu(watched: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds of each of the processes, and of this one."""
    return {"client": time.process_time(), **{n: cpu_seconds(pid) for n, pid in watched.items()}}
