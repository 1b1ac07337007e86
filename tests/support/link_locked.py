"""Install a lock as `pip install --require-hashes` does, by links to this environment's packages.

This environment was installed by pip from the lock that the smaller ones are parts of.
"""

import argparse
import os
import re
import sys
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement


def link_packages(lock: Path, environment: Path) -> None:
    """Link the files of each package that the lock names, and of no other."""
    for line in re.findall(r"^(\w.*?) ?\\?$", lock.read_text(), re.MULTILINE):
        locked = Requirement(line)
        if locked.marker and not locked.marker.evaluate():
            continue
        package = distribution(locked.name)
        assert package.version in locked.specifier, f"{package.version} is not {locked}"
        for file in package.files or ():
            path = Path(os.path.normpath(package.locate_file(file)))
            # A script names the Python that runs it, which is not that of the other environment.
            if path.parent.name != "bin" or not path.read_bytes().startswith(b"#!"):
                link = environment / path.relative_to(sys.prefix)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", type=Path, required=True)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("--no-cache-dir", action="store_true")
    parser.add_argument("--require-hashes", action="store_true", required=True)
    parser.add_argument("--requirement", type=Path, required=True)
    arguments = parser.parse_args()
    link_packages(arguments.requirement, arguments.python.parents[1])
