"""The migrations: what they build, how they run, and a service that waits for them."""

import os
import re
import shutil
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from support.cluster import Cluster
from support.plain_rows import Rows
from support.process import START_SECONDS, server_process
from support.sessions import get_session

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.connection import connection_string
from chat_ticket_svc.store.schema import MIGRATIONS

ROOT = MIGRATIONS.parent
FILES = sorted(path.name for path in MIGRATIONS.glob("*.sql"))

ID = "uuid NOT NULL DEFAULT gen_random_uuid()"
TEXT = "text NOT NULL"
KEY = "uuid NOT NULL"
TIME = "timestamp with time zone NOT NULL DEFAULT now()"

# The columns of the seeds, and those that the design adds. Where they differ: timestamptz for
# timestamp, and a has_ticket that is never null.
COLUMNS = {
    "chat_sessions": {
        "id": ID,
        "tenant_id": TEXT,
        "status": "text NOT NULL DEFAULT 'active'::text",
        "has_ticket": "boolean NOT NULL DEFAULT false",
        "revision": "bigint NOT NULL DEFAULT 0",
        "created_at": TIME,
        "updated_at": TIME,
        "updated_hour": "timestamp with time zone NOT NULL DEFAULT date_bin("
        "'01:00:00'::interval, updated_at, '2000-01-01 00:00:00+00'::timestamp with time zone)",
    },
    "chat_messages": {
        "id": ID,
        "tenant_id": TEXT,
        "session_id": KEY,
        "sequence": "bigint NOT NULL",
        "revision": "bigint NOT NULL",
        "role": TEXT,
        "content": TEXT,
        "metadata": "jsonb",
        "created_at": TIME,
    },
    "chat_message_tombstones": {
        "tenant_id": TEXT,
        "session_id": KEY,
        "message_id": KEY,
        "revision": "bigint NOT NULL",
    },
    "chat_attachments": {
        "id": ID,
        "tenant_id": TEXT,
        "message_id": KEY,
        "file_url": TEXT,
        "file_name": TEXT,
        "file_type": TEXT,
        "created_at": TIME,
    },
    "tickets": {
        "id": ID,
        "tenant_id": TEXT,
        "title": TEXT,
        "status": "text NOT NULL DEFAULT 'open'::text",
        "created_at": TIME,
        "updated_at": TIME,
    },
    "chat_tickets": {
        "id": ID,
        "tenant_id": TEXT,
        "session_id": KEY,
        "ticket_id": KEY,
        "created_at": TIME,
    },
}

# Names of the seeds.
SEED_INDEXES = {
    "idx_chat_sessions_tenant",
    "idx_chat_messages_session",
    "idx_chat_attachments_message",
    "idx_chat_tickets_session",
    "idx_chat_tickets_ticket",
    "idx_chat_messages_content",
}
SEED_CASCADES = {
    "fk_chat_messages_session",
    "fk_chat_attachments_message",
    "fk_chat_tickets_session",
}


def ask(url: str, statement: LiteralString) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement).fetchall()


def catalog(url: str) -> list[str]:
    """All that is in a database, as definitions that can be compared with another's."""
    statement = """
        SELECT concat_ws(' ', relkind, relname, attname, attnotnull,
                         format_type(atttypid, atttypmod), attcollation::regcollation,
                         pg_get_expr(adbin, adrelid))
          FROM pg_class c
          LEFT JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
          LEFT JOIN pg_attrdef ON adrelid = c.oid AND adnum = attnum
         WHERE relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated)
          FROM pg_constraint WHERE connamespace = 'public'::regnamespace
         UNION ALL
        SELECT pg_get_indexdef(oid)
          FROM pg_class WHERE relkind = 'i' AND relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', pg_get_triggerdef(oid), tgenabled)
          FROM pg_trigger WHERE NOT tgisinternal
         UNION ALL
        SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', typtype, typname)
          FROM pg_type WHERE typnamespace = 'public'::regnamespace
         UNION ALL
        SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'
         UNION ALL
        SELECT extname FROM pg_extension
    """
    return sorted(definition for (definition,) in ask(url, statement))


