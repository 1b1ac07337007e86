"""Dumps and logical replication end in rows that are identical to the originals."""

import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import CheckViolation, InvalidParameterValue, UniqueViolation
from psycopg.types.json import Jsonb
from support.cluster import Cluster
from support.database import execute
from support.plain_rows import PARENTS, Rows, rejected_by

TABLES = (*PARENTS, "tenant_settings")

# What an insert sets anew, as the feed of the restored database tells what was restored.
POSITIONS = ["feed_position", "feed_bucket", "filter_position", "filter_before"]

# pg_dump's order is by name, but for foreign keys.
DATA = ("--data-only", "--exclude-table=schema_migrations", "--exclude-table=chat_epochs")


BY_LABEL: LiteralString = """
SELECT count(*) FROM chat_sessions
 WHERE label_pairs(tenant_id COLLATE "C", labels) @> ARRAY['us' || chr(1) || 'team=é']
   AND labels IS NOT NULL
"""


def fill(url: str) -> None:
    """Rows in every table, with sessions whose links were made in every state."""
    with psycopg.connect(url, autocommit=True) as connection:
        rows = Rows(connection, "us")
        person = {"user_id": "u-1", "title": "Invoice", "labels": Jsonb({"team": "é", "b": ""})}
        for status in ("active", "resolved", "archived"):
            linked = rows.add("chat_sessions", revision=7, updated_at="2999-01-01Z", **person)
            rows.add("chat_tickets", session_id=linked)
            rows.set("chat_sessions", linked, status=status)
        unlinked = rows.add("chat_sessions")
        rows.delete("chat_tickets", rows.add("chat_tickets", session_id=unlinked))
        rows.delete("chat_sessions", rows.add("chat_sessions"))
        rows.add("tickets", external_ref=str(uuid.uuid4()), revision=7)
        rows.delete("tickets", rows.add("tickets"))
        author = {"author_kind": "human_agent", "author_id": "a-1"}
        message = rows.add("chat_messages", session_id=linked, **author)
        rows.add("chat_attachments", message_id=message, updated_at="2999-01-01Z")
        rows.add("chat_messages", session_id=linked, redacted=True, content="[redacted]")
        rows.add("chat_message_tombstones", session_id=linked)
        of_their_own = {"language_code": "de-AT", "search_language": "german"}
        rows.add("chat_messages", session_id=linked, state="stopped", **of_their_own)
        draft = rows.add("chat_drafts", session_id=linked, fencing_token=2, length=10, **author)
        for start_offset in (0, 5):
            rows.add("chat_draft_pieces", draft_id=draft, start_offset=start_offset)
        connection.execute(
            "INSERT INTO tenant_settings (tenant_id, search_language) VALUES ('us', 'french')"
            " ON CONFLICT (tenant_id) DO UPDATE SET search_language = 'italian'"
        )


def content(url: str, *without: str) -> dict[str, list[Any]]:
    """All rows of all tables, without some of their columns."""
    statement = sql.SQL("SELECT to_jsonb(t) - %s::text[] FROM {} t ORDER BY t::text")
    with psycopg.connect(url) as connection:
        return {
            table: [
                row
                for (row,) in connection.execute(
                    statement.format(sql.Identifier(table)), [list(without)]
                )
            ]
            for table in TABLES
        }


@pytest.fixture
def cluster_of(of: Callable[[str], Cluster]) -> Cluster:
    return of("cluster")


@pytest.fixture
def create(cluster_of: Cluster) -> Iterator[Callable[..., str]]:
    """`create()` clones a migrated database, and `create("template0")` an empty one."""
    urls = []

    def create(*template: str) -> str:
        urls.append(cluster_of.create(*template))
        return urls[-1]

    yield create
    for url in urls:
        cluster_of.drop(url)


