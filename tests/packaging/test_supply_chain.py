"""What is installed is what was locked, byte for byte, and can be audited."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

LOCK = ROOT / "requirements.lock"
BENCHMARK_LOCK = ROOT / "benchmarks" / "requirements.lock"


def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestLock:
    @pytest.mark.parametrize(
        ("lock", "fewest"),
        [
            (LOCK, 50),
            (BENCHMARK_LOCK, 50),
            (ROOT / "requirements-service.lock", 40),
            (ROOT / "requirements-build.lock", 5),
            (ROOT / "clients" / "python" / "requirements.lock", 2),
            (ROOT / "docs" / "requirements.lock", 5),
        ],
        ids=lambda value: str(value.relative_to(ROOT)) if isinstance(value, Path) else "",
    )
    def test_every_requirement_is_pinned_and_hashed(self, lock: Path, fewest: int) -> None:
        """One version each, and no host, path or version range."""
        text = lock.read_text()
        entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).strip())
        assert len(entries) > fewest
        for entry in entries:
            assert re.match(r"[a-z0-9._-]+==[^ ]+ ( ?; [^\\]+)?\\\n", entry), entry
            assert "--hash=sha256:" in entry, entry
        assert "://" not in text

    @pytest.mark.parametrize(
        ("environment", "lock"), [(".venv", LOCK), (".venv-bench", BENCHMARK_LOCK)]
    )
    def test_a_file_that_is_not_the_locked_one_is_not_installed(
        self, tmp_path: Path, environment: str, lock: Path
    ) -> None:
        """Creating the environment fails, and names the cause."""
        for name in ("Makefile", "README.md", "pyproject.toml"):
            shutil.copy(ROOT / name, tmp_path)
        for name in ("scripts", "src", "clients/python"):
            shutil.copytree(ROOT / name, tmp_path / name)
        wheel = re.escape("annotated-types==") + r"\S+ \\\n(    --hash=sha256:[0-9a-f]{64} ?\\?\n)+"
        [entry] = re.finditer(wheel, lock.read_text())
        forged = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + "0" * 64, entry.group())
        forged_lock = tmp_path / lock.relative_to(ROOT)
        forged_lock.parent.mkdir(exist_ok=True)
        forged_lock.write_text(forged)
        result = subprocess.run(
            [sys.executable, "scripts/bootstrap.py", environment],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode != 0
        assert "DO NOT MATCH THE HASHES" in result.stdout + result.stderr
        assert not (tmp_path / environment / "installed").exists()


class TestAudit:
    def test_unreachable_database_is_reported(self) -> None:
        """Nothing looked up is not nothing found."""
        result = subprocess.run(
            [sys.executable, "scripts/audit.py"],
            cwd=ROOT,
            env={**os.environ, "HTTPS_PROXY": "http://127.0.0.1:1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 2
        assert "cannot be reached" in result.stdout

    @pytest.mark.parametrize(
        ("dependencies", "status", "message"),
        [
            ([{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 locked packages audited"),
            (
                [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "?"}],
                2,
                "NOT AUDITED, unreachable or missing in PyPI's database: b",
            ),
            (
                [
                    {"name": "b", "skip_reason": "?"},
                    {
                        "name": "a",
                        "version": "1",
                        "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}],
                    },
                ],
                1,
                "a 1: PYSEC-1 (fixed in 2)",
            ),
        ],
    )
    def test_findings(self, dependencies: list[dict[str, Any]], status: int, message: str) -> None:
        """A vulnerability, or a package that was not looked up, is never a success."""
        text, found = audit().summarize(dependencies)
        assert found == status
        assert message in text
