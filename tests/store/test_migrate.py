"""How migrations run, and a service that waits for them."""

import os
import re
import shutil
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from support import pooler
from support.cluster import Cluster
from support.migrations import FILES, VERSIONS, applied, ask, catalog
from support.process import run_command, server_process

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.schema import MIGRATIONS

ROOT = MIGRATIONS.parent


def make(*arguments: str, url: str = "", cwd: Path = ROOT) -> subprocess.Popen[str]:
    """Start a target of the Makefile, in the .venv that runs this test: it is not made anew."""
    outer = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MIGRATE_DATABASE_URL")
    return subprocess.Popen(
        ["make", "-s", "--old-file=venv", *arguments],
        cwd=cwd,
        env={k: v for k, v in os.environ.items() if k not in outer} | {"DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    """What a process printed until it ended well."""
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


class TestRun:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(migrate, "POLL_SECONDS", 0.05)

    def test_settings_of_a_role_do_not_end_a_migration(
        self, empty_database: str, directory: Path
    ) -> None:
        """Neither its timeouts, nor transactions that are read-only or serializable."""
        settings = {
            "statement_timeout": "300ms",
            "lock_timeout": "300ms",
            "idle_in_transaction_session_timeout": "300ms",
            "idle_session_timeout": "300ms",
            "default_transaction_read_only": "on",
            "default_transaction_isolation": "serializable",
        }
        with psycopg.connect(empty_database, autocommit=True) as connection:
            if connection.info.server_version >= 170_000:
                settings["transaction_timeout"] = "300ms"
            for name, value in settings.items():
                connection.execute(
                    f"ALTER DATABASE {connection.info.dbname} SET {name} = '{value}'"  # type: ignore[arg-type]
                )
        (directory / "20200101000000_slow.sql").write_text(
            "-- migrate:up\nCREATE TABLE slow AS SELECT current_setting('transaction_isolation'),"
            " pg_sleep(0.6)::text;\n-- migrate:down\n"
        )
        assert migrate.up(empty_database, quiet=True) == 0
        assert ask(empty_database, "SELECT current_setting FROM slow") == [("read committed",)]

    def test_says_what_it_waits_for_and_who_waits_for_it(
        self, empty_database: str, directory: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """By process, program and role, without the text of a statement; and by table."""
        name = "20200101000000_locks.sql"
        (directory / name).write_text(
            "-- migrate:up\nLOCK TABLE held, shared IN SHARE MODE;\nLOCK TABLE held;\n"
            "SELECT pg_sleep(0.3);\n-- migrate:down\n"
        )
        with (
            ThreadPoolExecutor(1) as pool,
            psycopg.connect(empty_database, application_name="nightly report") as holder,
        ):
            pid = holder.info.backend_pid
            holder.execute("CREATE TABLE held (); CREATE TABLE shared ()")
            holder.commit()
            holder.execute("SELECT 'a secret' FROM held")
            running = pool.submit(migrate.up, empty_database)
            written = ""
            deadline = time.monotonic() + 30
            while "waits for" not in written:
                assert time.monotonic() < deadline, written
                time.sleep(0.05)
                written += capfd.readouterr().err
            holder.rollback()
            assert running.result() == 0
        written += capfd.readouterr().err
        waiting = f"waits for a lock of process {pid}, nightly report, postgres"
        assert f"chat-ticket-svc: {waiting}, idle in transaction\n" in written
        assert f"{name}: reads and writes of held wait for it\n" in written
        assert f"{name}: writes of held, shared wait for it\n" in written
        assert "secret" not in written

    def test_says_that_another_run_goes_first(
        self, empty_database: str, directory: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (directory / "20200101000000_slow.sql").write_text(
            "-- migrate:up\nSELECT pg_sleep(1);\n-- migrate:down\n"
        )
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(migrate.up, empty_database) for _ in range(2)]
            assert [run.result() for run in runs] == [0, 0]
        expected = (
            r"chat-ticket-svc: waits for another run, of process \d+, chat-ticket-svc migrate"
        )
        assert re.search(expected, capfd.readouterr().err)

    def test_shows_the_progress_of_an_index_on_a_terminal(
        self, empty_database: str, directory: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with psycopg.connect(empty_database, autocommit=True) as connection:
            connection.execute(
                "CREATE TABLE pages (n int, padding char(5000));"
                "ALTER TABLE pages ALTER padding SET STORAGE PLAIN;"
                "INSERT INTO pages SELECT n, 'x' FROM generate_series(1, 50) n;"
                "CREATE FUNCTION slow(n int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS"
                " 'BEGIN PERFORM pg_sleep(0.02); RETURN n; END'"
            )
        (directory / "20200101000000_index.sql").write_text(
            "-- migrate:up\nCREATE INDEX ON pages (slow(n));\n-- migrate:down\n"
        )
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (30, 100))
        with os.fdopen(theirs, "w") as terminal, os.fdopen(ours, "rb") as screen:
            monkeypatch.setattr(sys, "stderr", terminal)
            assert migrate.up(empty_database) == 0
            shown = screen.read1().decode()
        done = re.findall(r"index of pages, building index: scanning table: +(\d+)%", shown)
        assert {0} < set(map(int, done)) <= set(range(101)), shown


class TestMake:
    def test_three_migrate_at_once(self, empty_database: str, fresh_database: str) -> None:
        """Concurrent runs wait for one another, all end well, and the schema is there once."""
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        waiting += "AND datname = current_database()"
        with psycopg.connect(empty_database) as holder:
            # What each does first; so all three are at it when the first can go on.
            holder.execute("CREATE TABLE schema_migrations (version text PRIMARY KEY)")
            processes = [make("migrate", url=empty_database) for _ in range(3)]
            deadline = time.monotonic() + 30
            while ask(empty_database, waiting) != [(3,)]:
                assert time.monotonic() < deadline, "they did not wait"
                time.sleep(0.02)
            holder.rollback()
        for process in processes:
            finished(process)
        assert applied(empty_database) == VERSIONS
        assert catalog(empty_database) == catalog(fresh_database)

    def test_three_create_the_database_at_once(
        self, cluster: Cluster, empty_database: str, fresh_database: str
    ) -> None:
        """A database that does not exist yet is created once, and all succeed."""
        cluster.drop(empty_database)
        for process in [make("migrate", url=empty_database) for _ in range(3)]:
            finished(process)
        assert catalog(empty_database) == catalog(fresh_database)

    def test_migrating_again_does_nothing(self, fresh_database: str) -> None:
        """And is no error."""
        before = catalog(fresh_database)
        assert "Appl" not in finished(make("migrate", url=fresh_database))
        assert catalog(fresh_database) == before

    def test_migrate_status_lists_every_file(self, fresh_database: str) -> None:
        """Applied and pending ones."""
        assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        output = finished(make("migrate-status", url=fresh_database))
        assert re.findall(r"\[.\] .*\.sql", output) == [
            *[f"[X] {name}" for name in FILES[:-1]],
            f"[ ] {FILES[-1]}",
        ]

    def test_failure_is_an_exit_status(self) -> None:
        """What make runs next does not run on a database that was not migrated."""
        process = make("migrate", url="postgresql://nobody@/none?host=/nonexistent")
        assert "no server has this socket" in process.communicate(timeout=60)[0]
        assert process.returncode != 0

    def test_new_migration_has_an_up_and_a_down(self, tmp_path: Path) -> None:
        """The file is named for what it does; without a name there is none."""
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / ".venv").symlink_to(ROOT / ".venv")
        nameless = make("new-migration", cwd=tmp_path)
        assert "usage: make new-migration NAME=" in nameless.communicate(timeout=60)[0]
        assert nameless.returncode != 0
        assert not (tmp_path / "migrations").exists()
        finished(make("new-migration", "NAME=add_something", cwd=tmp_path))
        (file,) = (tmp_path / "migrations").iterdir()
        assert re.fullmatch(r"\d{14}_add_something\.sql", file.name)
        assert file.name > FILES[-1]
        text = file.read_text()
        assert re.findall(r"^-- migrate:(\w+)$", text, re.MULTILINE) == ["up", "down"]
        assert "SET LOCAL lock_timeout = '5s';" in text.partition("-- migrate:down")[0]


class TestService:
    def refusal(self, url: str) -> str:
        """The error of a server that does not start on this database."""
        done = run_command("serve", **pooler.environment(url), CHAT_TICKET_PORT="0")
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr.rstrip("\n")

    @pytest.mark.parametrize("lacking", [1, len(FILES)])
    def test_does_not_start_on_a_stale_schema(self, fresh_database: str, lacking: int) -> None:
        """It names the missing migrations, oldest first, and what to do."""
        for _ in range(lacking):
            assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        missing = ", ".join(FILES[-lacking:])
        run = "run chat-ticket-svc migrate, or make migrate"
        expected = f"chat-ticket-svc: the database lacks {missing}: {run}"
        assert self.refusal(fresh_database) == expected

    def test_does_not_start_on_an_empty_database(self, empty_database: str) -> None:
        """It lacks everything, the table of migrations too."""
        assert f"lacks {', '.join(FILES)}:" in self.refusal(empty_database)
        assert ask(empty_database, "SELECT FROM pg_tables WHERE schemaname = 'public'") == []

    def test_starts_on_a_newer_schema(self, fresh_database: str) -> None:
        """A database is migrated before the service is replaced."""
        with psycopg.connect(fresh_database) as connection:
            connection.execute("INSERT INTO schema_migrations VALUES ('99990101000000')")
        with server_process(fresh_database) as process:
            process.wait_for("listening")
            assert process.stop() == 0
