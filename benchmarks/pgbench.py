"""The service's own statements, run by PostgreSQL's pgbench: the limit without a service."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.service import Postgres, cpu_seconds, libpq

SECONDS = 3  # of which the first, with its connecting and preparing, is not measured


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Times are of a transaction."""

    calls_per_second: float
    cpu_us: Mapping[str, float]


def statement(sql: str, values: Mapping[str, str]) -> str:
    """A statement of the store, with expressions of SQL and pgbench for its parameters."""
    filled = sql % {name: f"({value})" for name, value in values.items()}
    return " ".join(filled.split()) + ";\n"


def texts(contents: Sequence[str], number: str) -> str:
    """An expression for one of `contents`."""
    # A colon would begin a variable of pgbench's.
    escapes = str.maketrans({"\\": r"\\", "'": r"\'", ":": r"\x3a", "\n": r"\n"})
    quoted = ", ".join(f"E'{each.translate(escapes)}'" for each in contents)
    return f"(ARRAY[{quoted}])[{number}]"


def run(
    postgres: Postgres,
    database_url: str,
    script: Path,
    *,
    clients: int,
    variables: Mapping[str, int],
) -> Outcome:
    command = [
        str(postgres.binaries / "pgbench"),
        "--no-vacuum",
        "--protocol=prepared",
        "--progress=1",
    ]
    command += [f"--time={SECONDS}", f"--client={clients}", f"--file={script}"]
    command += [f"--define={name}={value}" for name, value in variables.items()]
    process = subprocess.Popen(
        command,
        env=libpq(database_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = []
    seen: list[tuple[float, float]] = []  # transactions of each second, and the CPU at its end
    with process:
        assert process.stderr is not None  # noqa: S101 - for the type checker
        for line in process.stderr:
            said.append(line)
            if found := re.match(r"progress: [\d.]+ s, ([\d.]+) tps, .*, 0 failed$", line):
                seen.append((float(found[1]), cpu_seconds(postgres.pid)))
    if process.returncode != 0 or len(seen) < SECONDS - 1:
        raise RuntimeError(f"pgbench failed: {''.join(said)[-2000:]}")
    measured = [rate for rate, _ in seen[1:]]
    return Outcome(
        calls_per_second=sum(measured) / len(measured),
        cpu_us={"postgres": 1e6 * (seen[-1][1] - seen[0][1]) / sum(measured)},
    )
