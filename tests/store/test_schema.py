"""The schema by itself: its rules hold against plain SQL that goes round the service.

On the PostgreSQL of the run and, where the system has one, on the oldest that is supported.
"""

import contextlib
import itertools
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, LiteralString

import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from psycopg import sql
from psycopg.errors import (
    CheckViolation,
    ForeignKeyViolation,
    NotNullViolation,
    RestrictViolation,
    UniqueViolation,
)
from psycopg.types.json import Jsonb
from support.client import Api, a_file
from support.client import refused as call_refused
from support.cluster import TEMPLATE, Cluster
from support.server import serving

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, SearchChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, WatchChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import UpdateTicketRequest
from chat_ticket_svc import embedded
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.store.schema import MIGRATIONS

OLDEST_SUPPORTED = 15
EMBEDDED = 18

BAD_URLS = (
    *("", "files.example/a", "//files.example/a", "ftp://files.example/a", "javascript://x"),
    *("https://", "https:///a", "https://?a", "https://#a", "https:// a"),
    *("https://files.example/a b", "https://files.example/a\n", "x\nhttps://files.example/a"),
)

# Each table's parents, by the column that holds their id.
PARENTS = {
    "chat_sessions": {},
    "chat_messages": {"session_id": "chat_sessions"},
    "chat_message_tombstones": {"session_id": "chat_sessions"},
    "chat_attachments": {"message_id": "chat_messages"},
    "tickets": {},
    "chat_tickets": {"session_id": "chat_sessions", "ticket_id": "tickets"},
}


@pytest.fixture(scope="session")
def system_cluster() -> Iterator[Cluster]:
    """A private server of the oldest supported PostgreSQL that the system has.

    Its template was migrated up, down to nothing, and up again.
    """
    found = {
        int(path.parts[-3]): path.parent
        for path in Path("/usr/lib/postgresql").glob("*/bin/postgres")
        if OLDEST_SUPPORTED <= int(path.parts[-3]) < EMBEDDED
    }
    if not found:
        pytest.skip(f"PostgreSQL {OLDEST_SUPPORTED} is not on this machine: skipped")
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="chat-ticket-schema-", ignore_cleanup_errors=True)
        )
        Path(directory).chmod(0o711)  # for `nobody`, where there are no user namespaces
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(embedded, "_binaries", lambda: found[min(found)])
            postgres = EmbeddedPostgres(Path(directory, "data"), durable=False)
            cluster = Cluster(stack.enter_context(postgres).url("postgres"))
        downs = ["rollback"] * len(list(MIGRATIONS.glob("*.sql")))
        for command in ("up", *downs, "up"):
            assert migrate.dbmate(cluster.url(TEMPLATE), command, quiet=True) == 0
        yield cluster


@pytest.fixture(scope="session")
def system_database(system_cluster: Cluster) -> str:
    return system_cluster.create()


