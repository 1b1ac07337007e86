"""Ten times as many callers as are served without refusing one: see `overload`."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from faults.checker import Seen, Violation
from faults.environment import HEALTHY_SECONDS, Environment
from faults.flood import Told, flood

# With its pool of 10 connections and 4 callers waiting for each, a service refuses none of these.
SERVED = 50
TIMES = 10
# Of them, those whose answers are looked at, from a process of their own: the crowd's is busy.
LOOKED_AT = 10
REFUSAL_SECONDS = 2.5
SLOWER = 3.0
HEALTH_SECONDS = 2.5


def overload(environment: Environment, seconds: float) -> Seen:
    """The crowd is shed in time, what is accepted is not much slower, health is answered.

    By the medians of a few callers in a process of their own, of one server.
    """
    addresses = [environment.services[0].address]
    before, _ = _among(SERVED, seconds, addresses)
    with _Health(environment) as health:
        during, crowd = _among(SERVED * TIMES, seconds, addresses)
    recovered = time.monotonic() + HEALTHY_SECONDS
    while (after := flood(LOOKED_AT, 1, addresses)).median > before.median * 1.5:
        if time.monotonic() > recovered:
            break
    violations = [
        Violation("overload", f"refused with {told.wrong}")
        for told in (before, during, crowd, after)
        if told.wrong
    ]
    if not crowd.refused:
        violations.append(Violation("overload", "invalid: none of the crowd was refused"))
    if (slowest := max(crowd.slowest_refusal, during.slowest_refusal)) > REFUSAL_SECONDS:
        violations.append(Violation("overload", f"refused after {slowest:.1f} s"))
    if during.median > before.median * SLOWER:
        text = f"{1000 * during.median:.0f} ms, and {1000 * before.median:.0f} before"
        violations.append(Violation("overload", text))
    if health.slowest > HEALTH_SECONDS:
        violations.append(Violation("overload", f"health after {health.slowest:.1f} s"))
    if after.median > before.median * 1.5:
        violations.append(Violation("overload", f"not as before within {HEALTHY_SECONDS:g} s"))
    note = (
        f"median {1000 * before.median:.0f}, in the crowd {1000 * during.median:.0f} ms, p99"
        f" {1000 * before.p99:.0f} and {1000 * during.p99:.0f};"
        f" {crowd.accepted:,} accepted, {sum(crowd.refused.values()):,} refused,"
        f" after {slowest:.1f} s at most; health after {1000 * health.slowest:.0f} ms"
    )
    return Seen(violations, note)


def _among(callers: int, seconds: float, addresses: Sequence[str]) -> tuple[Told, Told]:
    """What those who are looked at were told, and what the others were."""
    with ThreadPoolExecutor() as pool:
        others = pool.submit(flood, callers - LOOKED_AT, seconds + 2, addresses)
        time.sleep(1)
        told = flood(LOOKED_AT, seconds, addresses)
        return told, others.result()


class _Health:
    """Asks a service for its health, again and again, in a thread."""

    def __init__(self, environment: Environment):
        self.slowest = 0.0
        self._environment = environment
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> "_Health":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            began = time.monotonic()
            while not self._environment.services[0].is_healthy():
                if time.monotonic() - began > HEALTHY_SECONDS:
                    break
            self.slowest = max(self.slowest, time.monotonic() - began)
