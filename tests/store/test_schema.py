"""The rules of the schema hold against plain SQL that bypasses the service.

On the PostgreSQL of the run and, where the system has one, on the oldest that is supported.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import (
    CheckViolation,
    ForeignKeyViolation,
    InvalidParameterValue,
    NotNullViolation,
    RestrictViolation,
    UniqueViolation,
)
from psycopg.types.json import Jsonb
from support.database import wait_until_blocked
from support.plain_rows import ID_COLUMNS, PARENTS, Connect, Rows, rejected_by

BAD_URLS = (
    *("", "files.example/a", "//files.example/a", "ftp://files.example/a", "javascript://x"),
    *("https://", "https:///a", "https://?a", "https://#a", "https:// a"),
    *(
        "https://files.example/a ",
        "https://files.example/a\tb",
        "https://files.example/a\n",
        "x\nhttps://files.example/a",
    ),
)


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
            ("chat_messages", "state", ["complete", "Stopped", ""]),
            ("chat_attachments", "file_url", BAD_URLS),
            ("chat_attachments", "file_name", [""]),
            (
                "chat_attachments",
                "file_type",
                ["", "png", "/png", "é/", "a/b/c", "a/b c", "a/b; c\n", "a/b; é"],
            ),
            ("tickets", "tenant_id", [""]),
            ("tickets", "title", [""]),
            ("tickets", "status", ["active", ""]),
        ],
    )
    def test_bad_value_is_rejected(
        self, us: Rows, table: str, column: str, values: list[Any]
    ) -> None:
        """Neither an insert nor an update stores it; the constraint has the column's name."""
        row = us.add(table)
        for value in values:
            with rejected_by(CheckViolation, f"{table}_{column}_check"):
                us.add(table, **{column: value})
            # A message's place does not change at all.
            rule = "keys" if (table, column) == ("chat_messages", "sequence") else column
            with rejected_by(CheckViolation, f"{table}_{rule}_check"):
                us.set(table, row, **{column: value})

    @pytest.mark.parametrize(
        ("table", "column"), [("tickets", "title"), ("chat_attachments", "file_name")]
    )
    def test_text_of_more_than_one_line_is_rejected(
        self, us: Rows, table: str, column: str
    ) -> None:
        """As a data exception, which an older server too answers with INVALID_ARGUMENT."""
        row = us.add(table, **{column: "\u202aa\u2067é\u2069\u202c"})
        unpaired = ["a\u202eb", "\u2066\u202c", "\u202c\u202a", "\u202a\u2067\u202c\u2069"]
        bad = ["a\nb", "\x01", "\x1f", "a\x7f", "\x85", "\x9f", "a\u2028b", " ", "a "]
        for value in [*bad, *unpaired]:
            with rejected_by(InvalidParameterValue, f"{table}_{column}_check"):
                us.add(table, **{column: value})
            with rejected_by(InvalidParameterValue, f"{table}_{column}_check"):
                us.set(table, row, **{column: value})

    def test_ticket_with_an_old_title_can_change(self, us: Rows) -> None:
        """The rule is younger than the row: all but a new bad title is accepted."""
        ticket = us.add("tickets")
        us.connection.execute("SET session_replication_role = replica")
        us.set("tickets", ticket, title="a\nb")
        us.connection.execute("SET session_replication_role = origin")
        us.set("tickets", ticket, title="a\nb", status="closed")
        with rejected_by(InvalidParameterValue, "tickets_title_check"):
            us.set("tickets", ticket, title="a\nc")

    @pytest.mark.parametrize(
        ("table", "columns"),
        [
            ("chat_sessions", "id tenant_id status has_ticket revision created_at updated_at"),
            (
                "chat_messages",
                "id tenant_id session_id sequence revision role content created_at redacted",
            ),
            ("chat_session_tombstones", "tenant_id session_id deleted_at"),
            ("ticket_tombstones", "tenant_id ticket_id deleted_at"),
            ("chat_message_tombstones", "tenant_id session_id message_id revision"),
            ("chat_attachments", "id tenant_id message_id file_url file_name file_type created_at"),
            ("tickets", "id tenant_id title status created_at updated_at revision"),
            ("chat_tickets", "id tenant_id session_id ticket_id created_at"),
        ],
    )
    def test_null_is_rejected(self, us: Rows, table: str, columns: str) -> None:
        """What the seeds call mandatory is, and so is what each row has from its beginning."""
        for column in columns.split():
            with rejected_by(NotNullViolation, column):
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
        for url in (
            "http://h",
            "HTTPS://h",
            "https://h:8443/p?q#f",
            "https://[::1]/ä",
            "https://h/a b|c",
        ):
            us.add("chat_attachments", file_url=url)
        us.add("chat_attachments", file_name="Rechnung №5\xa0(🙂).pdf", file_type="a/b+c.d")
        us.add("chat_attachments", file_type='a/b ; c="d e/f"')

    def test_session_starts_active_without_a_ticket(self, us: Rows) -> None:
        """The defaults of the seeds."""
        assert us.session(us.add("chat_sessions")) == ("active", False, 0)

    def test_sequence_is_unique_within_its_session(self, us: Rows) -> None:
        """Two messages never share a sequence; in two sessions they may."""
        session = us.add("chat_sessions")
        us.add("chat_messages", session_id=session, sequence=7, revision=7)
        us.add("chat_messages", sequence=7, revision=7)
        with rejected_by(UniqueViolation, "idx_chat_messages_session"):
            us.add("chat_messages", session_id=session, sequence=7, revision=8)

    @pytest.mark.parametrize("table", [table for table in PARENTS if table not in ID_COLUMNS])
    def test_id_is_unique_within_its_tenant(self, us: Rows, them: Rows, table: str) -> None:
        """Another tenant can have the same one."""
        row = us.add(table)
        assert them.add(table, id=row) == row
        with rejected_by(UniqueViolation, f"{table}_pkey"):
            us.add(table, id=row)


