"""Create or refresh .venv, or another environment by its name, from its lock. Run by make.

Does nothing when it is already the lock's and this checkout's. Concurrent runs wait for one
another. Takes any Python: kept in the syntax of old ones so that it can say which one is needed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT = ".venv"  # the one that the project itself is installed in
PACKAGES = [os.path.join(ROOT, "clients", "python"), ROOT]
NAME = sys.argv[1] if len(sys.argv) > 1 else PROJECT
LOCKS = {
    PROJECT: "requirements.lock",
    ".venv-bench": "benchmarks/requirements.lock",
    ".venv-docs": "docs/requirements.lock",
}
LOCK = os.path.join(ROOT, LOCKS[NAME])
VENV = os.path.join(ROOT, NAME)
STAMP = os.path.join(VENV, "installed")
OLDEST = (3, 11)


def fingerprint():
    """What it depends on: the lock, the packages' metadata, the interpreter, its place."""
    import tomllib

    with open(LOCK, "rb") as file:
        lock = file.read()
    projects = []
    for package in PACKAGES if NAME == PROJECT else []:
        with open(os.path.join(package, "pyproject.toml"), "rb") as file:
            projects.append(tomllib.load(file)["project"])
    return hashlib.sha256(lock + repr((projects, sys.version_info[:2], ROOT)).encode()).hexdigest()


def newer_python():
    """A Python on PATH that is new enough, or None."""
    for minor in (13, 12, 11):
        found = shutil.which("python3.%d" % minor)
        # A pyenv shim answers to the name without having the version behind it.
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return found
    return None


def installed():
    try:
        with open(STAMP) as file:
            return file.read()
    except OSError:
        return ""


def install():
    if os.path.exists(VENV):
        shutil.rmtree(VENV)
    print("Setting up %s (once; about a minute) ..." % NAME, flush=True)
    # Not the Python of .venv itself, which has just gone, when somebody has it activated.
    python = getattr(sys, "_base_executable", sys.executable)
    if subprocess.call([python, "-m", "venv", VENV]) != 0:
        sys.exit(
            "This Python cannot create virtual environments. On Debian: apt install python3-venv"
        )
    pip = [
        os.path.join(VENV, "bin", "python"),
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
    ]
    # Older pips build without PEP 517 by default, and then write scripts that cannot run from a
    # path with a space in it.
    subprocess.check_call(
        pip
        + [
            "install",
            "--use-pep517",
            "--require-hashes",
            "-r",
            LOCK,
        ]
    )
    for package in PACKAGES if NAME == PROJECT else []:
        subprocess.check_call(
            pip + ["install", "--no-deps", "--no-build-isolation", "--editable", package]
        )


def main():
    if sys.version_info < OLDEST:
        newer = newer_python()
        if newer is None:
            sys.exit("Python 3.11 or newer is needed: make PYTHON=/path/to/python3 names one.")
        os.execv(newer, [newer] + sys.argv)
    with open(os.path.join(ROOT, ".bootstrap.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed() != fingerprint():
            install()
            with open(STAMP, "w") as file:
                file.write(fingerprint())


if __name__ == "__main__":
    main()
