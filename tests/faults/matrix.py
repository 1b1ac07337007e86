"""The faults, each as what an operator, a network or callers do to a running service."""

import contextlib
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from grpc import StatusCode

from faults import abuse
from faults.checker import Seen, Violation
from faults.draft_record import LEASE_SECONDS
from faults.environment import Environment
from faults.feed import follow_late_commits
from faults.overload import overload
from faults.proxy import Mode
from faults.record import Outcome
from faults.workload import Workload

# How much of it: seconds of most, and of others how many.
Inject = Callable[[Environment, Workload, float], Seen | None]

SHED = {StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE}
FILL_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Fault:
    """`inject` returns when the fault is over; what it did is to be survived from then on."""

    name: str
    inject: Inject
    runs: int  # of the full matrix
    amount: float  # in the full matrix
    quick_amount: float  # in the tests; 0 leaves it to the full matrix
    small_disk: bool = False  # needs a PostgreSQL whose disk can be filled
    mebibytes: float = 15.0  # I7: that a process may use for the first time only later


def _postgres(number: int) -> Inject:
    def inject(environment: Environment, _: Workload, seconds: float) -> None:
        environment.end_postgres(number)
        time.sleep(seconds)
        environment.restart_postgres()

    return inject


def _pause_postgres(environment: Environment, _: Workload, seconds: float) -> None:
    """The postmaster and all of its processes."""
    with environment.stopped_postgres():
        time.sleep(seconds)


def _terminate(environment: Environment, _: Workload, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        environment.terminate_backends()
        time.sleep(0.05)


def _service(number: int) -> Inject:
    """One server ends, and restarts."""

    def inject(environment: Environment, _: Workload, seconds: float) -> None:
        service = environment.services[0]
        service.stop(number)
        time.sleep(seconds)
        service.start()
        service.wait()

    return inject


def _drain(environment: Environment, workload: Workload, seconds: float) -> Seen:
    """No call fails during the drain. Later calls that find no server had no effect."""
    _service(signal.SIGTERM)(environment, workload, seconds)
    return Seen(
        [
            Violation("drain", f"{write.kind}: {attempt.code.name} {attempt.text}")
            for write in workload.record.writes
            for attempt in write.attempts
            if attempt.code in SHED or attempt.outcome is Outcome.UNKNOWN
            if not attempt.text.startswith("failed to connect")
        ]
    )


def _pause_service(environment: Environment, _: Workload, seconds: float) -> None:
    service = environment.services[0]
    service.send(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        service.send(signal.SIGCONT)


def _network(mode: Mode) -> Inject:
    def inject(environment: Environment, _: Workload, seconds: float) -> None:
        with environment.proxy.during(mode):
            time.sleep(seconds)

    return inject


def _fill_disk(environment: Environment, _: Workload, seconds: float) -> None:
    """To the last byte, first for tables and then for WAL, which PostgreSQL does not survive.

    Then there is space again, and its operator starts it.
    """
    ballast = environment.directory / "ballast"
    began = time.monotonic()
    with ballast.open("wb", buffering=0) as file:
        while (passed := time.monotonic() - began) < seconds:
            if passed > seconds / 2:
                environment.end_wal_segment()
            for size in (FILL_BYTES, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass
            time.sleep(0.05)
    ballast.unlink()
    environment.restart_postgres()


def _callers(do: Callable[[Workload, int], Awaitable[Seen]]) -> Inject:
    def inject(environment: Environment, workload: Workload, count: float) -> Seen:
        return environment.run(do(workload, round(count)))

    return inject


def _not_read(environment: Environment, workload: Workload, count: float) -> Seen:
    return environment.run(abuse.not_read(workload, round(count), environment.mebibytes))


def _none(_: Environment, __: Workload, seconds: float) -> None:
    time.sleep(seconds)


def _overload(environment: Environment, _: Workload, seconds: float) -> Seen:
    return overload(environment, seconds)


FAULTS = (
    Fault("none", _none, 3, 5, 0.5),
    Fault("PostgreSQL SIGKILL", _postgres(signal.SIGKILL), 30, 1, 0.2),
    Fault("PostgreSQL immediate stop", _postgres(signal.SIGQUIT), 30, 1, 0.2),
    Fault("PostgreSQL fast restart", _postgres(signal.SIGINT), 30, 1, 0.2),
    Fault("terminated connections, 20/s", _terminate, 10, 10, 1),
    Fault("service SIGKILL", _service(signal.SIGKILL), 30, 1, 0.2),
    Fault("service SIGTERM under load", _drain, 30, 1, 0.2),
    Fault("network cut", _network(Mode.CUT), 20, 3, 0.5),
    Fault("network blackhole", _network(Mode.BLACKHOLE), 20, 5, 1),
    Fault("network 200 ms slower", _network(Mode.SLOW), 20, 5, 1),
    Fault("network 1 B/s", _network(Mode.TRICKLE), 20, 5, 1),
    Fault("answers to commits lost", _network(Mode.LOSE_COMMITS), 20, 3, 1),
    Fault("notifications lost", _network(Mode.LOSE_NOTIFICATIONS), 10, 3, 0.5),
    Fault("PostgreSQL SIGSTOP", _pause_postgres, 10, 15, 1),
    Fault("service SIGSTOP", _pause_service, 10, 15, LEASE_SECONDS + 0.5),
    Fault("disk full", _fill_disk, 5, 3, 0, small_disk=True),
    Fault("10 times the callers", _overload, 5, 4, 0),
    Fault("callers leave, 10,000", _callers(abuse.leave), 1, 10_000, 100),
    Fault("races, 2,000 of each pair", _callers(abuse.race), 1, 2_000, 10),
    Fault("16 callers with one id, 1,000", _callers(abuse.repeat), 1, 1_000, 10),
    Fault("late commits, 100,000 changes", follow_late_commits, 1, 100_000, 120),
    # An allocator keeps 28 MiB of the hundreds that they take for a moment: after five of them as
    # after one. The last, as what they keep would be the others' growth.
    Fault("200 streams not read", _not_read, 5, 200, 0, mebibytes=40.0),
)