@pytest.mark.parametrize(
    ("table", "column", "parent"),
    [(table, *item) for table, parents in PARENTS.items() for item in parents.items()],
)
class TestParents:
    def test_absent_or_foreign_parent_is_rejected(
        self, us: Rows, them: Rows, table: str, column: str, parent: str
    ) -> None:
        """A child has an existing parent of the same tenant."""
        for absent in (uuid.uuid4(), them.add(parent)):
            with rejected_by(ForeignKeyViolation, f"fk_{table}_{column.removesuffix('_id')}"):
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
        if parent in ("chat_messages", "chat_drafts"):  # nor while it has none
            rule = CheckViolation, f"{parent}_keys_check"
        with rejected_by(*rule):
            us.set(parent, row, tenant_id=them.tenant)
        if parent == "chat_sessions":  # whose id does not change while it has no children either
            rule = CheckViolation, f"{parent}_keys_check"
        with rejected_by(*rule):
            us.set(parent, row, id=uuid.uuid4())


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
        with rejected_by(CheckViolation, "chat_messages_keys_check"):
            us.set("chat_messages", message, **{column: others[column]})
        us.set("chat_messages", message, id=message)

    def test_id_of_a_deleted_message_is_not_used_again(self, us: Rows, them: Rows) -> None:
        """Not in its session, nor in another, nor among others; another tenant can have it."""
        tombstone = us.add("chat_message_tombstones")
        with rejected_by(UniqueViolation, "chat_message_tombstones_pkey"):
            us.add("chat_messages", id=tombstone)
        several = """
            INSERT INTO chat_messages (tenant_id, session_id, id, sequence, revision, role, content)
            SELECT %(tenant)s, %(session)s, id, n, n, 'user', 'hello'
              FROM unnest(%(ids)s::uuid[]) WITH ORDINALITY AS u (id, n)
        """
        ids = [uuid.uuid4(), tombstone, uuid.uuid4()]
        values = {"tenant": us.tenant, "session": us.add("chat_sessions"), "ids": ids}
        with rejected_by(UniqueViolation, "chat_message_tombstones_pkey"):
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
            with rejected_by(UniqueViolation, by):
                waiting.result()


class TestLinks:
    def test_one_ticket_per_session(self, us: Rows) -> None:
        """A second one is rejected, be it the same ticket or another."""
        session, ticket = us.add("chat_sessions"), us.add("tickets")
        us.add("chat_tickets", session_id=session, ticket_id=ticket)
        for second in (ticket, us.add("tickets")):
            with rejected_by(UniqueViolation, "idx_chat_tickets_session"):
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
        with rejected_by(CheckViolation, "chat_tickets_session_status_check"):
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
        with rejected_by(CheckViolation, "chat_tickets_keys_check"):
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
        with rejected_by(CheckViolation, "chat_tickets_keys_check"):
            us.connection.execute(upsert, [us.tenant, session, us.add("tickets")])
        assert us.session(session) == ("active", True, 1)

    def test_truncate_is_rejected(self, alone: Rows) -> None:
        """It fires no row trigger: has_ticket would stay behind, and active tickets be lost.

        Even when there seem to be none: it removes rows that its snapshot does not show.
        """
        for linked in (False, True):
            if linked:
                alone.add("chat_tickets")
            for tables in ("chat_tickets", "chat_sessions CASCADE", "tickets CASCADE"):
                with rejected_by(RestrictViolation, "chat_tickets_truncate_check"):
                    alone.connection.execute(sql.SQL("TRUNCATE {}").format(sql.SQL(tables)))
        assert alone.count("chat_tickets") == 1