def ours(url: str) -> list[str]:
    """The catalog without the table that dbmate keeps."""
    return [definition for definition in catalog(url) if "schema_migrations" not in definition]


def applied(url: str) -> list[str]:
    return [row[0] for row in ask(url, "SELECT version FROM schema_migrations ORDER BY version")]


VERSIONS = [name.split("_")[0] for name in FILES]


@pytest.fixture
def empty_database(cluster: Cluster) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = f"test_{uuid.uuid4().hex}"
    cluster.execute(f"CREATE DATABASE {name}")
    yield cluster.url(name)
    cluster.drop(cluster.url(name))


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where dbmate looks for migrations in this test; empty."""
    path = tmp_path / "migrations"
    path.mkdir()
    monkeypatch.setattr(migrate, "MIGRATIONS", path)
    return path


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


class TestShape:
    def test_tables_and_columns(self, database: str) -> None:
        """There are the seeds' columns, with their types and defaults, and a tenant everywhere."""
        found: dict[str, dict[str, str]] = {}
        for table, name, definition in ask(
            database,
            """
            SELECT relname, attname, concat_ws(' ', format_type(atttypid, atttypmod),
                   CASE WHEN attnotnull THEN 'NOT NULL' END,
                   'DEFAULT ' || pg_get_expr(adbin, adrelid))
              FROM pg_class c JOIN pg_attribute ON attrelid = c.oid
              LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
             WHERE relnamespace = 'public'::regnamespace AND relkind NOT IN ('i', 'I')
               AND attnum > 0 AND NOT attisdropped
            """,
        ):
            found.setdefault(table, {})[name] = definition
        del found["schema_migrations"]
        assert found == COLUMNS

    def test_primary_keys_start_with_the_tenant(self, database: str) -> None:
        """An id is unique within its tenant, and reveals nothing about other tenants."""
        found = ask(
            database,
            """
            SELECT relname, pg_get_constraintdef(k.oid)
              FROM pg_constraint k JOIN pg_class c ON conrelid = c.oid
             WHERE contype = 'p' AND relnamespace = 'public'::regnamespace
            """,
        )
        keys = dict.fromkeys(COLUMNS, "PRIMARY KEY (tenant_id, id)")
        keys["chat_message_tombstones"] = "PRIMARY KEY (tenant_id, message_id)"
        assert dict(found) == keys | {"schema_migrations": "PRIMARY KEY (version)"}

    def test_foreign_keys(self, database: str) -> None:
        """All have the tenant and an index of their columns; none cascades updates."""
        found = ask(
            database,
            """
            SELECT conname, confupdtype::text, confdeltype::text,
                   ARRAY(SELECT attname::text FROM pg_attribute
                          WHERE attrelid = conrelid AND attnum = ANY (conkey)),
                   EXISTS (SELECT FROM pg_index WHERE indrelid = conrelid AND indpred IS NULL
                              AND (indkey::smallint[])[0:cardinality(conkey) - 1] @> conkey)
              FROM pg_constraint WHERE contype = 'f'
            """,
        )
        names: dict[str, set[str]] = {"c": set(), "a": set()}
        for name, on_update, on_delete, columns, indexed in found:
            assert ("tenant_id" in columns, on_update, indexed) == (True, "a", True), name
            names[on_delete].add(name)
        assert names["c"] == {*SEED_CASCADES, "fk_chat_message_tombstones_session"}
        assert names["a"] == {"fk_chat_tickets_ticket"}

    def test_indexes(self, database: str) -> None:
        """The seeds' names are there, and each index starts with the tenant."""
        found = ask(
            database,
            """
            SELECT c.relname, attname
              FROM pg_index JOIN pg_class c ON c.oid = indexrelid
              JOIN pg_class t ON t.oid = indrelid AND t.relname <> 'schema_migrations'
              LEFT JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
             WHERE c.relnamespace = 'public'::regnamespace
            """,
        )
        assert {name for name, _ in found} > SEED_INDEXES
        assert {name for name, column in found if column != "tenant_id"} == set()

    def test_names_of_constraints(self, database: str) -> None:
        """A name has the table, the columns and the kind, by which errors are distinguished."""
        found = ask(
            database,
            """
            SELECT relname, conname, contype::text,
                   ARRAY(SELECT attname::text FROM pg_attribute
                          WHERE attrelid = conrelid AND attnum = ANY (conkey))
              FROM pg_constraint JOIN pg_class c ON conrelid = c.oid
             WHERE relnamespace = 'public'::regnamespace AND contype IN ('c', 'f', 'p', 'u', 'x')
            """,
        )
        assert len(found) > len(COLUMNS)
        for table, name, kind, columns in found:
            some = f"(_({'|'.join(columns)}))+"
            pattern = {
                "p": f"{table}_pkey",
                "f": f"fk_{table}_(session|message|ticket)",
                "c": f"{table}{some}_check",
            }.get(kind, f"{table}{some}_key")
            assert re.fullmatch(pattern, name), name


