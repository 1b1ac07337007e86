"""The migrations: what they build, up and down."""

import re
import shutil
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from support.migrations import FILES, VERSIONS, applied, ask, catalog, ours, roll_back_before
from support.plain_rows import Rows

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.schema import MIGRATIONS

ID = "uuid NOT NULL DEFAULT gen_random_uuid()"
TEXT = "text NOT NULL"
KEY = "uuid NOT NULL"
TIME = "timestamp with time zone NOT NULL DEFAULT now()"
FEED = {"feed_position": "bigint NOT NULL", "feed_bucket": "bigint NOT NULL"}

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
        "user_id": "text",
        "title": "text",
        "labels": "jsonb",
        "epoch": TEXT,
        **FEED,
        "filter_position": "bigint NOT NULL",
        "filter_before": "jsonb",
    },
    "chat_session_tombstones": {
        "tenant_id": TEXT,
        "session_id": KEY,
        "deleted_at": TIME,
        **FEED,
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
        "language_code": "text",
        "search_language": "text NOT NULL DEFAULT 'english'::text",
        "state": "text",
        "author_kind": "text",
        "author_id": "text",
        "redacted": "boolean NOT NULL DEFAULT false",
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
        "updated_at": "timestamp with time zone",
    },
    "tickets": {
        "id": ID,
        "tenant_id": TEXT,
        "title": TEXT,
        "status": "text NOT NULL DEFAULT 'open'::text",
        "created_at": TIME,
        "updated_at": TIME,
        "external_ref": "text",
        "revision": "bigint NOT NULL DEFAULT 0",
        **FEED,
    },
    "ticket_tombstones": {
        "tenant_id": TEXT,
        "ticket_id": KEY,
        "deleted_at": TIME,
        **FEED,
    },
    "chat_tickets": {
        "id": ID,
        "tenant_id": TEXT,
        "session_id": KEY,
        "ticket_id": KEY,
        "created_at": TIME,
    },
    "chat_drafts": {
        "id": KEY,
        "tenant_id": TEXT,
        "session_id": KEY,
        "fencing_token": "bigint NOT NULL DEFAULT 1",
        "length": "bigint NOT NULL DEFAULT 0",
        "expires_at": "timestamp with time zone NOT NULL",
        "created_at": TIME,
        "role": TEXT,
        "language_code": "text",
        "metadata": "jsonb",
        "author_kind": "text",
        "author_id": "text",
    },
    "chat_draft_pieces": {
        "tenant_id": TEXT,
        "draft_id": KEY,
        "start_offset": "bigint NOT NULL",
        "content": TEXT,
    },
    "tenant_settings": {
        "tenant_id": TEXT,
        "search_language": "text",
        "updated_at": TIME,
    },
    # Of the whole database.
    "chat_epochs": {
        "ordinal": "bigint NOT NULL",
        "id": "text NOT NULL DEFAULT"
        """ "left"(replace((gen_random_uuid())::text, '-'::text, ''::text), 16)""",
        "identity": TEXT,
        "table_oid": "oid NOT NULL",
        "branch_lsn": "pg_lsn",
        "swept_position": "bigint NOT NULL DEFAULT 0",
        "started_at": "timestamp with time zone NOT NULL DEFAULT clock_timestamp()",
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
# Those that do not start with the column of the tenant.
OTHER_INDEXES = {
    "idx_chat_sessions_labels",  # of pairs that each begin with the tenant
    "idx_chat_session_tombstones_deleted",  # for the sweep, which is of all tenants
    "idx_ticket_tombstones_deleted",  # likewise
    "chat_epochs_pkey",  # of the whole database
}
SEED_CASCADES = {
    "fk_chat_messages_session",
    "fk_chat_attachments_message",
    "fk_chat_tickets_session",
}


OLD_TABLES = set(COLUMNS) - {"chat_session_tombstones", "ticket_tombstones", "chat_epochs"}


def rows_of(connection: psycopg.Connection[Any], table: str) -> list[dict[str, Any]]:
    statement = sql.SQL("SELECT to_jsonb(t) FROM {} t ORDER BY t::text").format(
        sql.Identifier(table)
    )
    return [row for (row,) in connection.execute(statement)]


class TestShape:
    def test_tables_and_columns(self, database: str) -> None:
        """There are the seeds' columns, with their types and defaults."""
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
        keys["chat_session_tombstones"] = "PRIMARY KEY (tenant_id, session_id)"
        keys["chat_draft_pieces"] = "PRIMARY KEY (tenant_id, draft_id, start_offset)"
        keys["ticket_tombstones"] = "PRIMARY KEY (tenant_id, ticket_id)"
        keys["tenant_settings"] = "PRIMARY KEY (tenant_id)"
        keys["chat_epochs"] = "PRIMARY KEY (ordinal)"  # it has nothing of a tenant
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
        assert names["c"] == {
            *SEED_CASCADES,
            "fk_chat_message_tombstones_session",
            "fk_chat_drafts_session",
            "fk_chat_draft_pieces_draft",
        }
        assert names["a"] == {"fk_chat_tickets_ticket"}

    def test_indexes(self, database: str) -> None:
        """The seeds' names are there, and each index starts with the tenant, but for a few."""
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
        assert {name for name, column in found if column != "tenant_id"} == OTHER_INDEXES
        pairs = 'SELECT label_pairs(\'somebody\', \'{"a": "b=c", "d": ""}\')'
        assert ask(database, pairs) == [(["somebody\x01a=b=c", "somebody\x01d="],)]

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
                "f": f"fk_{table}_(session|message|ticket|draft)",
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

    def test_rows_of_the_version_before_stay_as_they_are(self, fresh_database: str) -> None:
        """A new column is NULL or its default in them, and the new rules hold for what changes."""
        roll_back_before(fresh_database, "20261130130000")
        with psycopg.connect(fresh_database, autocommit=True) as connection:
            us = Rows(connection, "us")
            linked = us.add("chat_sessions", revision=7)
            us.add("chat_tickets", session_id=linked)
            message = us.add("chat_messages", session_id=linked)
            us.add("chat_attachments", message_id=message)
            us.add("chat_draft_pieces")
            before = {table: rows_of(connection, table) for table in OLD_TABLES}
            files = "SELECT relname, relfilenode FROM pg_class WHERE relname = ANY (%s)"
            files_before = set(connection.execute(files, [list(OLD_TABLES)]))
            assert migrate.up(fresh_database, quiet=True) == 0
            assert set(connection.execute(files, [list(OLD_TABLES)])) == files_before, "rewritten"
            [(epoch,)] = connection.execute("SELECT id FROM chat_epochs")
            # As changed at the beginning of the first epoch.
            feed = {"feed_position": 1 << 48, "feed_bucket": 1 << 32}
            new: dict[str, dict[str, Any]] = {
                "chat_sessions": {
                    "user_id": None,
                    "title": None,
                    "labels": None,
                    "epoch": f"0.{epoch}",
                    **feed,
                    "filter_position": 1 << 48,
                    "filter_before": None,
                },
                "chat_messages": {"author_kind": None, "author_id": None, "redacted": False},
                "chat_attachments": {"updated_at": None},
                "tickets": {"external_ref": None, "revision": 0, **feed},
                "chat_drafts": {"author_kind": None, "author_id": None},
            }
            for table, rows in before.items():
                expected = [row | new.get(table, {}) for row in rows]
                assert rows_of(connection, table) == expected, table
            connection.execute("UPDATE tickets SET status = 'closed'")
            assert us.session(linked) == ("active", True, 9)
            us.set("chat_sessions", linked, title="Invoice")
            us.delete("chat_sessions", linked)
            assert us.count("chat_session_tombstones") == 1
        for version in ("20261130130000", "20261121000100"):
            roll_back_before(fresh_database, version)
        assert migrate.up(fresh_database, quiet=True) == 0

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
