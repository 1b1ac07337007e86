"""Runs the service's statements with PostgreSQL's pgbench: the limit for any service."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.service import Postgres, cpu_seconds, libpq

SECONDS = 3  # the first, in which pgbench connects and prepares, is not measured


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a run. The CPU time is per transaction."""

    calls_per_second: float
    cpu_us: Mapping[str, float]


def statement(sql: str, values: Mapping[str, str]) -> str:
    """A statement of the store, with SQL and pgbench expressions in place of its parameters."""
    filled = sql % {name: f"({value})" for name, value in values.items()}
    return " ".join(filled.split()) + ";\n"


def texts(contents: Sequence[str], number: str) -> str:
    """An SQL expression for one of `contents`, chosen by the pgbench expression `number`."""
    # An unescaped colon would start a pgbench variable.
    escapes = str.maketrans({"\\": r"\\", "'": r"\'", ":": r"\x3a", "\n": r"\n"})
    quoted = ", ".join(f"E'{content.translate(escapes)}'" for content in contents)
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
    output = []
    progress: list[tuple[float, float]] = []  # the rate of each second, and the CPU time at its end
    with process:
        assert process.stderr is not None  # noqa: S101 - for the type checker
        for line in process.stderr:
            output.append(line)
            if match := re.match(r"progress: [\d.]+ s, ([\d.]+) tps, .*, 0 failed$", line):
                progress.append((float(match[1]), cpu_seconds(postgres.pid)))
    if process.returncode != 0 or len(progress) < SECONDS - 1:
        raise RuntimeError(f"pgbench failed: {''.join(output)[-2000:]}")
    measured = [rate for rate, _ in progress[1:]]
    return Outcome(
        calls_per_second=sum(measured) / len(measured),
        cpu_us={"postgres": 1e6 * (progress[-1][1] - progress[0][1]) / sum(measured)},
    )
