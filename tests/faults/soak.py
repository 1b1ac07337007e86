"""`make soak`: an hour of ordinary work, in rounds, after each of which the service rests.

What its processes have at rest is written down. Memory, descriptors, connections and tasks are
flat when the last third of the hour has no more of them than the second sixth: before that they
grow, as everything is used for the first time.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from faults.environment import Environment
from faults.runs import GROWTH, SETTLE_SECONDS

REPORT = Path("build/faults")
ROUND_SECONDS = 55
REST_SECONDS = 5.0
THINK_SECONDS = 0.05


class Rest(NamedTuple):
    """After a round, of all processes together."""

    minutes: float
    mebibytes: float
    descriptors: int
    tasks: int
    connections: int


def growth(values: Sequence[float]) -> tuple[float, float]:
    """Medians: of the second sixth, and of the last third."""
    count = len(values)
    early = values[count // 6 : max(count // 3, count // 6 + 1)]
    return statistics.median(early), statistics.median(values[-max(count // 3, 1) :])


def main() -> None:
    parser = argparse.ArgumentParser(prog="soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    rests: list[Rest] = []
    writes, violations = 0, []
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="chat-ticket-soak-") as directory,
        Environment(Path(directory)) as environment,
        tqdm(total=round(options.minutes), unit="min", mininterval=1) as progress,
    ):
        while time.monotonic() - began < options.minutes * 60:
            seed = len(rests)
            with environment.workload(seed, f"soak-{seed}", THINK_SECONDS) as workload:
                time.sleep(ROUND_SECONDS)
                environment.run(workload.settle(SETTLE_SECONDS))
                writes += len(workload.record.acknowledged)
                violations += environment.check(workload)
            time.sleep(REST_SECONDS)
            resting = [service.at_rest() for service in environment.services]
            rest = Rest(
                round((time.monotonic() - began) / 60, 1),
                round(sum(resource.mebibytes for resource in resting), 1),
                sum(resource.descriptors for resource in resting),
                sum(resource.tasks for resource in resting),
                environment.connections(),
            )
            rests.append(rest)
            progress.set_postfix_str(str(rest))
            progress.update(round(rest.minutes) - progress.n)
    lines = [
        f"{rests[-1].minutes:g} minutes, {writes:,} writes acknowledged, "
        f"{len(violations)} violations",
        "",
        "| at rest | at first | then | at last |",
        "|---|---|---|---|",
    ]
    flat = True
    for name in Rest._fields[1:]:
        values = [getattr(rest, name) for rest in rests]
        early, late = growth(values)
        flat = flat and late <= early * GROWTH
        lines.append(f"| {name} | {values[0]:g} | {early:g} | {late:g} |")
    report = "\n".join(lines) + "\n"
    for violation in violations[:10]:
        print(violation)
    print(report)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "soak.md").write_text(report)
    (REPORT / "soak.json").write_text(json.dumps([rest._asdict() for rest in rests], indent=1))
    print(f"{REPORT}/soak.md and soak.json")
    sys.exit(not flat or bool(violations))


if __name__ == "__main__":
    main()