@pytest.fixture
def run(of: Callable[[str], Any]) -> Callable[..., None]:
    """Run a program of the same version as the server."""
    directory = of("binaries")

    def run(program: str, *arguments: str | Path) -> None:
        done = subprocess.run(
            [directory / program, *arguments], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    return run


def test_dumps_are_restored_exactly(
    create: Callable[..., str], run: Callable[..., None], tmp_path: Path
) -> None:
    """Whole, of the data only, as inserts, and table by table.

    The next change of a session is of a new epoch. Its earlier revisions stay true.
    """
    source = create()
    execute(source, *["SELECT begin_chat_epoch()"] * 5)
    fill(source)
    expected = content(source)
    assert [len(rows) for rows in expected.values()] == [4, 1, 1, 3, 1, 1, 5, 3, 1, 2, 1]
    session = next(row for row in expected["chat_sessions"] if row["revision"] == 8)
    whole, data, inserts, archive = (
        tmp_path / name for name in ("whole", "data.sql", "inserts.sql", "archive")
    )
    run("pg_dump", "-Fc", "-f", whole, source)
    run("pg_dump", *DATA, "-f", data, source)
    run("pg_dump", *DATA, "--inserts", "-f", inserts, source)
    run("pg_dump", *DATA, "-Fc", "-f", archive, source)

    def psql(target: str, script: Path) -> None:
        run("psql", "-q", "-X", "-v", "ON_ERROR_STOP=1", "-o", "/dev/null", "-f", script, target)

    def restore(target: str, *arguments: str | Path) -> None:
        run("pg_restore", "--exit-on-error", "-d", target, *arguments)

    def table_by_table(target: str) -> None:
        # A table comes after those that it refers to.
        for table in TABLES:
            restore(target, "--data-only", "-t", table, whole)

    for template, new, restored in (
        (["template0"], [], lambda target: restore(target, whole)),
        ([], POSITIONS, lambda target: psql(target, data)),
        ([], POSITIONS, lambda target: psql(target, inserts)),
        ([], POSITIONS, lambda target: restore(target, "--data-only", archive)),
        ([], [], lambda target: restore(target, "--data-only", "--disable-triggers", archive)),
        ([], POSITIONS, table_by_table),
    ):
        target = create(*template)
        restored(target)
        assert content(target, *new) == content(source, *new)
        with psycopg.connect(target, autocommit=True) as connection:
            us = Rows(connection, "us")
            assert us.wrong_flags() == []
            if not template:
                connection.execute("SELECT begin_chat_epoch()")
            [(last,)] = connection.execute("SELECT max(feed_position) FROM chat_sessions")
            us.set("chat_sessions", uuid.UUID(session["id"]), revision=9)
            assert connection.execute(
                """
                SELECT feed_position > %s, s.epoch = %s || '-9.' || e.id
                  FROM chat_sessions s, chat_epochs e
                 WHERE revision = 9 ORDER BY e.ordinal DESC LIMIT 1
                """,
                [last, session["epoch"]],
            ).fetchall() == [(True, True)]
            with rejected_by(CheckViolation, "chat_sessions_has_ticket_check"):
                us.add("chat_sessions", has_ticket=True)
            [[draft]] = connection.execute("SELECT id FROM chat_drafts").fetchall()
            with rejected_by(UniqueViolation, "chat_messages_pkey"):
                us.add("chat_messages", id=draft)
            [[deleted]] = connection.execute(
                "SELECT session_id FROM chat_session_tombstones"
            ).fetchall()
            with rejected_by(UniqueViolation, "chat_session_tombstones_pkey"):
                us.add("chat_sessions", id=deleted)
            [[redacted]] = connection.execute(
                "SELECT id FROM chat_messages WHERE redacted"
            ).fetchall()
            with rejected_by(InvalidParameterValue, "chat_attachments_redacted_check"):
                us.add("chat_attachments", message_id=redacted)
            connection.execute("SET enable_seqscan = off")
            assert connection.execute(BY_LABEL).fetchone() == (3,)
            assert "idx_chat_sessions_labels" in str(
                connection.execute("EXPLAIN " + BY_LABEL).fetchall()
            )


def test_restore_in_place_begins_an_epoch(
    create: Callable[..., str], run: Callable[..., None], tmp_path: Path
) -> None:
    """The database is the same, but its tables are others. What came after the dump is lost."""
    source = create()
    fill(source)
    run("pg_dump", "-Fc", "-f", tmp_path / "whole", source)
    last = "SELECT id, ordinal, branch_lsn FROM chat_epochs ORDER BY ordinal DESC LIMIT 1"
    with psycopg.connect(source, autocommit=True) as connection:
        us = Rows(connection, "us")
        session = us.add("chat_sessions")
        us.set("chat_sessions", session, revision=1)
        [(before, ordinal, _)] = connection.execute(last).fetchall()
    run("pg_restore", "--exit-on-error", "--clean", "--if-exists", "-d", source, tmp_path / "whole")
    with psycopg.connect(source, autocommit=True) as connection:
        us = Rows(connection, "us")
        us.add("chat_sessions", id=session)
        us.set("chat_sessions", session, revision=1)
        [(after, next_ordinal, branch)] = connection.execute(last).fetchall()
        assert (next_ordinal, branch) == (ordinal + 1, None)
        assert after != before
        found = connection.execute("SELECT epoch FROM chat_sessions WHERE id = %s", [session])
        assert found.fetchall() == [(f"0.{after}",)]


def test_lost_links_are_restored_alone(
    create: Callable[..., str], run: Callable[..., None], tmp_path: Path
) -> None:
    """Each is a change to its session, as the session no longer has it."""
    source = create()
    fill(source)
    expected = content(source)
    run("pg_dump", *DATA, "-t", "chat_tickets", "-Fc", "-f", tmp_path / "links", source)
    with psycopg.connect(source, autocommit=True) as connection:
        us = Rows(connection, "us")
        connection.execute("UPDATE chat_sessions SET status = 'active'")
        connection.execute("DELETE FROM chat_tickets")
        run("pg_restore", "-d", source, "--data-only", tmp_path / "links")
        assert us.wrong_flags() == []
        assert content(source)["chat_tickets"] == expected["chat_tickets"]
        revisions = "SELECT revision FROM chat_sessions ORDER BY revision"
        assert connection.execute(revisions).fetchall() == [(2,), (10,), (10,), (10,)]


@pytest.mark.parametrize("setting", ["search_path = ''", "check_function_bodies = off"])
def test_half_a_restore_is_none(us: Rows, setting: str) -> None:
    """A session with one of the settings of a restore is held to the rules."""
    us.connection.execute(f"SET {setting}")  # type: ignore[arg-type]
    with rejected_by(CheckViolation, "chat_sessions_has_ticket_check"):
        us.connection.execute(
            "INSERT INTO public.chat_sessions (tenant_id, has_ticket) VALUES ('t', true)"
        )


def test_logical_replication_is_exact(system_cluster: Cluster) -> None:
    """Rows that were there and those that change later; triggers do not fire on the subscriber."""
    source, target = system_cluster.create(), system_cluster.create()
    parts = urlsplit(source)
    [host] = parse_qs(parts.query)["host"]
    name = f"s{uuid.uuid4().hex}"
    fill(source)
    # The target takes over the epochs of the source too.
    execute(target, "DELETE FROM chat_epochs")
    with (
        psycopg.connect(source, autocommit=True) as publisher,
        psycopg.connect(target, autocommit=True) as subscriber,
    ):
        tables = ", ".join((*TABLES, "chat_epochs"))
        publisher.execute(f"CREATE PUBLICATION p FOR TABLE {tables}")  # type: ignore[arg-type]
        # Within one server, CREATE SUBSCRIPTION would wait for itself to create the slot.
        publisher.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [name])
        subscriber.execute(
            f"CREATE SUBSCRIPTION {name} CONNECTION"  # type: ignore[arg-type]
            f" 'host={host} port=5432 user=postgres dbname={parts.path[1:]}'"
            " PUBLICATION p WITH (create_slot = false)"
        )
        try:
            deadline = time.monotonic() + 30
            while content(target) != content(source):
                assert time.monotonic() < deadline, "the copy did not end"
                time.sleep(0.05)
            fill(source)
            publisher.execute(
                "DELETE FROM chat_tickets WHERE session_id IN"
                " (SELECT id FROM chat_sessions WHERE status = 'active')"
            )
            publisher.execute("DELETE FROM chat_messages")
            while content(target) != content(source):
                assert time.monotonic() < deadline, "the changes did not arrive"
                time.sleep(0.05)
            assert Rows(subscriber, "us").wrong_flags() == []
            # The epoch of the target, when it is the one that is written to.
            [(last,)] = subscriber.execute("SELECT max(feed_position) FROM chat_sessions")
            subscriber.execute("UPDATE chat_sessions SET revision = revision + 1")
            [(first,)] = subscriber.execute("SELECT min(feed_position) FROM chat_sessions")
            assert first >> 48 == (last >> 48) + 1
        finally:
            subscriber.execute(f"DROP SUBSCRIPTION {name}")  # type: ignore[arg-type]