class TestHasTicket:
    def test_cannot_be_inserted_true(self, us: Rows) -> None:
        """A new session has no ticket; has_ticket may be given as false."""
        with rejected_by(CheckViolation, "chat_sessions_has_ticket_check"):
            us.add("chat_sessions", has_ticket=True)
        us.add("chat_sessions", has_ticket=False)

    @pytest.mark.parametrize("linked", [False, True])
    def test_cannot_be_set_by_hand(self, us: Rows, linked: bool) -> None:
        """Only to what it is."""
        session = us.add("chat_sessions")
        if linked:
            us.add("chat_tickets", session_id=session)
        for wrong in (not linked, None):
            with rejected_by(CheckViolation, "chat_sessions_has_ticket_check"):
                us.set("chat_sessions", session, has_ticket=wrong)
        us.set("chat_sessions", session, has_ticket=linked)

    def test_has_ticket_changes_with_the_link_in_one_transaction(self, us: Rows) -> None:
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
        with rejected_by(CheckViolation, "chat_tickets_session_status_check"):
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
        with rejected_by(RestrictViolation, "chat_sessions_ticket_status_check"):
            us.delete("chat_sessions", session)
        with rejected_by(RestrictViolation, "chat_sessions_ticket_status_check"):
            us.connection.execute("DELETE FROM chat_sessions WHERE tenant_id = %s", [us.tenant])
        assert (us.count("chat_sessions"), us.count("chat_tickets")) == (2, 1)

    @pytest.mark.parametrize("status", ["solved", "closed"])
    def test_deleting_a_session_deletes_all_its_rows(self, us: Rows, status: str) -> None:
        """All but tickets and other sessions. Its id stays."""
        remaining = {"chat_sessions": 1, "chat_messages": 2, "chat_attachments": 4, "tickets": 2}
        remaining |= {"chat_message_tombstones": 1, "chat_tickets": 1}
        remaining |= {"chat_drafts": 1, "chat_draft_pieces": 1, "chat_session_tombstones": 1}
        remaining |= {"ticket_tombstones": 0}
        sessions = [us.add("chat_sessions"), us.add("chat_sessions")]
        for session, state in zip(sessions, (status, "open"), strict=True):
            for _ in range(2):
                message = us.add("chat_messages", session_id=session)
                us.add("chat_attachments", message_id=message)
                us.add("chat_attachments", message_id=message)
            us.add("chat_message_tombstones", session_id=session)
            us.add("chat_draft_pieces", draft_id=us.add("chat_drafts", session_id=session))
            ticket = us.add("tickets", status=state)
            us.add("chat_tickets", session_id=session, ticket_id=ticket)
        us.delete("chat_sessions", sessions[0])
        assert {table: us.count(table) for table in PARENTS} == remaining
        assert us.session(sessions[1]) == ("active", True, 1)

    def test_deleting_a_message_deletes_its_attachments(self, us: Rows) -> None:
        """Rows of other tenants stay."""
        message, other = us.add("chat_messages"), us.add("chat_messages")
        for parent in (message, message, other):
            us.add("chat_attachments", message_id=parent)
        us.delete("chat_messages", message)
        assert (us.count("chat_messages"), us.count("chat_attachments")) == (1, 1)

    def test_linked_ticket_stays(self, us: Rows) -> None:
        """Whatever its status; it can go when its last link has gone."""
        ticket = us.add("tickets", status="closed")
        link = us.add("chat_tickets", ticket_id=ticket)
        with rejected_by(ForeignKeyViolation, "fk_chat_tickets_ticket"):
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
        ("chat_drafts", (UniqueViolation, "chat_messages_pkey")),
        ("chat_messages", (UniqueViolation, "chat_drafts_message_id_check")),
    ],
)
def test_temporary_table_of_the_same_name_hides_no_rule(
    us: Rows, hidden: str, refusal: tuple[type[psycopg.Error], str]
) -> None:
    """The triggers ignore temporary tables with the names of the service's tables."""
    session, ticket = us.add("chat_sessions"), us.add("tickets")
    us.add("chat_tickets", session_id=session, ticket_id=ticket)
    archived = us.add("chat_sessions", status="archived")
    dead = us.add("chat_message_tombstones", session_id=session)
    message, draft = us.add("chat_messages"), us.add("chat_drafts")
    table = sql.Identifier(hidden)
    us.connection.execute(sql.SQL("CREATE TEMP TABLE {} (LIKE public.{})").format(table, table))
    with rejected_by(*refusal):
        match hidden:
            case "tickets":
                us.delete("chat_sessions", session)
            case "chat_tickets":
                us.set("chat_sessions", session, has_ticket=False)
            case "chat_sessions":
                us.add("chat_tickets", session_id=archived, ticket_id=ticket)
            case "chat_message_tombstones":
                us.add("chat_messages", session_id=session, id=dead)
            case "chat_drafts":
                us.add("chat_messages", session_id=session, id=draft)
            case "chat_messages":
                us.add("chat_drafts", session_id=session, id=message)