class TestUpAndDown:
    def test_every_down_undoes_its_up(self, empty_database: str, directory: Path) -> None:
        """Step by step up, back by the same steps to nothing, and up again to the same."""
        steps = [ours(empty_database)]
        for name in FILES:
            shutil.copy(MIGRATIONS / name, directory)
            assert migrate.up(empty_database, quiet=True) == 0
            assert ours(empty_database) not in steps
            steps.append(ours(empty_database))
        for step in reversed(steps[:-1]):
            assert migrate.dbmate(empty_database, "rollback", quiet=True) == 0
            assert ours(empty_database) == step
        assert applied(empty_database) == []
        assert migrate.up(empty_database, quiet=True) == 0
        assert ours(empty_database) == steps[-1]

    def test_no_file_stays_half_done(self, empty_database: str, directory: Path) -> None:
        """A migration that fails at its end changes nothing, and can run again."""
        before = ours(empty_database)
        for name in FILES:
            text = (MIGRATIONS / name).read_text()
            (directory / name).write_text(
                text.replace("-- migrate:down", "SELECT 1/0;\n-- migrate:down")
            )
            assert migrate.up(empty_database, quiet=True) != 0
            assert ours(empty_database) == before
            (directory / name).write_text(text)
            assert migrate.up(empty_database, quiet=True) == 0
            before = ours(empty_database)

    def test_file_that_fails_leaves_nothing(
        self,
        fresh_database: str,
        directory: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Not even what its first statement did; it stays pending and is run when corrected."""
        before = catalog(fresh_database)
        shutil.copytree(MIGRATIONS, directory, dirs_exist_ok=True)
        file = directory / "99990101000000_fails.sql"
        text = "-- migrate:up\nCREATE TABLE half_done ();\nSELECT 1/{};\n-- migrate:down\n"
        file.write_text(text.format(0))
        assert migrate.dbmate(fresh_database, "up") != 0
        assert "SQLSTATE 22012" in capfd.readouterr().err
        assert catalog(fresh_database) == before
        assert applied(fresh_database) == VERSIONS
        assert migrate.dbmate(fresh_database, "status") == 0
        assert f"[ ] {file.name}" in capfd.readouterr().out
        file.write_text(text.format(1))
        assert migrate.up(fresh_database, quiet=True) == 0
        assert applied(fresh_database) == [*VERSIONS, "99990101000000"]
        assert set(catalog(fresh_database)) > set(before)

    def test_failure_says_what_and_where(
        self, fresh_database: str, directory: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """The file, the SQLSTATE and PostgreSQL's message, unless it may quote a row."""
        shutil.copytree(MIGRATIONS, directory, dirs_exist_ok=True)
        file = directory / "99990101000000_fails.sql"
        for statement, reason in (
            (
                "ALTER TABLE chat_sessions ADD COLUMN status text",
                'column "status" of relation "chat_sessions" already exists (SQLSTATE 42701)',
            ),
            (
                "INSERT INTO schema_migrations VALUES ('a secret'), ('a secret')",
                "duplicate key value violates unique constraint"
                ' "schema_migrations_pkey" (SQLSTATE 23505)',
            ),
            ("SELECT 'a secret'::integer", "line: 2, column: 8, SQLSTATE 22P02"),
            (
                "SELEC 1",
                'line: 2, column: 1, syntax error at or near "SELEC" (SQLSTATE 42601)',
            ),
        ):
            file.write_text(f"-- migrate:up\n{statement};\n-- migrate:down\n")
            assert migrate.up(fresh_database) != 0
            expected = f"chat-ticket-svc: migrate failed in {file.name}: {reason}\n"
            assert capfd.readouterr().err == expected


class TestRun:
    @pytest.fixture(autouse=True)
    def often(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(migrate, "POLL_SECONDS", 0.05)

    def test_settings_of_a_role_do_not_end_a_migration(
        self, empty_database: str, directory: Path
    ) -> None:
        """Neither its timeouts, nor transactions that are read-only or serializable."""
        settings = {
            "statement_timeout": "50ms",
            "lock_timeout": "50ms",
            "idle_in_transaction_session_timeout": "50ms",
            "idle_session_timeout": "50ms",
            "default_transaction_read_only": "on",
            "default_transaction_isolation": "serializable",
        }
        with psycopg.connect(empty_database, autocommit=True) as connection:
            if connection.info.server_version >= 170_000:
                settings["transaction_timeout"] = "50ms"
            for name, value in settings.items():
                connection.execute(
                    f"ALTER DATABASE {connection.info.dbname} SET {name} = '{value}'"  # type: ignore[arg-type]
                )
        (directory / "20200101000000_slow.sql").write_text(
            "-- migrate:up\nCREATE TABLE slow AS SELECT current_setting('transaction_isolation'),"
            " pg_sleep(0.2)::text;\n-- migrate:down\n"
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


class TestCollation:
    COLLATIONS = """
        SELECT DISTINCT collname::text FROM pg_attribute
          JOIN pg_class c ON c.oid = attrelid JOIN pg_collation k ON k.oid = attcollation
         WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attname = 'tenant_id'
    """

    def test_empty_tables_order_tenants_by_bytes(self, database: str) -> None:
        """Every index that starts with the tenant is in an order that no library changes."""
        assert ask(database, self.COLLATIONS) == [("C",)]

    def test_servers_that_run_keep_their_prepared_statements(self, fresh_database: str) -> None:
        """The migration leaves the tables of a server that may have prepared reads of them."""
        while ask(fresh_database, self.COLLATIONS) != [("default",)]:
            assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        with psycopg.connect(connection_string(fresh_database), autocommit=True) as connection:
            tenants = "SELECT tenant_id FROM chat_sessions"
            connection.execute(tenants, prepare=True)
            assert migrate.up(fresh_database, quiet=True) == 0
            connection.execute(tenants)

    async def test_tables_with_rows_change_when_an_operator_says_so(
        self, fresh_database: str, start_server: Callable[..., Any]
    ) -> None:
        """The migration leaves them. The servers of this version go on when they are changed."""
        while ask(fresh_database, self.COLLATIONS) != [("default",)]:
            assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        with psycopg.connect(fresh_database, autocommit=True) as connection:
            Rows(connection, "somebody").add("chat_sessions")
            assert migrate.up(fresh_database, quiet=True) == 0
            assert ask(fresh_database, self.COLLATIONS) == [("default",)]
            before = ours(fresh_database)
            api = await start_server(fresh_database, pool_size=1)
            session = await api.session()
            for change in ("C", "default", "C"):
                assert await get_session(api, session.id) == session
                connection.execute("SELECT set_tenant_collation(%s)", [change])
                assert (ours(fresh_database) == before) == (change == "default")
            assert await get_session(api, session.id) == session
            await api.message(session.id, "hello")
        assert ask(fresh_database, self.COLLATIONS) == [("C",)]


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
        with server_process(url) as process:
            assert process.popen.wait(START_SECONDS) not in (0, None)
            process.stop()
        assert not [line for line in process.log if line["event"] == "listening"]
        return " ".join(line["event"] for line in process.log)

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
