"""The version of the service that is measured: this checkout, or another commit beside it."""

import contextvars
import filecmp
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ENVIRONMENT

ROOT = Path(__file__).parent.parent
COMMITS = ROOT / "build" / "bench" / "commits"

LOCK = "requirements.lock"


@dataclass(frozen=True)
class Checkout:
    """A directory with the sources of a version, and the Python that runs it."""

    root: Path
    python: str

    @property
    def environment(self) -> dict[str, str]:
        """The environment of its processes, which also run in its directory."""
        # Before what is installed in the environment of `python`, which may be another version.
        paths = [str(self.root / "src"), ENVIRONMENT.get("PYTHONPATH", "")]
        return {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


THIS = Checkout(ROOT, sys.executable)

# What the servers of a part run. It is a context variable because only `against` ever changes it,
# for all that a part does.
CURRENT = contextvars.ContextVar("CURRENT", default=THIS)


def commit_id(name: str) -> str:
    """The full id of a commit. Exits with git's error if there is none."""
    command = ["git", "rev-parse", "--verify", f"{name}^{{commit}}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"AGAINST={name}: {process.stderr.strip()}")
    return process.stdout.strip()


def of_commit(commit: str) -> Checkout:
    """The sources of a commit, which are kept in build/bench/commits for the next time.

    It runs with the environment of this checkout, or with its own if its lock is different.
    """
    root = COMMITS / commit
    if not root.exists():
        unfinished = root.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        # Not a worktree of git, which would have to be removed also after a kill.
        git, tar = ["git", "archive", commit], ["tar", "-x", "-C", str(unfinished)]
        archive = subprocess.run(git, cwd=ROOT, stdout=subprocess.PIPE, check=True)
        subprocess.run(tar, input=archive.stdout, check=True)
        unfinished.rename(root)
    if filecmp.cmp(root / LOCK, ROOT / LOCK, shallow=False):
        return Checkout(root, sys.executable)
    make = ["make", "venv"]
    subprocess.run(make, cwd=root, check=True)
    return Checkout(root, str(root / ".venv" / "bin" / "python"))