@pytest.fixture(params=["", "system_"], ids=["run", "system"])
def of(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """What conftest calls `cluster` or `database`, of the one PostgreSQL and of the other."""
    return lambda name: request.getfixturevalue(request.param + name)


@pytest.fixture
def url(of: Callable[[str], str]) -> str:
    """A database that the module's tests share."""
    return of("database")


Connect = Callable[[], psycopg.Connection[Any]]


@pytest.fixture
def connect(url: str) -> Iterator[Connect]:
    """Open connections, closed at the end of the test."""
    with contextlib.ExitStack() as stack:
        options = "-c statement_timeout=20s"
        yield lambda: stack.enter_context(psycopg.connect(url, autocommit=True, options=options))


class Rows:
    """A tenant's rows, written by plain SQL."""

    def __init__(self, connection: psycopg.Connection[Any], tenant: str):
        self.connection = connection
        self.tenant = tenant
        self._numbers = itertools.count(1)

    def add(self, table: str, **columns: Any) -> uuid.UUID:
        """Insert a row and return its id; what is not given is valid, parents included."""
        for column, parent in PARENTS[table].items():
            if column not in columns:
                columns[column] = self.add(parent)
        row = {"tenant_id": self.tenant, **self._others(table), **columns}
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING {}").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(map(sql.Placeholder, row)),
            sql.Identifier("message_id" if table == "chat_message_tombstones" else "id"),
        )
        return self.connection.execute(statement, row).fetchone()[0]  # type: ignore[index,no-any-return]

    def _others(self, table: str) -> dict[str, Any]:
        """The columns that have no default, besides those of PARENTS."""
        number = next(self._numbers)
        match table:
            case "chat_messages":
                order = {"sequence": number, "revision": number}
                return {**order, "role": "user", "content": "hello"}
            case "chat_message_tombstones":
                return {"message_id": uuid.uuid4(), "revision": number}
            case "chat_attachments":
                url = "https://files.example/a.png"
                return {"file_url": url, "file_name": "a.png", "file_type": "image/png"}
            case "tickets":
                return {"title": "help"}
        return {}

    def set(self, table: str, row_id: uuid.UUID, **columns: Any) -> None:
        """Update one row."""
        statement = sql.SQL(
            "UPDATE {} SET ({}) = ROW ({}) WHERE tenant_id = {} AND id = {}"
        ).format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(map(sql.Placeholder, columns)),
            sql.Literal(self.tenant),
            sql.Literal(row_id),
        )
        assert self.connection.execute(statement, columns).rowcount == 1

    def delete(self, table: str, row_id: uuid.UUID) -> None:
        """Delete one row."""
        statement = sql.SQL("DELETE FROM {} WHERE tenant_id = %s AND id = %s")
        executed = self.connection.execute(
            statement.format(sql.Identifier(table)), [self.tenant, row_id]
        )
        assert executed.rowcount == 1

    def session(self, session_id: uuid.UUID) -> Any:
        """(status, has_ticket, revision) of a session; None when there is none."""
        statement = """
            SELECT status, has_ticket, revision FROM chat_sessions
             WHERE tenant_id = %s AND id = %s
        """
        return self.connection.execute(statement, [self.tenant, session_id]).fetchone()

    def count(self, table: str) -> int:
        statement = sql.SQL("SELECT count(*) FROM {} WHERE tenant_id = %s")
        found = self.connection.execute(statement.format(sql.Identifier(table)), [self.tenant])
        return found.fetchone()[0]  # type: ignore[index,no-any-return]

    def wrong_flags(self) -> list[Any]:
        """The sessions whose has_ticket is not what their links say."""
        statement = """
            SELECT id FROM chat_sessions s
             WHERE tenant_id = %s AND has_ticket <> EXISTS (
                SELECT FROM chat_tickets WHERE tenant_id = s.tenant_id AND session_id = s.id)
        """
        return self.connection.execute(statement, [self.tenant]).fetchall()


@pytest.fixture
def us(connect: Connect, tenant: str) -> Rows:
    return Rows(connect(), tenant)


@pytest.fixture
def them(us: Rows) -> Rows:
    """Another tenant."""
    return Rows(us.connection, f"other {uuid.uuid4()}")


@pytest.fixture
def alone(of: Callable[[str], Cluster]) -> Iterator[Rows]:
    """The only tenant of a database of the test's own."""
    cluster = of("cluster")
    url = cluster.create()
    with psycopg.connect(url, autocommit=True) as connection:
        yield Rows(connection, "alone")
    cluster.drop(url)


@contextlib.contextmanager
def refused(kind: type[psycopg.Error], name: str) -> Iterator[None]:
    """Expects a statement to be refused with this SQLSTATE by this constraint (or NOT NULL)."""
    with pytest.raises(psycopg.Error) as caught:
        yield
    diag = caught.value.diag
    assert (diag.sqlstate, diag.constraint_name or diag.column_name) == (kind.sqlstate, name)


