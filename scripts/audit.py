"""Look the locked dependencies up in PyPI's database of vulnerabilities, by pip-audit.

Exit status: 0 when all were looked up and none is known to be vulnerable, 1 when one is, 2 when
some could not be looked up. pip-audit itself is content when it has looked nothing up.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / "benchmarks" / "requirements.lock")
SHOWN = 5


def main() -> None:
    found = {(each["name"], each.get("version")): each for lock in LOCKS for each in audited(lock)}
    text, status = judged(list(found.values()))
    print(text)
    sys.exit(status)


def audited(lock: Path) -> list[dict[str, Any]]:
    """What pip-audit says of each package of a lock; it takes no two locks with one in common."""
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


def judged(dependencies: list[dict[str, Any]]) -> tuple[str, int]:
    """What to say of pip-audit's findings, and the exit status."""
    vulnerable = [
        f"  {each['name']} {each['version']}: {finding['id']}"
        f" (mended in {', '.join(finding['fix_versions']) or 'no version'})"
        for each in dependencies
        for finding in each.get("vulns", ())
    ]
    unknown = [each["name"] for each in dependencies if "skip_reason" in each]
    lines = [f"{len(dependencies) - len(unknown)} of {len(dependencies)} locked packages audited"]
    if unknown:
        names = ", ".join(unknown[:SHOWN]) + (", ..." if len(unknown) > SHOWN else "")
        lines.append(f"NOT AUDITED, as PyPI's database cannot be reached, or lacks them: {names}")
    if vulnerable:
        lines += ["VULNERABLE:", *vulnerable]
    elif not unknown:
        lines.append("none is known to be vulnerable")
    return "\n".join(lines), 1 if vulnerable else 2 if unknown else 0


if __name__ == "__main__":
    main()
