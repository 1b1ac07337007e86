"""The rules of drafts hold against plain SQL, also when two transactions use an id at once."""

import contextlib
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.errors import CheckViolation, NotNullViolation, UniqueViolation
from psycopg.types.json import Jsonb
from support.database import wait_until_blocked
from support.plain_rows import Connect, Rows, rejected_by

START = """
INSERT INTO chat_drafts (tenant_id, id, session_id, role, expires_at)
VALUES (%(tenant)s, %(id)s, %(session)s, 'assistant', now())
"""
SAY = """
INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role, content)
VALUES (%(tenant)s, %(id)s, %(session)s, 1, 1, 'user', 'hello')
"""
SAY_MUCH = """
INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role, content)
SELECT %(tenant)s, CASE WHEN n = %(count)s THEN %(id)s ELSE gen_random_uuid() END, %(session)s,
       n, n, 'user', 'hello'
  FROM generate_series(1, %(count)s) n
"""
FINISH = f"""
WITH finished AS (DELETE FROM chat_drafts WHERE tenant_id = %(tenant)s AND id = %(id)s) {SAY}
"""
DROP = "DELETE FROM chat_drafts WHERE tenant_id = %(tenant)s AND id = %(id)s"

OF_A_MESSAGE = (UniqueViolation, "chat_drafts_message_id_check")
OF_ANOTHER_DRAFT = (UniqueViolation, "chat_drafts_pkey")
# As that of another message: one rule, which servers without drafts know too.
OF_A_MESSAGE_OR_DRAFT = (UniqueViolation, "chat_messages_pkey")


class TestValues:
    @pytest.mark.parametrize(
        ("column", "values"),
        [
            ("fencing_token", [0, -1]),
            ("length", [-1]),
            ("role", ["system", "User", ""]),
            ("language_code", ["", "e", "en_GB", "en-", "de-AT-", "a" * 9, "en" + "-abcdefgh" * 4]),
            ("metadata", list(map(Jsonb, ([], "text", 1, True, None)))),
        ],
    )
    def test_bad_value_is_rejected(self, us: Rows, column: str, values: list[Any]) -> None:
        """Neither an insert nor an update stores it; the constraint has the column's name."""
        draft = us.add("chat_drafts")
        for value in values:
            with rejected_by(CheckViolation, f"chat_drafts_{column}_check"):
                us.add("chat_drafts", **{column: value})
            rule = "keys" if column == "role" else column
            with rejected_by(CheckViolation, f"chat_drafts_{rule}_check"):
                us.set("chat_drafts", draft, **{column: value})

    @pytest.mark.parametrize(
        ("table", "columns"),
        [
            (
                "chat_drafts",
                "id tenant_id session_id fencing_token length expires_at created_at role",
            ),
            ("chat_draft_pieces", "tenant_id draft_id start_offset content"),
        ],
    )
    def test_null_is_rejected(self, us: Rows, table: str, columns: str) -> None:
        """All but the language code and the metadata is mandatory."""
        for column in columns.split():
            with rejected_by(NotNullViolation, column):
                us.add(table, **{column: None})

    def test_draft_starts_empty_and_is_its_first_writers(self, us: Rows) -> None:
        """The defaults, which an insert need not give."""
        draft = us.add("chat_drafts", language_code="de-AT", metadata=Jsonb({"a": [None]}))
        row = us.connection.execute(
            "SELECT fencing_token, length, created_at <= now() FROM chat_drafts WHERE id = %s",
            [draft],
        ).fetchone()
        assert row == (1, 0, True)

    def test_piece_has_content_and_a_place_of_its_own(self, us: Rows) -> None:
        """Two pieces of one draft never begin at the same place; of two drafts they may."""
        draft = us.add("chat_draft_pieces")
        us.add("chat_draft_pieces")
        with rejected_by(UniqueViolation, "chat_draft_pieces_pkey"):
            us.add("chat_draft_pieces", draft_id=draft)
        with rejected_by(CheckViolation, "chat_draft_pieces_content_check"):
            us.add("chat_draft_pieces", draft_id=draft, start_offset=5, content="")
        with rejected_by(CheckViolation, "chat_draft_pieces_start_offset_check"):
            us.add("chat_draft_pieces", draft_id=draft, start_offset=-1)

    @pytest.mark.parametrize("state", [None, "incomplete", "stopped"])
    def test_states_of_messages(self, us: Rows, state: str | None) -> None:
        """A message that is whole has none."""
        us.add("chat_messages", state=state)


