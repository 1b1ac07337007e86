"""`make faults`: all runs of every fault, the mutants, and a report."""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from faults.environment import Environment, small_disk
from faults.matrix import FAULTS, Fault
from faults.mutants import MUTANTS
from faults.runs import Result, run

REPORT = Path("build/faults")
AROUND_SECONDS = 1.5
MUTANT_SECONDS = 5.0  # to settle, for those that never do


def table(results: dict[str, list[Result]]) -> str:
    lines = [
        "| fault | runs | writes acknowledged | drafts | lost | duplicated | out of order | other "
        "| longest outage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        lost = sum(result.count("is lost") for result in runs)
        twice = sum(result.count("twice") for result in runs)
        order = sum(result.count("I3: ") for result in runs)
        other = sum(len(result.violations) for result in runs) - lost - twice - order
        acknowledged = sum(result.acknowledged for result in runs)
        drafts = sum(result.drafts for result in runs)
        outage = max(result.outage_seconds for result in runs)
        invalid = sum(not result.valid for result in runs)
        shown = f"{len(runs)}" + (f" ({invalid} invalid)" if invalid else "")
        lines.append(
            f"| {name} | {shown} | {acknowledged:,} | {drafts:,} | {lost} | {twice} | {order} "
            f"| {other} | {outage:.1f} s |"
        )
    return "\n".join(lines)


def mutant_table(found: dict[str, list[str]]) -> str:
    lines = ["| mutant | found by |", "|---|---|"]
    lines += [f"| {name} | {by[0] if by else '**not found**'} |" for name, by in found.items()]
    return "\n".join(lines)


def find_mutants(environment: Environment, seed: int, progress: Any) -> dict[str, list[str]]:
    """The findings of the checker for each mutant that match what it must find."""
    found = {}
    for name, mutant in MUTANTS.items():
        progress.set_description(name)
        environment.become(name)
        [fault] = [each for each in FAULTS if each.name == mutant.fault]
        result = run(
            environment,
            fault,
            seed=seed,
            amount=mutant.amount,
            around=AROUND_SECONDS,
            settle=MUTANT_SECONDS,
        )
        texts = [str(violation) for violation in result.violations]
        found[name] = [text for text in texts if any(expected in text for expected in mutant.finds)]
        progress.update()
    environment.become("")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="faults", description=__doc__)
    parser.add_argument("--only", default="", help="faults whose names contain this")
    parser.add_argument("--runs", type=int, default=0, help="of each, instead of its own number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--no-mutants", action="store_true", help="leave out what checks the checker"
    )
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    is_root = os.geteuid() == 0
    left_out = [fault.name for fault in chosen if fault.small_disk and not is_root]
    chosen = [fault for fault in chosen if is_root or not fault.small_disk]
    results: dict[str, list[Result]] = defaultdict(list)
    total = sum(options.runs or fault.runs for fault in chosen)
    total += 0 if options.no_mutants else len(MUTANTS)
    found: dict[str, list[str]] = {}
    with tqdm(total=total, unit="run", mininterval=1) as progress:

        def run_all(environment: Environment, faults: Sequence[Fault]) -> None:
            for fault in faults:
                for number in range(options.runs or fault.runs):
                    progress.set_description(fault.name)
                    result = run(
                        environment,
                        fault,
                        seed=options.seed + number,
                        amount=fault.amount,
                        around=AROUND_SECONDS,
                    )
                    results[fault.name].append(result)
                    if result.note:
                        progress.write(f"{fault.name}: {result.note}")
                    for violation in result.violations[:10]:
                        progress.write(f"{fault.name}, seed {result.seed}: {violation}")
                    progress.update()

        with (
            tempfile.TemporaryDirectory(prefix="chat-ticket-faults-") as directory,
            Environment(Path(directory)) as environment,
        ):
            if not options.no_mutants:
                found = find_mutants(environment, options.seed, progress)
            run_all(environment, [fault for fault in chosen if not fault.small_disk])
        if on_small_disk := [fault for fault in chosen if fault.small_disk]:
            with small_disk() as mounted, Environment(mounted) as environment:
                run_all(environment, on_small_disk)
    report = f"{table(results)}\n"
    notes = [f"- {each.fault}: {each.note}" for of in results.values() for each in of if each.note]
    report += "".join(f"{note}\n" for note in ["", *notes])
    report += "".join(f"- {name}: left out, as only root may mount a disk\n" for name in left_out)
    if found:
        report += f"\n{mutant_table(found)}\n"
    print(report)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "report.md").write_text(report)
    details = [
        {**vars(each), "violations": [str(violation) for violation in each.violations]}
        for runs in results.values()
        for each in runs
    ]
    (REPORT / "runs.json").write_text(json.dumps(details, indent=1))
    print(f"{REPORT}/report.md and runs.json")
    is_broken = any(each.violations or not each.valid for runs in results.values() for each in runs)
    sys.exit(is_broken or not all(found.values()))


if __name__ == "__main__":
    main()
