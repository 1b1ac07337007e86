"""A redacted message has nothing, for ever: the rules hold against plain SQL and in races."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg.errors import CheckViolation, InvalidParameterValue
from psycopg.types.json import Jsonb
from support.database import wait_until_blocked
from support.plain_rows import Connect, Rows, rejected_by

MARK = "[redacted]"
REDACTED = {"redacted": True, "content": MARK, "metadata": None}
NOT_CHANGED = (InvalidParameterValue, "chat_messages_redacted_check")
NO_ATTACHMENT = (InvalidParameterValue, "chat_attachments_redacted_check")

# As the service does: each transaction first locks the session.
LOCK = "SELECT FROM chat_sessions WHERE tenant_id = %(tenant)s AND id = %(session)s FOR UPDATE"
REDACT = """
WITH deleted AS (
    DELETE FROM chat_attachments WHERE tenant_id = %(tenant)s AND message_id = %(message)s
)
UPDATE chat_messages SET redacted = true, content = '[redacted]', metadata = NULL
 WHERE tenant_id = %(tenant)s AND id = %(message)s
"""
# In one statement, as in CreateChatAttachment: its snapshot is older than the lock it waits for.
ATTACH = """
WITH session AS (
    UPDATE chat_sessions SET revision = revision + 1
     WHERE tenant_id = %(tenant)s AND id = %(session)s
    RETURNING tenant_id
)
INSERT INTO chat_attachments (tenant_id, message_id, file_url, file_name, file_type)
SELECT tenant_id, %(message)s, 'https://files.example/a', 'a', 'text/plain' FROM session
"""


class TestRedaction:
    @pytest.mark.parametrize(
        "columns",
        [
            REDACTED | {"content": "hello"},
            REDACTED | {"metadata": Jsonb({})},
            {"redacted": True},
        ],
    )
    def test_redacted_message_has_the_mark_alone(self, us: Rows, columns: dict[str, Any]) -> None:
        """Neither content nor metadata."""
        message = us.add("chat_messages", metadata=Jsonb({"a": 1}))
        with rejected_by(CheckViolation, "chat_messages_redacted_check"):
            us.add("chat_messages", **columns)
        with rejected_by(CheckViolation, "chat_messages_redacted_check"):
            us.set("chat_messages", message, **columns)
        us.set("chat_messages", message, **REDACTED)

    def test_mark_alone_redacts_nothing(self, us: Rows) -> None:
        """It is a text that anybody may write."""
        message = us.add("chat_messages", content=MARK, metadata=Jsonb({"a": 1}))
        us.add("chat_attachments", message_id=message)
        us.set("chat_messages", message, metadata=Jsonb({"a": 2}))

    @pytest.mark.parametrize(
        "columns",
        [
            {"redacted": False},
            {"redacted": False, "content": "hello"},
            {"content": "hello"},
            {"metadata": Jsonb({"a": 1})},
        ],
    )
    def test_redaction_is_for_ever(self, us: Rows, columns: dict[str, Any]) -> None:
        """An older server answers with INVALID_ARGUMENT, as it maps data exceptions to it."""
        message = us.add("chat_messages", **REDACTED)
        with rejected_by(*NOT_CHANGED):
            us.set("chat_messages", message, **columns)
        us.set("chat_messages", message, **REDACTED)
        us.set("chat_messages", message, search_language="german", revision=1000)

    def test_redacted_message_takes_no_attachment(self, us: Rows, them: Rows) -> None:
        """Neither a new one nor that of another message. Another tenant's message is another."""
        message = us.add("chat_messages", **REDACTED)
        them.add("chat_attachments", message_id=them.add("chat_messages", id=message))
        attachment = us.add("chat_attachments")
        with rejected_by(*NO_ATTACHMENT):
            us.add("chat_attachments", message_id=message)
        with rejected_by(*NO_ATTACHMENT):
            us.set("chat_attachments", attachment, message_id=message)
        us.set("chat_attachments", attachment, file_url="https://files.example/b")


class TestRaces:
    @pytest.mark.parametrize("committed", [True, False], ids=["committed", "rolled back"])
    @pytest.mark.parametrize(
        ("first", "second", "refusal"),
        [
            pytest.param([LOCK, REDACT], [ATTACH], NO_ATTACHMENT, id="redact, attach"),
            pytest.param([ATTACH], [LOCK, REDACT], None, id="attach, redact"),
        ],
    )
    def test_attachment_and_redaction_at_once(
        self,
        us: Rows,
        connect: Connect,
        first: list[LiteralString],
        second: list[LiteralString],
        refusal: tuple[type[psycopg.Error], str] | None,
        committed: bool,
    ) -> None:
        """In either order, no redacted message has an attachment."""
        message = us.add("chat_messages", session_id=(session := us.add("chat_sessions")))
        values = {"tenant": us.tenant, "session": session, "message": message}
        holder, waiter = connect(), connect()

        def run(connection: psycopg.Connection[Any], statements: list[LiteralString]) -> None:
            with connection.transaction():
                for statement in statements:
                    connection.execute(statement, values)

        with ThreadPoolExecutor(1) as pool:
            holder.execute("BEGIN")
            for statement in first:
                holder.execute(statement, values)
            waiting = pool.submit(run, waiter, second)
            wait_until_blocked(us.connection, waiter)
            holder.execute("COMMIT" if committed else "ROLLBACK")
            with rejected_by(*refusal) if committed and refusal else contextlib.nullcontext():
                waiting.result()
        [[redacted]] = us.connection.execute(
            "SELECT redacted FROM chat_messages WHERE tenant_id = %(tenant)s", values
        ).fetchall()
        assert redacted == (committed or second == [LOCK, REDACT])
        assert us.count("chat_attachments") == (0 if redacted else 1)


def test_temporary_table_hides_no_redaction(us: Rows) -> None:
    """The rule looks at the service's messages, whatever the session has."""
    message = us.add("chat_messages", **REDACTED)
    us.connection.execute("CREATE TEMP TABLE chat_messages (LIKE public.chat_messages)")
    with rejected_by(*NO_ATTACHMENT):
        us.add("chat_attachments", message_id=message)
