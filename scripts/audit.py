"""Checks the locked dependencies for known vulnerabilities, with pip-audit.

The exit status is 0 when all packages were audited and none is vulnerable, 1 when one is
vulnerable, and 2 when some could not be audited. pip-audit alone succeeds even when it has audited
nothing.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / "benchmarks" / "requirements.lock")
MAX_NAMED = 5


def main() -> None:
    packages = {(p["name"], p.get("version")): p for lock in LOCKS for p in audit_lock(lock)}
    text, status = summarize(list(packages.values()))
    print(text)
    sys.exit(status)


def audit_lock(lock: Path) -> list[dict[str, Any]]:
    """pip-audit's result for each package of one lock. It rejects locks that share a package."""
    result = subprocess.run(
        [
            Path(sys.executable).with_name("pip-audit"),
            *("--requirement", lock, "--require-hashes", "--disable-pip"),
            *("--format", "json", "--progress-spinner", "off"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        dependencies: list[dict[str, Any]] = json.loads(result.stdout)["dependencies"]
    except (ValueError, KeyError):
        last = result.stderr.strip().splitlines()[-1:]
        print("nothing was audited: PyPI's database cannot be reached", *last, sep="\n  ")
        sys.exit(2)
    return dependencies


def summarize(dependencies: list[dict[str, Any]]) -> tuple[str, int]:
    """The text to print for pip-audit's results, and the exit status."""
    vulnerable = [
        f"  {package['name']} {package['version']}: {vulnerability['id']}"
        f" (fixed in {', '.join(vulnerability['fix_versions']) or 'no version'})"
        for package in dependencies
        for vulnerability in package.get("vulns", ())
    ]
    skipped = [package["name"] for package in dependencies if "skip_reason" in package]
    lines = [f"{len(dependencies) - len(skipped)} of {len(dependencies)} locked packages audited"]
    if skipped:
        names = ", ".join(skipped[:MAX_NAMED]) + (", ..." if len(skipped) > MAX_NAMED else "")
        lines.append(f"NOT AUDITED, unreachable or missing in PyPI's database: {names}")
    if vulnerable:
        lines += ["VULNERABLE:", *vulnerable]
    elif not skipped:
        lines.append("no known vulnerabilities")
    return "\n".join(lines), 1 if vulnerable else 2 if skipped else 0


if __name__ == "__main__":
    main()