class TestValues:
    @pytest.mark.parametrize(
        ("table", "column", "values"),
        [
            ("chat_sessions", "tenant_id", [""]),
            ("chat_sessions", "status", ["closed", "Active", ""]),
            ("chat_sessions", "revision", [-1]),
            ("chat_messages", "role", ["system", "User", ""]),
            ("chat_messages", "content", [""]),
            ("chat_messages", "sequence", [0, -1]),
            ("chat_messages", "revision", [0]),
            ("chat_messages", "metadata", list(map(Jsonb, ([], "text", 1, True, None)))),
            ("chat_attachments", "file_url", BAD_URLS),
            (
                "chat_attachments",
                "file_name",
                ["", "a\nb", "\x01", "\x1f", "a\x7f", "\x85", "\x9f"],
            ),
            (
                "chat_attachments",
                "file_type",
                ["", "png", "/png", "é/", "a/b/c", "a/b c"],
            ),
            ("tickets", "tenant_id", [""]),
            ("tickets", "title", [""]),
            ("tickets", "status", ["active", ""]),
        ],
    )
    def test_bad_value_is_refused(
        self, us: Rows, table: str, column: str, values: list[Any]
    ) -> None:
        """Neither an insert nor an update stores it; the constraint has the column's name."""
        row = us.add(table)
        for value in values:
            with refused(CheckViolation, f"{table}_{column}_check"):
                us.add(table, **{column: value})
            # A message's place does not change at all.
            rule = "keys" if (table, column) == ("chat_messages", "sequence") else column
            with refused(CheckViolation, f"{table}_{rule}_check"):
                us.set(table, row, **{column: value})

    @pytest.mark.parametrize(
        ("table", "columns"),
        [
            ("chat_sessions", "id tenant_id status has_ticket revision created_at updated_at"),
            ("chat_messages", "id tenant_id session_id sequence revision role content created_at"),
            ("chat_message_tombstones", "tenant_id session_id message_id revision"),
            ("chat_attachments", "id tenant_id message_id file_url file_name file_type created_at"),
            ("tickets", "id tenant_id title status created_at updated_at"),
            ("chat_tickets", "id tenant_id session_id ticket_id created_at"),
        ],
    )
    def test_null_is_refused(self, us: Rows, table: str, columns: str) -> None:
        """What the seeds call mandatory is, and so is everything but metadata."""
        for column in columns.split():
            with refused(NotNullViolation, column):
                us.add(table, **{column: None})

    def test_good_values_are_stored(self, us: Rows) -> None:
        """Every status and role; metadata that is an object or absent; URLs of both schemes."""
        for status in ("active", "resolved", "archived"):
            us.add("chat_sessions", status=status)
        for status in ("open", "pending", "solved", "closed"):
            us.add("tickets", status=status)
        for role in ("user", "assistant"):
            us.add("chat_messages", role=role)
        for metadata in (None, Jsonb({}), Jsonb({"model": [1, None]})):
            us.add("chat_messages", metadata=metadata)
        for url in ("http://h", "HTTPS://h", "https://h:8443/p?q#f", "https://[::1]/ä"):
            us.add("chat_attachments", file_url=url)
        us.add("chat_attachments", file_name="Rechnung\u2028№5\xa0(🙂).pdf", file_type="a/b+c.d")

    def test_session_starts_active_without_a_ticket(self, us: Rows) -> None:
        """The defaults of the seeds."""
        assert us.session(us.add("chat_sessions")) == ("active", False, 0)

    def test_one_place_in_a_session_holds_one_message(self, us: Rows) -> None:
        """Two messages never share a sequence; in two sessions they may."""
        session = us.add("chat_sessions")
        us.add("chat_messages", session_id=session, sequence=7, revision=7)
        us.add("chat_messages", sequence=7, revision=7)
        with refused(UniqueViolation, "idx_chat_messages_session"):
            us.add("chat_messages", session_id=session, sequence=7, revision=8)

    @pytest.mark.parametrize("table", [t for t in PARENTS if t != "chat_message_tombstones"])
    def test_id_is_unique_within_its_tenant(self, us: Rows, them: Rows, table: str) -> None:
        """Another tenant can have the same one."""
        row = us.add(table)
        assert them.add(table, id=row) == row
        with refused(UniqueViolation, f"{table}_pkey"):
            us.add(table, id=row)


@pytest.mark.parametrize(
    ("table", "column", "parent"),
    [(table, *item) for table, parents in PARENTS.items() for item in parents.items()],
)
class TestParents:
    def test_absent_or_foreign_parent_is_refused(
        self, us: Rows, them: Rows, table: str, column: str, parent: str
    ) -> None:
        """A child hangs on a parent that exists, and is of its own tenant."""
        for absent in (uuid.uuid4(), them.add(parent)):
            with refused(ForeignKeyViolation, f"fk_{table}_{column.removesuffix('_id')}"):
                us.add(table, **{column: absent})
        assert them.wrong_flags() == us.wrong_flags() == []

    def test_updates_do_not_cascade(
        self, us: Rows, them: Rows, table: str, column: str, parent: str
    ) -> None:
        """The key of a parent does not change, nor its tenant, while it has children."""
        row = us.add(parent)
        us.add(table, **{column: row})
        rule: tuple[type[psycopg.Error], str]
        rule = ForeignKeyViolation, f"fk_{table}_{column.removesuffix('_id')}"
        if parent == "chat_messages":  # nor while it has none
            rule = CheckViolation, "chat_messages_keys_check"
        for change in ({"id": uuid.uuid4()}, {"tenant_id": them.tenant}):
            with refused(*rule):
                us.set(parent, row, **change)


