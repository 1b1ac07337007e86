"""One run: a workload, a fault in its midst, and the verdict."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from faults.checker import Seen, Violation
from faults.environment import HEALTHY_SECONDS, Environment, Service
from faults.matrix import Fault
from faults.record import clock

# Of writes before the fault: with fewer there was nothing to break.
FEWEST = 50
PATIENCE_SECONDS = 10.0
SETTLE_SECONDS = 30.0
REST_SECONDS = 10.0  # to come to rest
GROWTH = 1.1  # I7
DESCRIPTORS = 12.0  # of connections that the pool makes later


@dataclass
class Result:
    fault: str
    seed: int
    valid: bool = False
    acknowledged: int = 0
    drafts: int = 0  # of which text was acknowledged
    streams: int = 0  # started, by all watches
    healthy_seconds: float = 0.0  # after the fault's end
    outage_seconds: float = 0.0  # the longest time without any acknowledged write
    note: str = ""
    violations: list[Violation] = field(default_factory=list)

    def count(self, *texts: str) -> int:
        return sum(any(text in str(violation) for text in texts) for violation in self.violations)


def run(
    environment: Environment,
    fault: Fault,
    *,
    seed: int,
    amount: float,
    around: float,
    settle: float = SETTLE_SECONDS,
    drafts: bool = True,
) -> Result:
    """`amount` of a fault, with `around` seconds of work before and after it.

    Writers and watches have `settle` seconds to finish.
    """
    result = Result(fault.name, seed)
    name = f"{fault.name.partition(' ')[0].lower()}-{seed}"
    with contextlib.ExitStack() as stack:
        workload = stack.enter_context(environment.workload(seed, name, drafts=drafts))
        sampler = stack.enter_context(environment.sampled_drafts(workload)) if drafts else None
        record = workload.record
        began = clock()
        while len(record.acknowledged) < FEWEST or clock() - began < around:
            if clock() - began > PATIENCE_SECONDS:
                return result  # invalid: that nothing was lost would mean nothing
            time.sleep(0.01)
        result.valid = True
        struck = clock()
        seen = fault.inject(environment, workload, amount) or Seen([])
        ended = clock()
        environment.wait_until_healthy()
        healthy = clock()
        while not record.acknowledged or record.acknowledged[-1] < healthy:
            if clock() - ended > HEALTHY_SECONDS:
                break
            time.sleep(0.01)
        result.healthy_seconds = clock() - ended
        time.sleep(around)
        try:
            environment.run(workload.settle(settle))
        except TimeoutError:
            result.violations.append(Violation("I4", "writers and watches do not finish"))
        if sampler is not None:
            sampler.stop()
            result.violations += [Violation("draft", text) for text in sampler.violations]
        result.acknowledged = len(record.acknowledged)
        result.drafts = sum(draft.acknowledged > 0 for draft in record.drafts)
        result.streams = sum(watch.streams for watch in record.watches)
        result.outage_seconds = record.longest_outage(struck)
        result.note = seen.note
        result.violations += seen.violations
        result.violations += environment.check(workload)
    for service in environment.services:
        if any(f"of {tenant}: " in service.process.output for tenant in workload.tenants):
            result.violations.append(Violation("I6", "content is in the log"))
    if result.healthy_seconds > HEALTHY_SECONDS:
        result.violations.append(
            Violation("I8", f"healthy {result.healthy_seconds:.1f} s after the fault")
        )
    margins = {"mebibytes": fault.mebibytes, "descriptors": DESCRIPTORS, "tasks": 0.0}
    result.violations += _at_rest(environment, margins)
    return result


def _at_rest(environment: Environment, margins: Mapping[str, float]) -> Iterator[Violation]:
    """I7: the service is idle, and no process has more resources than after its first run."""
    if busy := environment.busy():
        yield Violation("I7", f"{busy} connections are busy afterwards")
    for service in environment.services:
        deadline = clock() + REST_SECONDS
        while (grown := _grown(environment, service, margins)) and clock() < deadline:
            time.sleep(0.1)
        for text in grown:
            yield Violation("I7", text)


def _grown(environment: Environment, service: Service, margins: Mapping[str, float]) -> list[str]:
    rest = service.at_rest()
    first = environment.first_rests.setdefault(rest.pid, rest)
    return [
        f"{getattr(rest, name):.0f} {name}, and {getattr(first, name):.0f} after the first run"
        for name, margin in margins.items()
        if getattr(rest, name) > getattr(first, name) * GROWTH + margin
    ]
