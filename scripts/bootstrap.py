"""Creates or refreshes .venv, or the environment that is named, from its lock. Run by make.

Does nothing when the environment is up to date with the lock and this checkout. Concurrent runs
wait for one another. Runs on any Python 3, so that it can say which version is required.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROJECT = ".venv"  # the environment that the project itself is installed in
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
    """A hash of what the environment depends on: lock, package metadata, Python and directory."""
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
        path = shutil.which("python3.%d" % minor)
        # Tried, because a pyenv shim exists even when its version is not installed.
        if path and subprocess.call([path, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def installed():
    try:
        with open(STAMP) as file:
            return file.read()
    except OSError:
        return ""


def say(text):
    print(text, flush=True)


def install():
    if os.path.exists(VENV):
        shutil.rmtree(VENV)
    say("Setting up %s (once; it takes some minutes if the network is slow) ..." % NAME)
    # The base Python: this one may be that of .venv, if activated, which was just deleted.
    python = getattr(sys, "_base_executable", sys.executable)
    if subprocess.call([python, "-m", "venv", VENV]) != 0:
        sys.exit(
            "this Python cannot create virtual environments; on Debian: apt install python3-venv"
        )
    pip = [
        os.path.join(VENV, "bin", "python"),
        "-m",
        "pip",
        "--disable-pip-version-check",
    ]
    # A terminal shows what is being downloaded, and how far.
    if not sys.stdout.isatty():
        pip.append("--quiet")
    say("Installing what %s names ..." % LOCKS[NAME])
    # Without --use-pep517, older pips write scripts that fail in a path with a space.
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
        say("Installing %s ..." % os.path.relpath(package, os.path.dirname(ROOT)))
        subprocess.check_call(
            pip + ["install", "--no-deps", "--no-build-isolation", "--editable", package]
        )


def main():
    if sys.version_info < OLDEST:
        newer = newer_python()
        if newer is None:
            sys.exit("Python 3.11 or newer is required; set it with make PYTHON=/path/to/python3")
        os.execv(newer, [newer] + sys.argv)
    with open(os.path.join(ROOT, ".bootstrap.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if installed() != fingerprint():
            install()
            with open(STAMP, "w") as file:
                file.write(fingerprint())


if __name__ == "__main__":
    main()
