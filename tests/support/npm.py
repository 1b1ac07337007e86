"""The Node packages of this repository: installed and built once, for all workers of a test run."""

import fcntl
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NODE_CLIENT = ROOT / "clients" / "node"
PLAIN_NODE_CLIENT = ROOT / "tests" / "support" / "node"
SECONDS = 100  # more than any of these programs takes

Npm = Callable[..., str]

BUILD_FILES = ("package.json", "package-lock.json", "tsconfig.json", "src/**/*.ts", "dist/**/*.*")


def npm_runner(environment: Mapping[str, str]) -> Npm:
    """`npm(directory, …)`: run npm, or another program of Node, and return what it prints."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"the Node clients need {program} on PATH")

    def run(directory: Path, *command: str, program: str = "npm", **variables: str) -> str:
        path = shutil.which(program)
        assert path is not None
        done = subprocess.run(
            [path, *command],
            cwd=directory,
            env={**environment, **variables},
            capture_output=True,
            check=False,
            encoding="utf-8",
            timeout=SECONDS,
        )
        if done.returncode != 0:
            output = done.stdout + done.stderr
            raise AssertionError(f"{program} {' '.join(command)} in {directory}:\n{output}")
        return done.stdout

    return run


def install(npm: Npm, directory: Path) -> None:
    """Install the locked dependencies of a package, unless they are installed."""
    command = ("ci", "--prefer-offline", "--no-progress")
    run_when_changed(
        directory, "installed", ["package-lock.json"], lambda: npm(directory, *command)
    )


def build(npm: Npm, directory: Path) -> None:
    """Compile an installed package, unless `dist` is what its sources compile to."""
    run_when_changed(directory, "built", BUILD_FILES, lambda: npm(directory, "run", "build"))


def run_when_changed(
    directory: Path, name: str, patterns: Collection[str], run: Callable[[], object]
) -> None:
    """Run a step, unless the files of `patterns` are as the last run of the step left them.

    Other processes wait meanwhile. `npm ci` removes the stamps of all steps with `node_modules`.
    """
    stamp = directory / "node_modules" / f".{name}"
    with (directory / "package-lock.json").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != digest(directory, patterns):
            run()
            stamp.write_text(digest(directory, patterns))


def digest(directory: Path, patterns: Collection[str]) -> str:
    """The names and contents of files."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        found.update(f"{path.relative_to(directory)} {content}\n".encode())
    return found.hexdigest()
