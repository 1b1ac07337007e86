"""The rules of users, titles, labels, authors and external references hold against plain SQL."""

from typing import Any

import pytest
from psycopg.errors import CheckViolation, InvalidParameterValue, UniqueViolation
from psycopg.types.json import Jsonb
from support.plain_rows import Rows, rejected_by

IMMUTABLE = [
    ("chat_sessions", "user_id"),
    ("chat_messages", "author_id"),
    ("chat_drafts", "author_id"),
]
MUTABLE = [("chat_sessions", "title"), ("tickets", "external_ref")]
BAD_LINES = ["a\nb", "\x01", "a\x7f", "\x85", "a\u2028b", " ", " a", "a ", "a\u202eb", "\u2066"]


class TestLines:
    @pytest.mark.parametrize(("table", "column"), [*IMMUTABLE, *MUTABLE])
    def test_text_is_of_one_line(self, us: Rows, table: str, column: str) -> None:
        """In any script, without blanks at its ends, and with directions in pairs."""
        row = us.add(table, **{column: "Ünal & \u202aनमस्ते\u202c 🙂"})
        for value in BAD_LINES:
            with rejected_by(InvalidParameterValue, f"{table}_{column}_check"):
                us.add(table, **{column: value})
            if (table, column) in MUTABLE:
                with rejected_by(InvalidParameterValue, f"{table}_{column}_check"):
                    us.set(table, row, **{column: value})
        with rejected_by(CheckViolation, f"{table}_{column}_check"):
            us.add(table, **{column: ""})

    @pytest.mark.parametrize(("table", "column"), [*IMMUTABLE, ("tickets", "external_ref")])
    def test_id_has_at_most_255_characters(self, us: Rows, table: str, column: str) -> None:
        """Whatever their bytes."""
        us.add(table, **{column: "é" * 255})
        with rejected_by(CheckViolation, f"{table}_{column}_check"):
            us.add(table, **{column: "é" * 256})

    @pytest.mark.parametrize(("table", "column"), IMMUTABLE)
    def test_session_stays_with_its_user_and_message_with_its_author(
        self, us: Rows, table: str, column: str
    ) -> None:
        """Also if it has none. Setting it to what it is changes nothing."""
        for before, after in (("a", "b"), ("a", None), (None, "b")):
            row = us.add(table, **{column: before})
            us.set(table, row, **{column: before})
            with rejected_by(CheckViolation, f"{table}_keys_check"):
                us.set(table, row, **{column: after})

    @pytest.mark.parametrize(("table", "column"), MUTABLE)
    def test_title_and_external_reference_may_change(
        self, us: Rows, table: str, column: str
    ) -> None:
        """And be removed."""
        row = us.add(table)
        for value in ("a", "b", None):
            us.set(table, row, **{column: value})


class TestLabels:
    @pytest.mark.parametrize(
        "labels",
        [
            {},
            [],
            "text",
            1,
            True,
            None,
            {"a": 1},
            {"a": None},
            {"a": {"b": "c"}},
            {"a": ["b"]},
            {"": "empty key"},
            {"k" * 64: "long key"},
            *({key: "bad key"} for key in ("A", "é", "a b", "a=b", "a\nb", "a\n", "a:b", "*")),
            {"a": "é" * 256},
            *({"a": value} for value in ("\x01", "a\nb", "\x7f", "\x85", "\u2028", "a\t")),
            {f"k{n}": "" for n in range(33)},
        ],
        ids=repr,
    )
    def test_bad_labels_are_rejected(self, us: Rows, labels: Any) -> None:
        """As a data exception, alone and among good ones."""
        session = us.add("chat_sessions")
        refusal = (InvalidParameterValue, "chat_sessions_labels_check")
        with rejected_by(*refusal):
            us.add("chat_sessions", labels=Jsonb(labels))
        with rejected_by(*refusal):
            us.set("chat_sessions", session, labels=Jsonb(labels))
        if isinstance(labels, dict) and labels:
            with rejected_by(*refusal):
                us.set("chat_sessions", session, labels=Jsonb(labels | {"good": "one"}))

    def test_good_labels_are_stored(self, us: Rows) -> None:
        """At most 32, with all characters of keys, and any text of at most 255 characters."""
        labels = {f"team/k-{n}.b_c": "é" * 255 for n in range(30)} | {
            "k" * 63: "",
            "0": " =🙂\u202e",
        }
        session = us.add("chat_sessions", labels=Jsonb(labels))
        for change in ({"a": "b"}, labels):
            us.set("chat_sessions", session, labels=Jsonb(change))
        us.set("chat_sessions", session, labels=None)

    def test_label_is_found_in_its_tenant_alone(self, us: Rows, them: Rows) -> None:
        """A tenant's label is no other tenant's, whatever the label and the tenant are called."""
        found = us.add("chat_sessions", labels=Jsonb({"a": "b=c", "other": "x"}))
        us.add("chat_sessions", labels=Jsonb({"a": "b"}))
        us.add("chat_sessions", labels=Jsonb({"other": "a=b=c"}))
        them.add("chat_sessions", labels=Jsonb({"a": "b=c"}))
        statement = """
            SELECT id FROM chat_sessions
             WHERE label_pairs(tenant_id COLLATE "C", labels)
                   @> label_pairs(%s::text COLLATE "C", %s) AND labels IS NOT NULL
        """
        us.connection.execute("SET enable_seqscan = off")
        rows = us.connection.execute(statement, [us.tenant, Jsonb({"a": "b=c"})]).fetchall()
        assert rows == [(found,)]


class TestAuthors:
    @pytest.mark.parametrize("table", ["chat_messages", "chat_drafts"])
    def test_kinds(self, us: Rows, table: str) -> None:
        """Three are known. The kind does not change, and needs no id."""
        row = us.add(table)
        for kind in ("end_user", "ai_agent", "human_agent"):
            us.add(table, author_kind=kind)
            with rejected_by(CheckViolation, f"{table}_keys_check"):
                us.set(table, row, author_kind=kind)
        for kind in ("", "End_User", "unset"):
            with rejected_by(CheckViolation, f"{table}_author_kind_check"):
                us.add(table, author_kind=kind)


class TestExternalReferences:
    def test_reference_is_unique_in_its_tenant(self, us: Rows, them: Rows) -> None:
        """Any number of tickets have none, and another tenant can have the same one."""
        ticket, other = us.add("tickets", external_ref="ZD-1"), us.add("tickets")
        us.add("tickets")
        them.add("tickets", external_ref="ZD-1")
        us.add("tickets", external_ref="zd-1")
        with rejected_by(UniqueViolation, "idx_tickets_external_ref"):
            us.add("tickets", external_ref="ZD-1")
        with rejected_by(UniqueViolation, "idx_tickets_external_ref"):
            us.set("tickets", other, external_ref="ZD-1")
        us.set("tickets", ticket, external_ref=None)
        us.set("tickets", other, external_ref="ZD-1")
