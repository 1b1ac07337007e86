"""The faults, each as what an operator or a network does to a running service."""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from faults.environment import Environment
from faults.proxy import Mode


@dataclass(frozen=True)
class Fault:
    """`inject` returns when the fault is over; what it did is to be survived from then on."""

    name: str
    inject: Callable[[Environment, float], None]
    runs: int  # of the full matrix
    seconds: float  # of the fault, in the full matrix
    quick_seconds: float


def _postgres(number: int) -> Callable[[Environment, float], None]:
    def inject(environment: Environment, seconds: float) -> None:
        environment.end_postgres(number)
        time.sleep(seconds)
        environment.restart_postgres()

    return inject


def _pause_postgres(environment: Environment, seconds: float) -> None:
    """The postmaster and all of its processes."""
    with environment.stopped_postgres():
        time.sleep(seconds)


def _terminate(environment: Environment, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        environment.terminate_backends()
        time.sleep(0.05)


def _service(number: int) -> Callable[[Environment, float], None]:
    """One of them ends, and comes back."""

    def inject(environment: Environment, seconds: float) -> None:
        service = environment.services[0]
        service.stop(number)
        time.sleep(seconds)
        service.start()
        service.wait()

    return inject


def _pause_service(environment: Environment, seconds: float) -> None:
    service = environment.services[0]
    service.send(signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        service.send(signal.SIGCONT)


def _network(mode: Mode) -> Callable[[Environment, float], None]:
    def inject(environment: Environment, seconds: float) -> None:
        with environment.proxy.during(mode):
            time.sleep(seconds)

    return inject


FAULTS = (
    Fault("none", lambda _, seconds: time.sleep(seconds), 3, 5, 0.5),
    Fault("PostgreSQL SIGKILL", _postgres(signal.SIGKILL), 30, 1, 0.2),
    Fault("PostgreSQL immediate stop", _postgres(signal.SIGQUIT), 30, 1, 0.2),
    Fault("PostgreSQL fast restart", _postgres(signal.SIGINT), 30, 1, 0.2),
    Fault("terminated connections, 20/s", _terminate, 10, 10, 1),
    Fault("service SIGKILL", _service(signal.SIGKILL), 30, 1, 0.2),
    Fault("service SIGTERM under load", _service(signal.SIGTERM), 30, 1, 0.2),
    Fault("network cut", _network(Mode.CUT), 20, 3, 0.5),
    Fault("network blackhole", _network(Mode.BLACKHOLE), 20, 5, 1),
    Fault("network 200 ms slower", _network(Mode.SLOW), 20, 5, 1),
    Fault("network 1 B/s", _network(Mode.TRICKLE), 20, 5, 1),
    Fault("answers to commits lost", _network(Mode.LOSE_COMMITS), 20, 3, 1),
    Fault("PostgreSQL SIGSTOP", _pause_postgres, 10, 15, 1),
    Fault("service SIGSTOP", _pause_service, 10, 15, 1),
)
