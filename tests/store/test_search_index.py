"""The search index of a database that has messages: how it gets there while servers run."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString
from urllib.parse import urlsplit

import psycopg
import pytest
from support.cluster import Cluster
from support.database import execute
from support.migrations import ask
from support.plain_rows import Rows
from support.process import command

from chat_ticket.v1.chat_message_pb2 import SearchChatMessagesRequest
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnavailableError
from chat_ticket_svc.store import search_index
from chat_ticket_svc.store.connection import connection_string

OLD = "to_tsvector('english'::regconfig, content)"
NEW = "search_vector(content, search_language)"
COUNT = 1000

# The condition of the search of the version before, and of this version.
SEARCHES: dict[str, LiteralString] = {
    OLD: "to_tsvector('english', content) @@ websearch_to_tsquery('english', 'refunded')",
    NEW: "search_vector(content, search_language)"
    " @@ websearch_to_tsquery('pg_catalog.english', 'refunded')",
}


def fill(url: str) -> None:
    """Messages of one tenant, of which each tenth has a word."""
    with psycopg.connect(url, autocommit=True) as connection:
        session = Rows(connection, "acme").add("chat_sessions", revision=COUNT)
        connection.execute(
            "INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role,"
            " content) SELECT 'acme', gen_random_uuid(), %s, n, n, 'user',"
            " CASE n %% 10 WHEN 0 THEN 'My refund ' ELSE 'Thanks ' END || n"
            " FROM generate_series(1, %s) n",
            [session, COUNT],
        )
        connection.execute("ANALYZE chat_messages")


def as_role(url: str, role: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{role}@{parts.netloc.rpartition('@')[2]}").geturl()


def used(url: str, expression: str) -> set[str]:
    """The indexes that a search by this expression uses, if the planner may read no table whole."""
    statement = (
        f"EXPLAIN SELECT FROM chat_messages WHERE tenant_id = 'acme' AND {SEARCHES[expression]}"
    )
    with psycopg.connect(url) as connection:
        connection.execute("SET enable_seqscan = off; SET enable_indexscan = off")
        plan = "\n".join(line for (line,) in connection.execute(statement).fetchall())  # type: ignore[arg-type]
    return set(re.findall(r"Bitmap Index Scan on (\w+)", plan))


def is_migrated(url: str) -> bool:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT to_regproc('search_vector') IS NOT NULL").fetchone()[0]


def roll_back(url: str) -> None:
    """To the schema of the version before."""
    while is_migrated(url):
        assert migrate.dbmate(url, "rollback", quiet=True) == 0


@pytest.fixture
def old_database(fresh_database: str) -> str:
    """A database of the version before, with messages."""
    roll_back(fresh_database)
    fill(fresh_database)
    return fresh_database


@pytest.fixture
def unbuilt(old_database: str) -> str:
    """A database with messages whose migrations are applied, as a killed `migrate` leaves it."""
    assert migrate.dbmate(old_database, "migrate", quiet=True) == 0
    return old_database


def indexes(url: str) -> dict[str, tuple[str, bool]]:
    """The expression of each search index, and whether it is valid."""
    statement = """
        SELECT relname, pg_get_indexdef(indexrelid, 2, true), indisvalid
          FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
         WHERE relname LIKE 'idx_chat_messages_content%'
    """
    with psycopg.connect(url) as connection:
        return {name: rest for name, *rest in connection.execute(statement).fetchall()}


BEFORE = {"idx_chat_messages_content": [OLD, True]}
BUILT = {"idx_chat_messages_content": [NEW, True], "idx_chat_messages_content_old": [OLD, True]}


@contextlib.contextmanager
def writing(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has written a message. A concurrent build waits for it."""
    with psycopg.connect(url, application_name="slow writer") as connection:
        connection.execute("UPDATE chat_messages SET metadata = '{}'")
        yield connection


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def waiting(url: str) -> list[int]:
    """The processes of PostgreSQL that build or drop an index and wait for a transaction."""
    statement = """
        SELECT pid FROM pg_stat_activity
         WHERE datname = current_database() AND application_name ~ '^chat-ticket-svc migrate .'
           AND wait_event = 'virtualxid'
    """
    with psycopg.connect(url) as connection:
        return [pid for (pid,) in connection.execute(statement).fetchall()]


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that look around more often."""
    monkeypatch.setattr(migrate, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(search_index, "TURN_POLL_SECONDS", 0.05)


class TestBuild:
    def test_both_versions_search_by_their_index(
        self, of: Callable[[str], Cluster], capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Before the build, after it, and after the way down."""
        old_database = of("cluster").create()
        roll_back(old_database)
        fill(old_database)
        assert indexes(old_database) == BEFORE
        assert migrate.dbmate(old_database, "migrate", quiet=True) == 0
        assert indexes(old_database) == BEFORE
        assert used(old_database, OLD) == {"idx_chat_messages_content"}
        assert migrate.up(old_database) == 0
        printed = capfd.readouterr()
        assert re.fullmatch(
            r"Building: idx_chat_messages_content\nBuilt: idx_chat_messages_content in .*s\n",
            printed.out,
        )
        assert printed.err == ""
        assert indexes(old_database) == BUILT
        assert used(old_database, OLD) == {"idx_chat_messages_content_old"}
        assert used(old_database, NEW) == {"idx_chat_messages_content"}
        with psycopg.connect(old_database) as connection:
            for condition in SEARCHES.values():
                statement = f"SELECT FROM chat_messages WHERE tenant_id = 'acme' AND {condition}"
                assert connection.execute(statement).rowcount == COUNT // 10  # type: ignore[arg-type]
            statistics = "SELECT FROM pg_stats WHERE tablename = 'idx_chat_messages_content'"
            assert connection.execute(statistics).rowcount > 0
        assert migrate.up(old_database) == 0
        assert capfd.readouterr().out == ""
        assert indexes(old_database) == BUILT
        roll_back(old_database)
        assert indexes(old_database) == BEFORE
        of("cluster").drop(old_database)

    def test_way_down_leaves_a_valid_index(self, unbuilt: str) -> None:
        """Whatever a killed run has left."""
        for statement, left in (
            ("SELECT", BEFORE),
            (
                "UPDATE pg_index SET indisvalid = false WHERE indexrelid ="
                " 'idx_chat_messages_content_old'::regclass",
                BUILT,
            ),
            ("DROP INDEX idx_chat_messages_content_old", BUILT),
            ("DROP INDEX idx_chat_messages_content", BUILT),
        ):
            if left == BUILT:
                assert migrate.up(unbuilt, quiet=True) == 0
            assert indexes(unbuilt) == left
            execute(unbuilt, statement)
            roll_back(unbuilt)
            assert indexes(unbuilt) == BEFORE
            assert migrate.dbmate(unbuilt, "migrate", quiet=True) == 0

    def test_way_down_leaves_the_indexes_of_other_schemas(self, unbuilt: str) -> None:
        """Of those that come later in the search_path."""
        names = [search_index.INDEX, search_index.NEW_INDEX, search_index.OLD_INDEX]
        execute(
            unbuilt,
            "CREATE SCHEMA other",
            "CREATE TABLE other.chat_messages (id uuid)",
            *(f"CREATE INDEX {name} ON other.chat_messages (id)" for name in names),
        )
        url = f"{unbuilt}&options=-csearch_path%3Dpublic,other"
        assert migrate.dbmate(url, "rollback", quiet=True) == 0
        there = "SELECT FROM pg_indexes WHERE schemaname = 'other'"
        with psycopg.connect(unbuilt) as connection:
            assert connection.execute(there).rowcount == len(names)

    def test_two_indexes_of_the_version_before_become_one(self, unbuilt: str) -> None:
        """The valid one stays."""
        again = "CREATE INDEX idx_chat_messages_content_old ON chat_messages USING gin (tenant_id,"
        again += " to_tsvector('english', content)) WITH (gin_pending_list_limit = 512)"
        invalid = "UPDATE pg_index SET indisvalid = false WHERE indexrelid ="
        invalid += " 'idx_chat_messages_content_old'::regclass"
        for statement in ("SELECT", invalid):
            execute(unbuilt, again, statement)
            assert migrate.up(unbuilt, quiet=True) == 0
            assert indexes(unbuilt) == BUILT
            roll_back(unbuilt)
            assert migrate.dbmate(unbuilt, "migrate", quiet=True) == 0

    async def test_index_of_another_major_version_is_built_anew_by_reindex(
        self, unbuilt: str
    ) -> None:
        """As after pg_upgrade: its words have the stems of the version before.

        What was not used before, or is not used any more, is dropped.
        """
        statement = """
            SELECT 'idx_chat_messages_content'::regclass::oid,
                   obj_description('idx_chat_messages_content'::regclass)
              FROM pg_index WHERE indexrelid = 'idx_chat_messages_content'::regclass
        """
        assert migrate.up(unbuilt, quiet=True) == 0
        [(first, built_by)] = ask(unbuilt, statement)
        assert re.fullmatch(r"built by PostgreSQL \d\d", built_by)
        execute(
            unbuilt,
            "COMMENT ON INDEX idx_chat_messages_content IS 'built by PostgreSQL 14'",
            "CREATE INDEX idx_chat_messages_content_stale ON chat_messages (tenant_id)",
            search_index.BUILD,  # by a run that was killed, perhaps before pg_upgrade
        )
        [(left,)] = ask(unbuilt, "SELECT 'idx_chat_messages_content_new'::regclass::oid")
        assert migrate.up(unbuilt, quiet=True) == 0
        assert ask(unbuilt, statement)[0][0] == first, "only reindex does so"
        execute(unbuilt, "DELETE FROM chat_messages WHERE sequence > 20")
        done = await command("reindex", DATABASE_URL=unbuilt)
        printed = (
            r"Building: idx_chat_messages_content\nBuilt: idx_chat_messages_content in .*s\n"
            r"changed the search language of 0 of 20 messages\n"
            r"Dropped: idx_chat_messages_content_old\n"
        )
        assert (done.status, done.errors) == (0, "")
        assert re.fullmatch(printed, done.output)
        [(second, now_built_by)] = ask(unbuilt, statement)
        assert second not in (first, left)
        assert now_built_by == built_by
        assert indexes(unbuilt) == {"idx_chat_messages_content": [NEW, True]}
        # A complete one of a killed run, beside that of another.
        execute(unbuilt, search_index.BUILD)
        done = await command("reindex", DATABASE_URL=unbuilt)
        assert done.output.endswith("\nDropped: idx_chat_messages_content_new\n")
        assert indexes(unbuilt) == {"idx_chat_messages_content": [NEW, True]}

    def test_settings_have_the_grants_of_sessions(self, fresh_database: str) -> None:
        """So that a role which does not own the tables can serve after the migration."""
        roll_back(fresh_database)
        one, two = (f"Role {uuid.uuid4().hex}" for _ in range(2))
        rights = "SELECT, INSERT, UPDATE, DELETE"
        execute(
            fresh_database,
            f'CREATE ROLE "{one}"',
            f'CREATE ROLE "{two}"',
            f'GRANT {rights} ON ALL TABLES IN SCHEMA public TO "{one}"',
            f'GRANT SELECT ON chat_sessions TO "{two}" WITH GRANT OPTION',
            "GRANT SELECT ON chat_sessions TO PUBLIC",
        )
        acl = "SELECT unnest(relacl)::text FROM pg_class WHERE relname = '{}' ORDER BY 1"
        try:
            assert migrate.up(fresh_database, quiet=True) == 0
            granted = ask(fresh_database, acl.format("tenant_settings"))
            assert granted == ask(fresh_database, acl.format("chat_sessions"))
            assert len(granted) == 4  # with the owner
        finally:
            execute(
                fresh_database,
                *(f'DROP OWNED BY "{role}"' for role in (one, two)),
                *(f'DROP ROLE "{role}"' for role in (one, two)),
            )

    @pytest.mark.usefixtures("often")
    def test_runs_at_once_go_one_after_the_other(
        self, old_database: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """All end well, while a writer keeps the first waiting. Each says whom it waits for.

        One of them builds it.
        """
        with ThreadPoolExecutor(3) as pool, writing(old_database) as writer:
            # The migration itself would wait for it, and give up.
            writer.rollback()
            assert migrate.dbmate(old_database, "migrate", quiet=True) == 0
            writer.execute("UPDATE chat_messages SET metadata = '{}'")
            runs = [pool.submit(migrate.up, old_database) for _ in range(3)]
            written = ""

            def has_said() -> bool:
                nonlocal written
                written += "".join(capfd.readouterr())
                return "another run" in written and "slow writer" in written

            wait_until(has_said, "nothing was said")
            [building] = waiting(old_database)
            pid = writer.info.backend_pid
            writer.rollback()
            assert [run.result() for run in runs] == [0, 0, 0]
        assert indexes(old_database) == BUILT
        written += capfd.readouterr().out
        assert written.count("Building: ") == written.count("Built: ") == 1
        lock = f"waits for a lock of process {pid}, slow writer, postgres, idle in transaction"
        assert f"chat-ticket-svc: {lock}\n" in written
        run = f"waits for another run, of process {building}, chat-ticket-svc migrate"
        assert f"chat-ticket-svc: {run}" in written

    def test_runs_at_once_that_migrate_too(self, old_database: str) -> None:
        """One of them waits in dbmate's lock, with a snapshot, while another goes on."""
        with ThreadPoolExecutor(3) as pool:
            runs = [pool.submit(migrate.up, old_database, quiet=True) for _ in range(3)]
            assert [run.result() for run in runs] == [0, 0, 0]
        assert indexes(old_database) == BUILT

    def test_killed_and_interrupted_runs_are_resumed(self, unbuilt: str) -> None:
        """What they leave is dropped, or used if it is complete."""
        for number, status in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
            with (
                writing(unbuilt),
                subprocess.Popen(
                    [sys.executable, "-m", "chat_ticket_svc", "migrate"],
                    env={**os.environ, "DATABASE_URL": unbuilt},
                    stderr=subprocess.PIPE,
                    text=True,
                ) as process,
            ):
                try:
                    wait_until(lambda: waiting(unbuilt), "it does not build")
                finally:
                    process.send_signal(number)
                    _, errors = process.communicate(timeout=20)
                assert (process.returncode, errors) == (status, "")
                if number == signal.SIGINT:
                    wait_until(lambda: not waiting(unbuilt), "it builds on")
                    assert indexes(unbuilt)["idx_chat_messages_content_new"] == [NEW, False]
        assert migrate.up(unbuilt, quiet=True) == 0
        assert indexes(unbuilt) == BUILT

    def test_complete_index_of_a_killed_run_is_used(self, unbuilt: str) -> None:
        identity = "SELECT '{}'::regclass::oid"
        execute(unbuilt, search_index.BUILD)
        with psycopg.connect(unbuilt) as connection:
            before = connection.execute(identity.format(search_index.NEW_INDEX)).fetchone()
            assert migrate.up(unbuilt, quiet=True) == 0
            assert connection.execute(identity.format(search_index.INDEX)).fetchone() == before

    def test_index_that_is_lost_is_built_again(self, unbuilt: str) -> None:
        """It was dropped, or the drop was interrupted, which leaves it invalid."""
        assert migrate.up(unbuilt, quiet=True) == 0
        for statement in (
            "DROP INDEX idx_chat_messages_content",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid ="
            " 'idx_chat_messages_content'::regclass",
        ):
            execute(unbuilt, statement)
            assert indexes(unbuilt) != BUILT
            assert migrate.up(unbuilt, quiet=True) == 0
            assert indexes(unbuilt) == BUILT

    def test_lost_connection_is_one_line(self, unbuilt: str) -> None:
        with ThreadPoolExecutor(1) as pool, writing(unbuilt) as writer:
            run = pool.submit(migrate.up, unbuilt, quiet=True)
            wait_until(lambda: waiting(unbuilt), "it does not build")
            [pid] = waiting(unbuilt)
            writer.execute("SELECT pg_terminate_backend(%s)", [pid])
            with pytest.raises(UnavailableError) as caught:
                run.result()
        cause = "the server closed the connection"
        assert str(caught.value) == f"the database cannot be reached: {cause}"

    def test_refusal_names_the_reason(self, unbuilt: str) -> None:
        """A role that does not own the table cannot build its index."""
        execute(unbuilt, "ALTER TABLE chat_messages OWNER TO pg_monitor")
        role = f"role_{uuid.uuid4().hex}"
        execute(unbuilt, f"CREATE ROLE {role} LOGIN")
        try:
            with pytest.raises(ConfigurationError) as caught:
                migrate.build_search_index(as_role(unbuilt, role), quiet=True)
        finally:
            execute(unbuilt, f"DROP ROLE {role}")
        expected = "must be owner of table chat_messages (SQLSTATE 42501)"
        assert str(caught.value) == f"the search index is not complete: {expected}"

    @pytest.mark.usefixtures("often")
    def test_settings_of_a_database_do_not_end_it(self, unbuilt: str) -> None:
        """Neither its timeouts, nor transactions that are read-only or serializable."""
        with writing(unbuilt) as writer:
            settings = {
                "statement_timeout": "50ms",
                "lock_timeout": "50ms",
                "idle_in_transaction_session_timeout": "50ms",
                "idle_session_timeout": "50ms",
                "default_transaction_read_only": "on",
                "default_transaction_isolation": "serializable",
            }
            if writer.info.server_version >= 170_000:
                settings["transaction_timeout"] = "50ms"
            execute(
                unbuilt,
                *(
                    f"ALTER DATABASE {writer.info.dbname} SET {name} = '{value}'"
                    for name, value in settings.items()
                ),
            )
            with ThreadPoolExecutor(1) as pool:
                run = pool.submit(migrate.build_search_index, unbuilt)
                wait_until(lambda: waiting(connection_string(unbuilt)), "it does not build")
                time.sleep(0.2)
                writer.rollback()
                run.result()
        assert indexes(connection_string(unbuilt)) == BUILT

    def test_role_owns_only_its_schema(self, cluster: Cluster) -> None:
        """Which the URL names as dbmate's driver knows it, and libpq does not."""
        url = cluster.create("template0")
        role = f"role_{uuid.uuid4().hex}"
        execute(
            url,
            f"CREATE ROLE {role} LOGIN",
            "CREATE EXTENSION btree_gin",
            f"CREATE SCHEMA chat AUTHORIZATION {role}",
            # Of somebody else: nothing to build, and nothing to look at.
            "CREATE TABLE chat_messages (search_language text)",
        )
        own = f"{as_role(url, role)}&search_path=chat"
        in_schema = f"{as_role(url, role)}&options=-csearch_path%3Dchat"
        try:
            assert migrate.up(own, quiet=True) == 0
            roll_back_url = in_schema
            while is_migrated(roll_back_url):
                assert migrate.dbmate(own, "rollback", quiet=True) == 0
            fill(in_schema)
            assert migrate.up(own, quiet=True) == 0
            assert indexes(in_schema) == BUILT
        finally:
            cluster.drop(url)
            cluster.execute(f"DROP ROLE {role}")


class TestServer:
    async def test_works_without_the_index_and_says_so(
        self, unbuilt: str, start_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """As between the migration and the end of a build that is repeated after a kill."""
        api = await start_server(unbuilt)
        said = "the search index is missing, searches are slow: run chat-ticket-svc migrate"
        assert said in capsys.readouterr().out
        session = await api.session()
        message = await api.message(session.id, "My money/refund?")
        request = SearchChatMessagesRequest(query="refunds", session_id=session.id)
        found = await api.messages.SearchChatMessages(request)
        assert [hit.message_id for hit in found.hits] == [message.id]
        assert migrate.up(unbuilt, quiet=True) == 0
        await start_server(unbuilt)
        assert said not in capsys.readouterr().out
