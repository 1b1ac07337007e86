"""One run: a workload, a fault in its midst, and the verdict."""

import time
from dataclasses import dataclass, field

from faults.checker import Violation, check
from faults.environment import HEALTHY_SECONDS, Environment
from faults.matrix import Fault
from faults.record import clock

# Of writes before the fault: with fewer there was nothing to break.
FEWEST = 50
PATIENCE_SECONDS = 10.0
SETTLE_SECONDS = 30.0


@dataclass
class Result:
    fault: str
    seed: int
    valid: bool = False
    acknowledged: int = 0
    streams: int = 0  # begun, by all followers
    healthy_seconds: float = 0.0  # after the fault's end
    outage_seconds: float = 0.0  # the longest time without any acknowledged write
    violations: list[Violation] = field(default_factory=list)

    def count(self, *texts: str) -> int:
        return sum(any(text in str(each) for text in texts) for each in self.violations)


def run(
    environment: Environment,
    fault: Fault,
    *,
    seed: int,
    seconds: float,
    around: float,
    settle: float = SETTLE_SECONDS,
) -> Result:
    """`seconds` of a fault, with `around` seconds of work before and after it.

    Callers and followers have `settle` seconds to come to an end.
    """
    result = Result(fault.name, seed)
    name = f"{fault.name.partition(' ')[0].lower()}-{seed}"
    with environment.workload(seed, name) as workload:
        record = workload.record
        began = clock()
        while len(record.acknowledged) < FEWEST or clock() - began < around:
            if clock() - began > PATIENCE_SECONDS:
                return result  # invalid: that nothing was lost would mean nothing
            time.sleep(0.01)
        result.valid = True
        struck = clock()
        fault.inject(environment, seconds)
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
            result.violations.append(Violation("I4", "callers and followers do not come to an end"))
        result.acknowledged = len(record.acknowledged)
        result.streams = sum(each.streams for each in record.followed)
        result.outage_seconds = record.longest_outage(struck)
        result.violations += check(record, environment.database_url, workload.tenants)
    for service in environment.services:
        if any(f"of {tenant}: " in service.process.output for tenant in workload.tenants):
            result.violations.append(Violation("I6", "content is in the log"))
    if result.healthy_seconds > HEALTHY_SECONDS:
        result.violations.append(
            Violation("I8", f"healthy {result.healthy_seconds:.1f} s after the fault")
        )
    if busy := environment.busy():
        result.violations.append(Violation("I7", f"{busy} connections are busy afterwards"))
    return result
