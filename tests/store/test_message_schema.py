"""The rules of authors and of redaction hold against plain SQL, in messages and in drafts."""

import uuid

import pytest
from psycopg.errors import CheckViolation, InvalidParameterValue
from psycopg.types.json import Jsonb
from support.plain_rows import Rows, rejected_by

KINDS = ("end_user", "ai_agent", "human_agent")
MARK = "[redacted]"


def redacted_message(us: Rows) -> uuid.UUID:
    message = us.add("chat_messages", metadata=Jsonb({"a": 1}))
    us.set("chat_messages", message, content=MARK, metadata=None, redacted=True)
    return message


@pytest.mark.parametrize("table", ["chat_messages", "chat_drafts"])
class TestAuthor:
    def test_good_authors_are_stored(self, us: Rows, table: str) -> None:
        """With a kind, an id, both or neither."""
        for kind in (None, *KINDS):
            for author_id in (None, "a", "é b", "x" * 255):
                us.add(table, author_kind=kind, author_id=author_id)

    def test_bad_author_is_rejected(self, us: Rows, table: str) -> None:
        """Other kinds, and ids that are empty, too long or not of one line."""
        for kind in ("", "bot", "END_USER"):
            with rejected_by(CheckViolation, f"{table}_author_kind_check"):
                us.add(table, author_kind=kind)
        for author_id in ("", "x" * 256):
            with rejected_by(CheckViolation, f"{table}_author_id_check"):
                us.add(table, author_id=author_id)
        for author_id in ("a\nb", " a", "a\u2028b", "a\u202eb"):
            with rejected_by(InvalidParameterValue, f"{table}_author_id_check"):
                us.add(table, author_id=author_id)

    def test_author_does_not_change(self, us: Rows, table: str) -> None:
        """It is not set later either, nor removed."""
        anonymous = us.add(table)
        known = us.add(table, author_kind="end_user", author_id="ann")
        for row, column, value in (
            (anonymous, "author_kind", "end_user"),
            (anonymous, "author_id", "ann"),
            (known, "author_kind", "ai_agent"),
            (known, "author_kind", None),
            (known, "author_id", "bob"),
            (known, "author_id", None),
        ):
            with rejected_by(CheckViolation, f"{table}_keys_check"):
                us.set(table, row, **{column: value})
        us.set(table, known, author_kind="end_user", author_id="ann")


class TestRedaction:
    """A change is a data exception, which an older server answers with INVALID_ARGUMENT."""

    def test_redacted_message_says_nothing(self, us: Rows) -> None:
        """Only the mark, and no metadata."""
        for fields in ({"content": "x"}, {"content": MARK, "metadata": Jsonb({})}):
            with rejected_by(CheckViolation, "chat_messages_redacted_check"):
                us.add("chat_messages", redacted=True, **fields)
            with rejected_by(CheckViolation, "chat_messages_redacted_check"):
                us.set("chat_messages", us.add("chat_messages"), redacted=True, **fields)
            with rejected_by(InvalidParameterValue, "chat_messages_redacted_check"):
                us.set("chat_messages", redacted_message(us), **fields)

    def test_message_is_not_made_whole_again(self, us: Rows) -> None:
        """That is for ever; and a redacted message can be deleted."""
        message = redacted_message(us)
        with rejected_by(InvalidParameterValue, "chat_messages_redacted_check"):
            us.set("chat_messages", message, redacted=False)
        us.set("chat_messages", message, redacted=True)
        us.delete("chat_messages", message)

    def test_takes_no_attachment(self, us: Rows) -> None:
        """Another message does."""
        with rejected_by(InvalidParameterValue, "chat_attachments_redacted_check"):
            us.add("chat_attachments", message_id=redacted_message(us))
        attachment = us.add("chat_attachments")
        with rejected_by(InvalidParameterValue, "chat_attachments_redacted_check"):
            us.set("chat_attachments", attachment, message_id=redacted_message(us))
