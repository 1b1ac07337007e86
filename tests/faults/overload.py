"""Ten times as many callers as the service serves without an error: see `overload`."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from faults.checker import Seen, Violation
from faults.environment import HEALTHY_SECONDS, Environment
from faults.flood import FloodResult, flood

# A service with a pool of 10 connections, and a queue of 4 callers for each, serves all of these.
CALLERS = 50
OVERLOAD_FACTOR = 10
# The callers that are measured, in a process of their own: the process of the crowd is busy.
SAMPLED_CALLERS = 10
REFUSAL_SECONDS = 2.5
SLOWER = 3.0
HEALTH_SECONDS = 2.5


def overload(environment: Environment, seconds: float) -> Seen:
    """Errors are fast, accepted calls are not much slower, and health checks are answered.

    Compares the medians of a few callers, which call one server from a process of their own.
    """
    addresses = [environment.services[0].address]
    before, _ = _sample(CALLERS, seconds, addresses)
    with _Health(environment) as health:
        during, crowd = _sample(CALLERS * OVERLOAD_FACTOR, seconds, addresses)
    recovered = time.monotonic() + HEALTHY_SECONDS
    while (after := flood(SAMPLED_CALLERS, 1, addresses)).median > before.median * 1.5:
        if time.monotonic() > recovered:
            break
    violations = [
        Violation("overload", f"failed with {result.unexpected}")
        for result in (before, during, crowd, after)
        if result.unexpected
    ]
    if not crowd.errors:
        violations.append(Violation("overload", "invalid: no call of the crowd failed"))
    if (slowest := max(crowd.slowest_error, during.slowest_error)) > REFUSAL_SECONDS:
        violations.append(Violation("overload", f"failed after {slowest:.1f} s"))
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
        f" {crowd.accepted:,} accepted, {sum(crowd.errors.values()):,} failed,"
        f" after {slowest:.1f} s at most; health after {1000 * health.slowest:.0f} ms"
    )
    return Seen(violations, note)


def _sample(
    callers: int, seconds: float, addresses: Sequence[str]
) -> tuple[FloodResult, FloodResult]:
    """The results of the callers that are measured, and of all others."""
    with ThreadPoolExecutor() as pool:
        others = pool.submit(flood, callers - SAMPLED_CALLERS, seconds + 2, addresses)
        time.sleep(1)
        result = flood(SAMPLED_CALLERS, seconds, addresses)
        return result, others.result()


class _Health:
    """Checks the health of a service repeatedly, in a thread."""

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