class TestTombstones:
    @pytest.mark.parametrize("column", ["id", "tenant_id", "session_id", "sequence"])
    def test_keys_of_a_message_do_not_change(self, us: Rows, them: Rows, column: str) -> None:
        """It stays what and where it is: no update takes the id of a deleted message either."""
        message = us.add("chat_messages")
        others = {
            "id": us.add("chat_message_tombstones"),
            "tenant_id": them.tenant,
            "session_id": us.add("chat_sessions"),
            "sequence": 10**6,
        }
        with refused(CheckViolation, "chat_messages_keys_check"):
            us.set("chat_messages", message, **{column: others[column]})
        us.set("chat_messages", message, id=message)

    def test_id_of_a_deleted_message_is_not_used_again(self, us: Rows, them: Rows) -> None:
        """Not in its session, nor in another, nor among others; another tenant can have it."""
        tombstone = us.add("chat_message_tombstones")
        with refused(UniqueViolation, "chat_message_tombstones_pkey"):
            us.add("chat_messages", id=tombstone)
        several = """
            INSERT INTO chat_messages (tenant_id, session_id, id, sequence, revision, role, content)
            SELECT %(tenant)s, %(session)s, id, n, n, 'user', 'hello'
              FROM unnest(%(ids)s::uuid[]) WITH ORDINALITY AS u (id, n)
        """
        ids = [uuid.uuid4(), tombstone, uuid.uuid4()]
        values = {"tenant": us.tenant, "session": us.add("chat_sessions"), "ids": ids}
        with refused(UniqueViolation, "chat_message_tombstones_pkey"):
            us.connection.execute(several, values)
        assert us.count("chat_messages") == 0
        assert them.add("chat_messages", id=tombstone) == tombstone

    @pytest.mark.parametrize("committed", [True, False])
    def test_insert_that_waited_for_the_deletion(
        self, us: Rows, connect: Connect, committed: bool
    ) -> None:
        """The id of a message that is being deleted is not taken over in another session."""
        session, elsewhere = us.add("chat_sessions"), us.add("chat_sessions")
        message = us.add("chat_messages", session_id=session)
        deleting, inserting = Rows(connect(), us.tenant), Rows(connect(), us.tenant)
        with ThreadPoolExecutor(1) as pool:
            deleting.connection.execute("BEGIN")
            deleting.delete("chat_messages", message)
            deleting.add("chat_message_tombstones", session_id=session, message_id=message)
            waiting = pool.submit(inserting.add, "chat_messages", session_id=elsewhere, id=message)
            wait_until_blocked(us.connection, inserting.connection)
            deleting.connection.execute("COMMIT" if committed else "ROLLBACK")
            by = "chat_message_tombstones_pkey" if committed else "chat_messages_pkey"
            with refused(UniqueViolation, by):
                waiting.result()