class TestChanges:
    @pytest.mark.parametrize("column", ["id", "tenant_id", "session_id", "role"])
    def test_keys_do_not_change(self, us: Rows, them: Rows, column: str) -> None:
        """A draft stays what and where it is; setting a key to what it is changes nothing."""
        draft = us.add("chat_drafts")
        others = {
            "id": uuid.uuid4(),
            "tenant_id": them.tenant,
            "session_id": us.add("chat_sessions"),
            "role": "user",
        }
        with rejected_by(CheckViolation, "chat_drafts_keys_check"):
            us.set("chat_drafts", draft, **{column: others[column]})
        us.set("chat_drafts", draft, id=draft)

    def test_fencing_token_is_not_lowered(self, us: Rows) -> None:
        """A writer that was replaced does not become the writer again."""
        draft = us.add("chat_drafts")
        for fencing_token in (2, 2, 9):
            us.set("chat_drafts", draft, fencing_token=fencing_token)
        for fencing_token in (8, 1):
            with rejected_by(CheckViolation, "chat_drafts_fencing_token_check"):
                us.set("chat_drafts", draft, fencing_token=fencing_token)

    def test_deleting_a_draft_deletes_its_pieces(self, us: Rows) -> None:
        """Those of other drafts stay, and its id is free."""
        draft = us.add("chat_draft_pieces")
        us.add("chat_draft_pieces", draft_id=draft, start_offset=5)
        us.add("chat_draft_pieces")
        us.delete("chat_drafts", draft)
        assert (us.count("chat_drafts"), us.count("chat_draft_pieces")) == (1, 1)
        us.add("chat_drafts", id=draft)
        us.delete("chat_drafts", draft)
        us.add("chat_messages", id=draft)


