"""Create or refresh .venv from requirements.lock. Run by make, with any Python.

Does nothing when .venv is already the lock's and this checkout's. Concurrent runs wait for
one another. Kept in the syntax of old Pythons so that it can say which one is needed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "installed")
OLDEST = (3, 11)


def fingerprint():
    """What .venv depends on: the lock, the package's metadata, the interpreter, its place."""
    import tomllib

    with open(os.path.join(ROOT, "requirements.lock"), "rb") as file:
        lock = file.read()
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        project = tomllib.load(file)["project"]
    return hashlib.sha256(lock + repr((project, sys.version_info[:2], ROOT)).encode()).hexdigest()


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
    print("Setting up .venv (once; about a minute) ...", flush=True)
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
            os.path.join(ROOT, "requirements.lock"),
        ]
    )
    subprocess.check_call(
        pip + ["install", "--no-deps", "--no-build-isolation", "--editable", ROOT]
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