class TestLinks:
    def test_one_ticket_per_session(self, us: Rows) -> None:
        """A second one is refused, be it the same ticket or another."""
        session, ticket = us.add("chat_sessions"), us.add("tickets")
        us.add("chat_tickets", session_id=session, ticket_id=ticket)
        for second in (ticket, us.add("tickets")):
            with refused(UniqueViolation, "idx_chat_tickets_session"):
                us.add("chat_tickets", session_id=session, ticket_id=second)
        assert us.session(session) == ("active", True, 1)

    def test_one_ticket_may_serve_several_sessions(self, us: Rows) -> None:
        """Ending one link leaves the other."""
        ticket = us.add("tickets")
        first, second = us.add("chat_sessions"), us.add("chat_sessions")
        link = us.add("chat_tickets", session_id=first, ticket_id=ticket)
        us.add("chat_tickets", session_id=second, ticket_id=ticket)
        us.delete("chat_tickets", link)
        assert us.session(first) == ("active", False, 2)
        assert us.session(second) == ("active", True, 1)

    def test_archived_session_takes_no_ticket(self, us: Rows) -> None:
        """It does again once it is taken up; and one that is archived keeps what it has."""
        session = us.add("chat_sessions", status="archived")
        with refused(CheckViolation, "chat_tickets_session_status_check"):
            us.add("chat_tickets", session_id=session)
        assert us.session(session) == ("archived", False, 0)
        for status in ("resolved", "archived"):
            us.set("chat_sessions", session, status=status)
            if status == "resolved":
                us.add("chat_tickets", session_id=session)
        assert us.session(session) == ("archived", True, 1)

    @pytest.mark.parametrize("column", ["id", "tenant_id", "session_id", "ticket_id"])
    def test_keys_do_not_change(self, us: Rows, them: Rows, column: str) -> None:
        """A link is ended and another made; setting a key to what it is changes nothing."""
        link = us.add("chat_tickets")
        others = {
            "id": uuid.uuid4(),
            "tenant_id": them.tenant,
            "session_id": us.add("chat_sessions"),
            "ticket_id": us.add("tickets"),
        }
        with refused(CheckViolation, "chat_tickets_keys_check"):
            us.set("chat_tickets", link, **{column: others[column]})
        us.set("chat_tickets", link, id=link)
        assert us.wrong_flags() == []

    def test_upsert_does_not_change_the_ticket(self, us: Rows) -> None:
        """ON CONFLICT DO UPDATE is no way round it."""
        session = us.add("chat_sessions")
        us.add("chat_tickets", session_id=session)
        upsert = """
            INSERT INTO chat_tickets (tenant_id, session_id, ticket_id) VALUES (%s, %s, %s)
            ON CONFLICT (tenant_id, session_id) DO UPDATE SET ticket_id = EXCLUDED.ticket_id
        """
        with refused(CheckViolation, "chat_tickets_keys_check"):
            us.connection.execute(upsert, [us.tenant, session, us.add("tickets")])
        assert us.session(session) == ("active", True, 1)

    def test_truncate_is_refused(self, alone: Rows) -> None:
        """It fires no row trigger: has_ticket would stay behind, and active tickets be lost.

        Even when there seem to be none: it removes rows that its snapshot does not show.
        """
        for linked in (False, True):
            if linked:
                alone.add("chat_tickets")
            for tables in ("chat_tickets", "chat_sessions CASCADE", "tickets CASCADE"):
                with refused(RestrictViolation, "chat_tickets_truncate_check"):
                    alone.connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(tables)))
        assert alone.count("chat_tickets") == 1


class TestHasTicket:
    def test_cannot_be_inserted_true(self, us: Rows) -> None:
        """A new session has no ticket; false may be said."""
        with refused(CheckViolation, "chat_sessions_has_ticket_check"):
            us.add("chat_sessions", has_ticket=True)
        us.add("chat_sessions", has_ticket=False)

    @pytest.mark.parametrize("linked", [False, True])
    def test_cannot_be_set_by_hand(self, us: Rows, linked: bool) -> None:
        """Only to what it is."""
        session = us.add("chat_sessions")
        if linked:
            us.add("chat_tickets", session_id=session)
        for wrong in (not linked, None):
            with refused(CheckViolation, "chat_sessions_has_ticket_check"):
                us.set("chat_sessions", session, has_ticket=wrong)
        us.set("chat_sessions", session, has_ticket=linked)

    def test_follows_the_link_within_its_transaction(self, us: Rows) -> None:
        """It is true at once, and false again after the link's rollback."""
        session = us.add("chat_sessions")
        us.connection.execute("BEGIN")
        us.add("chat_tickets", session_id=session)
        assert us.session(session) == ("active", True, 1)
        us.connection.execute("ROLLBACK")
        assert us.session(session) == ("active", False, 0)

    def test_unlink_that_is_rolled_back(self, us: Rows) -> None:
        """The link is there as before, and so is has_ticket."""
        session = us.add("chat_sessions")
        link = us.add("chat_tickets", session_id=session)
        us.connection.execute("BEGIN")
        us.delete("chat_tickets", link)
        assert us.session(session) == ("active", False, 2)
        us.connection.execute("ROLLBACK")
        assert us.session(session) == ("active", True, 1)

    def test_insert_that_does_nothing_changes_nothing(self, us: Rows) -> None:
        """ON CONFLICT DO NOTHING increments no revision."""
        session = us.add("chat_sessions")
        us.add("chat_tickets", session_id=session)
        statement = """
            INSERT INTO chat_tickets (tenant_id, session_id, ticket_id) VALUES (%s, %s, %s)
            ON CONFLICT DO NOTHING
        """
        us.connection.execute(statement, [us.tenant, session, us.add("tickets")])
        assert us.session(session) == ("active", True, 1)
        assert us.count("chat_tickets") == 1

    @pytest.mark.parametrize("updated_at", ["2000-01-01Z", "2999-01-01Z"])
    def test_each_change_is_one_revision_and_moves_the_time(
        self, us: Rows, updated_at: str
    ) -> None:
        """Also within one transaction, and when the clock was set back."""
        session = us.add("chat_sessions", revision=41, updated_at=updated_at)
        read = "SELECT revision, updated_at FROM chat_sessions WHERE tenant_id = %s AND id = %s"
        seen = []
        with us.connection.transaction():
            for change in (
                lambda: None,
                lambda: us.add("chat_tickets", session_id=session, id=session),
                lambda: us.delete("chat_tickets", session),
                lambda: us.add("chat_tickets", session_id=session, id=session),
            ):
                change()
                seen += us.connection.execute(read, [us.tenant, session]).fetchall()
        assert [revision for revision, _ in seen] == [41, 42, 43, 44]
        times = [when for _, when in seen]
        assert times == sorted(set(times))

    def test_several_links_in_one_statement(self, us: Rows) -> None:
        """Each session has its own revision; a statement that fails links none."""
        sessions = [us.add("chat_sessions") for _ in range(3)]
        statement = """
            INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
            SELECT %s, unnest(%s::uuid[]), %s
        """
        values = [us.tenant, sessions, us.add("tickets")]
        us.set("chat_sessions", sessions[2], status="archived")
        with refused(CheckViolation, "chat_tickets_session_status_check"):
            us.connection.execute(statement, values)
        assert [us.session(s)[1:] for s in sessions] == [(False, 0)] * 3
        us.set("chat_sessions", sessions[2], status="active")
        us.connection.execute(statement, values)
        assert [us.session(s)[1:] for s in sessions] == [(True, 1)] * 3