class TestIds:
    @pytest.mark.parametrize("same_session", [True, False])
    def test_draft_and_message_do_not_share_an_id(
        self, us: Rows, them: Rows, same_session: bool
    ) -> None:
        """In one session or two; another tenant can have it."""
        session = us.add("chat_sessions")
        other = session if same_session else us.add("chat_sessions")
        draft = us.add("chat_drafts", session_id=session)
        message = us.add("chat_messages", session_id=session)
        tombstone = us.add("chat_message_tombstones", session_id=session)
        with rejected_by(*OF_ANOTHER_DRAFT):
            us.add("chat_drafts", session_id=other, id=draft)
        with rejected_by(*OF_A_MESSAGE_OR_DRAFT):
            us.add("chat_messages", session_id=other, id=draft)
        for taken in (message, tombstone):
            with rejected_by(*OF_A_MESSAGE):
                us.add("chat_drafts", session_id=other, id=taken)
        them.add("chat_messages", id=draft)
        for taken in (message, tombstone):
            them.add("chat_drafts", id=taken)

    @pytest.mark.parametrize("count", [3, 1500])
    def test_one_of_several_messages_has_the_id_of_a_draft(self, us: Rows, count: int) -> None:
        """The statement inserts none of them."""
        draft, session = us.add("chat_drafts"), us.add("chat_sessions")
        values = {"tenant": us.tenant, "session": session, "id": draft, "count": count}
        with rejected_by(*OF_A_MESSAGE_OR_DRAFT):
            us.connection.execute(SAY_MUCH, values)
        assert us.count("chat_messages") == 0

    def test_draft_becomes_a_message_in_one_transaction(self, us: Rows) -> None:
        """Its id is the message's from then on. A rollback leaves the draft."""
        session = us.add("chat_sessions")
        draft = us.add("chat_drafts", session_id=session)
        values = {"tenant": us.tenant, "session": session, "id": draft}
        with contextlib.suppress(ZeroDivisionError), us.connection.transaction():
            us.connection.execute(DROP, values)
            us.connection.execute(SAY, values)
            raise ZeroDivisionError
        assert (us.count("chat_drafts"), us.count("chat_messages")) == (1, 0)
        with us.connection.transaction():
            us.connection.execute(DROP, values)
            us.connection.execute(SAY, values)
        assert (us.count("chat_drafts"), us.count("chat_messages")) == (0, 1)
        with rejected_by(*OF_A_MESSAGE):
            us.connection.execute(START, values)


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
    @pytest.mark.parametrize("same_session", [True, False], ids=["one session", "two sessions"])
    @pytest.mark.parametrize(
        ("is_draft", "first", "second", "refusal", "refusal_otherwise"),
        [
            pytest.param(False, [START], START, OF_ANOTHER_DRAFT, None, id="start, start"),
            pytest.param(False, [START], SAY, OF_A_MESSAGE_OR_DRAFT, None, id="start, say"),
            pytest.param(
                False, [START], SAY_MUCH, OF_A_MESSAGE_OR_DRAFT, None, id="start, say much"
            ),
            pytest.param(False, [SAY], START, OF_A_MESSAGE, None, id="say, start"),
            pytest.param(False, [SAY_MUCH], START, OF_A_MESSAGE, None, id="say much, start"),
            pytest.param(
                True, [DROP, SAY], START, OF_A_MESSAGE, OF_ANOTHER_DRAFT, id="finish, start"
            ),
            pytest.param(
                True,
                [DROP, SAY],
                SAY,
                OF_A_MESSAGE_OR_DRAFT,
                OF_A_MESSAGE_OR_DRAFT,
                id="finish, say",
            ),
        ],
    )
    def test_second_transaction_waits_and_sees_the_first(
        self,
        us: Rows,
        connect: Connect,
        is_draft: bool,
        first: list[LiteralString],
        second: LiteralString,
        refusal: tuple[type[psycopg.Error], str],
        refusal_otherwise: tuple[type[psycopg.Error], str] | None,
        same_session: bool,
        committed: bool,
    ) -> None:
        """It is rejected as if it had come later; a rollback of the first leaves it free."""
        session = us.add("chat_sessions")
        other = session if same_session else us.add("chat_sessions")
        values = {"tenant": us.tenant, "session": session, "id": uuid.uuid4(), "count": 1500}
        if is_draft:
            us.connection.execute(START, values)
        holder, waiter = connect(), connect()
        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            for statement in first:
                holder.execute(statement, values)
            waiting = pool.submit(waiter.execute, second, values | {"session": other})
            wait_until_blocked(us.connection, waiter)
            holder.execute("COMMIT" if committed else "ROLLBACK")
            rule = refusal if committed else refusal_otherwise
            with rejected_by(*rule) if rule else contextlib.nullcontext():
                waiting.result()

    def test_id_of_a_message_that_is_being_deleted(self, us: Rows, connect: Connect) -> None:
        """It belongs to the message until then, and to its tombstone afterwards."""
        session = us.add("chat_sessions")
        message = us.add("chat_messages", session_id=session)
        deleting = Rows(connect(), us.tenant)
        deleting.connection.execute("BEGIN")
        deleting.delete("chat_messages", message)
        deleting.add("chat_message_tombstones", session_id=session, message_id=message)
        with rejected_by(*OF_A_MESSAGE):
            us.add("chat_drafts", id=message)
        deleting.connection.execute("COMMIT")
        with rejected_by(*OF_A_MESSAGE):
            us.add("chat_drafts", id=message)

    def test_messages_and_drafts_with_other_ids_do_not_wait(
        self, us: Rows, connect: Connect
    ) -> None:
        """A transaction that stands still holds up nobody else, in no session and no tenant."""
        session = us.add("chat_sessions")
        values = {"tenant": us.tenant, "session": session, "count": 900}
        starting, saying = connect(), connect()
        starting.execute("BEGIN")
        starting.execute(START, values | {"id": uuid.uuid4()})
        saying.execute("BEGIN")
        saying.execute(SAY_MUCH, values | {"id": uuid.uuid4()})
        us.connection.execute("SET lock_timeout = '1ms'")
        values["session"] = us.add("chat_sessions")
        us.connection.execute(SAY_MUCH, values | {"id": uuid.uuid4()})
        for _ in range(100):
            us.connection.execute(START, values | {"id": uuid.uuid4()})

    def test_copy_of_many_messages_takes_few_locks(self, us: Rows) -> None:
        """PostgreSQL has room for some thousands, and ends the transaction beyond them."""
        session = us.add("chat_sessions")
        locks = "SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid()"
        columns = "tenant_id, session_id, sequence, revision, role, content"
        with us.connection.transaction(), us.connection.cursor() as cursor:
            with cursor.copy(f"COPY chat_messages ({columns}) FROM STDIN") as copy:
                for n in range(1, 5001):
                    copy.write_row([us.tenant, session, n, n, "user", "hello"])
            [[held]] = cursor.execute(locks).fetchall()
        assert 1000 < held < 1050