class TestDelete:
    @pytest.mark.parametrize("status", ["open", "pending"])
    def test_session_with_an_active_ticket_stays(self, us: Rows, status: str) -> None:
        """Alone and in a statement over many, which then deletes none."""
        session = us.add("chat_sessions")
        us.add("chat_tickets", session_id=session, ticket_id=us.add("tickets", status=status))
        us.add("chat_sessions")
        with refused(RestrictViolation, "chat_sessions_ticket_status_check"):
            us.delete("chat_sessions", session)
        with refused(RestrictViolation, "chat_sessions_ticket_status_check"):
            us.connection.execute("DELETE FROM chat_sessions WHERE tenant_id = %s", [us.tenant])
        assert (us.count("chat_sessions"), us.count("chat_tickets")) == (2, 1)

    @pytest.mark.parametrize("status", ["solved", "closed"])
    def test_session_takes_all_below_it_along(self, us: Rows, status: str) -> None:
        """Messages, attachments, tombstones and links go; tickets and other sessions stay."""
        kept = {"chat_sessions": 1, "chat_messages": 2, "chat_attachments": 4, "tickets": 2}
        kept |= {"chat_message_tombstones": 1, "chat_tickets": 1}
        sessions = [us.add("chat_sessions"), us.add("chat_sessions")]
        for session, state in zip(sessions, (status, "open"), strict=True):
            for _ in range(2):
                message = us.add("chat_messages", session_id=session)
                us.add("chat_attachments", message_id=message)
                us.add("chat_attachments", message_id=message)
            us.add("chat_message_tombstones", session_id=session)
            ticket = us.add("tickets", status=state)
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        us.delete("chat_sessions", sessions[0])
        assert {table: us.count(table) for table in PARENTS} == kept
        assert us.session(sessions[1]) == ("active", True, 1)

    def test_message_takes_its_attachments_along(self, us: Rows) -> None:
        """And nobody else's."""
        message, other = us.add("chat_messages"), us.add("chat_messages")
        for parent in (message, message, other):
            us.add("chat_attachments", message_id=parent)
        us.delete("chat_messages", message)
        assert (us.count("chat_messages"), us.count("chat_attachments")) == (1, 1)

    def test_linked_ticket_stays(self, us: Rows) -> None:
        """Whatever its status; it can go when its last link has gone."""
        ticket = us.add("tickets", status="closed")
        link = us.add("chat_tickets", ticket_id=ticket)
        with refused(ForeignKeyViolation, "fk_chat_tickets_ticket"):
            us.delete("tickets", ticket)
        us.delete("chat_tickets", link)
        us.delete("tickets", ticket)


@pytest.mark.parametrize(
    ("hidden", "refusal"),
    [
        ("tickets", (RestrictViolation, "chat_sessions_ticket_status_check")),
        ("chat_tickets", (CheckViolation, "chat_sessions_has_ticket_check")),
        ("chat_sessions", (CheckViolation, "chat_tickets_session_status_check")),
        ("chat_message_tombstones", (UniqueViolation, "chat_message_tombstones_pkey")),
    ],
)
def test_temporary_table_of_the_same_name_hides_no_rule(
    us: Rows, hidden: str, refusal: tuple[type[psycopg.Error], str]
) -> None:
    """The triggers look at our tables, whatever else the caller's session calls by their names."""
    session, ticket = us.add("chat_sessions"), us.add("tickets")
    us.add("chat_tickets", session_id=session, ticket_id=ticket)
    archived = us.add("chat_sessions", status="archived")
    dead = us.add("chat_message_tombstones", session_id=session)
    table = sql.Identifier(hidden)
    us.connection.execute(sql.SQL("CREATE TEMP TABLE {} (LIKE public.{})").format(table, table))
    with refused(*refusal):
        match hidden:
            case "tickets":
                us.delete("chat_sessions", session)
            case "chat_tickets":
                us.set("chat_sessions", session, has_ticket=False)
            case "chat_sessions":
                us.add("chat_tickets", session_id=archived, ticket_id=ticket)
            case "chat_message_tombstones":
                us.add("chat_messages", session_id=session, id=dead)


def wait_until_blocked(by: psycopg.Connection[Any], waiter: psycopg.Connection[Any]) -> None:
    """Return when the waiter's statement waits for a lock that somebody holds."""
    deadline = time.monotonic() + 15
    statement = "SELECT cardinality(pg_blocking_pids(%s)) > 0"
    while by.execute(statement, [waiter.info.backend_pid]).fetchone() != (True,):
        assert time.monotonic() < deadline, "it did not wait for a lock"
        time.sleep(0.002)


LINK = """
INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)
VALUES (%(tenant)s, %(session)s, %(ticket)s)
"""
UNLINK = "DELETE FROM chat_tickets WHERE tenant_id = %(tenant)s AND session_id = %(session)s"
ARCHIVE = """
UPDATE chat_sessions SET status = 'archived', revision = revision + 1
 WHERE tenant_id = %(tenant)s AND id = %(session)s
RETURNING has_ticket
"""
DELETE = "DELETE FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(session)s"
SAY = """
INSERT INTO chat_messages (tenant_id, session_id, sequence, revision, role, content)
VALUES (%(tenant)s, %(session)s, 1, 1, 'user', 'hello')
"""
REOPEN = "UPDATE tickets SET status = 'open' WHERE tenant_id = %(tenant)s AND id = %(ticket)s"
DROP = "DELETE FROM tickets WHERE tenant_id = %(tenant)s AND id = %(ticket)s"

ARCHIVED = (CheckViolation, "chat_tickets_session_status_check")
ACTIVE = (RestrictViolation, "chat_sessions_ticket_status_check")
LINKED = (UniqueViolation, "idx_chat_tickets_session")
NO_SESSION = (ForeignKeyViolation, "fk_chat_tickets_session")
NO_TICKET = (ForeignKeyViolation, "fk_chat_tickets_ticket")
NOT_THERE = (ForeignKeyViolation, "fk_chat_messages_session")


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
    @pytest.mark.parametrize(
        ("linked", "first", "second", "refusal"),
        [
            # An open ticket, not linked yet.
            pytest.param(False, LINK, ARCHIVE, None, id="link, archive"),
            pytest.param(False, ARCHIVE, LINK, ARCHIVED, id="archive, link"),
            pytest.param(False, LINK, DELETE, ACTIVE, id="link, delete"),
            pytest.param(False, DELETE, LINK, NO_SESSION, id="delete, link"),
            pytest.param(False, LINK, LINK, LINKED, id="link, link"),
            pytest.param(False, LINK, DROP, NO_TICKET, id="link, drop ticket"),
            pytest.param(False, DROP, LINK, NO_TICKET, id="drop ticket, link"),
            pytest.param(False, DELETE, SAY, NOT_THERE, id="delete, say"),
            pytest.param(False, SAY, DELETE, None, id="say, delete"),
            # A closed ticket, linked already.
            pytest.param(True, REOPEN, DELETE, ACTIVE, id="reopen, delete"),
            pytest.param(True, DELETE, REOPEN, None, id="delete, reopen"),
            pytest.param(True, UNLINK, ARCHIVE, None, id="unlink, archive"),
            pytest.param(True, UNLINK, DELETE, None, id="unlink, delete"),
            pytest.param(True, DELETE, UNLINK, None, id="delete, unlink"),
        ],
    )
    def test_second_waits_and_judges_what_the_first_left(
        self,
        us: Rows,
        connect: Connect,
        linked: bool,
        first: LiteralString,
        second: LiteralString,
        refusal: tuple[type[psycopg.Error], str] | None,
        committed: bool,
    ) -> None:
        """It is refused as if it had come later; a rollback of the first leaves it free."""
        session = us.add("chat_sessions")
        ticket = us.add("tickets", status="closed" if linked else "open")
        if linked:
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        values = {"tenant": us.tenant, "session": session, "ticket": ticket}
        holder, waiter = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            holder.execute(first, values)
            waiting = pool.submit(waiter.execute, second, values)
            wait_until_blocked(us.connection, waiter)
            holder.execute("COMMIT" if committed else "ROLLBACK")
            with refused(*refusal) if committed and refusal else contextlib.nullcontext():
                waiting.result()
        assert us.wrong_flags() == []

    def test_link_archive_and_delete_started_together(self, us: Rows, connect: Connect) -> None:
        """Whoever comes first: no link is lost, and none is made after archiving."""
        rounds = 50
        sessions = [us.add("chat_sessions") for _ in range(rounds)]
        tickets = [us.add("tickets") for _ in range(rounds)]
        start = threading.Barrier(3, timeout=20)

        def run(statement: LiteralString) -> list[Any]:
            """What each round of the statement returned, or the constraint that refused it."""
            connection = connect()
            outcomes: list[Any] = []
            for session, ticket in zip(sessions, tickets, strict=True):
                values = {"tenant": us.tenant, "session": session, "ticket": ticket}
                start.wait()
                try:
                    cursor = connection.execute(statement, values)
                    outcomes.append(cursor.fetchone() if cursor.description else True)
                except psycopg.errors.IntegrityError as error:
                    outcomes.append(error.diag.constraint_name)
            return outcomes

        with ThreadPoolExecutor(3) as pool:
            links, archives, deletes = pool.map(run, (LINK, ARCHIVE, DELETE))
        for session, link, archive, delete in zip(sessions, links, archives, deletes, strict=True):
            now = us.session(session)
            if link is True:
                assert delete == "chat_sessions_ticket_status_check"
                assert archive == (True,), "linked after it was archived"
                assert now == ("archived", True, 2)
            else:
                assert link in ("chat_tickets_session_status_check", "fk_chat_tickets_session")
                assert (delete, now) == (True, None)
                assert archive in ((False,), None)
        assert us.count("chat_tickets") == links.count(True)
        assert us.count("tickets") == rounds


async def test_service_runs_on_every_supported_postgresql(url: str, tenant: str) -> None:
    """Everything a conversation goes through works on the oldest one as on the newest."""
    async with serving(url) as server, Api(f"127.0.0.1:{server.port}", tenant) as api:
        session = await api.session()
        content = "my invoice is wrong"
        sent = await api.message(
            session.id, content, metadata_json='{"n":1}', attachments=[a_file()]
        )
        await api.attachment(sent.id, file_name="b.png")

        def names(message: r.ChatMessage) -> list[str]:
            return [attachment.file_name for attachment in message.attachments]

        listing = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id))
        listed = [message async for response in listing for message in response.messages]
        assert [(m.content, names(m)) for m in listed] == [(content, ["a.png", "b.png"])]

        watched = []
        watch = api.sessions.WatchChatSession(WatchChatSessionRequest(session_id=session.id))
        async for response in watch:
            watched += response.messages_created.messages
            if response.HasField("caught_up"):
                break
        watch.cancel()
        assert watched == listed

        found = await api.messages.SearchChatMessages(SearchChatMessagesRequest(query="invoices"))
        assert [hit.message_id for hit in found.hits] == [sent.id]

        ticket = (await api.escalate(session.id)).ticket
        delete = DeleteChatSessionRequest(session_id=session.id)
        with call_refused(StatusCode.FAILED_PRECONDITION, "SESSION_HAS_ACTIVE_TICKET"):
            await api.sessions.DeleteChatSession(delete)
        ticket.status = r.TICKET_STATUS_CLOSED
        mask = FieldMask(paths=["status"])
        await api.tickets.UpdateTicket(UpdateTicketRequest(ticket=ticket, update_mask=mask))
        await api.sessions.DeleteChatSession(delete)
        found = await api.messages.SearchChatMessages(SearchChatMessagesRequest(query="invoices"))
        assert not found.hits
