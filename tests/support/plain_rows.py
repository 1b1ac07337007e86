"""Rows written by plain SQL, which bypasses the service."""

import contextlib
import itertools
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql

# What Rows.add returns of a table that has no id of its own.
ID_COLUMNS = {
    "chat_session_tombstones": "session_id",
    "ticket_tombstones": "ticket_id",
    "chat_message_tombstones": "message_id",
    "chat_draft_pieces": "draft_id",
}

# Each table's parents, by the column that holds their id.
PARENTS = {
    "chat_sessions": {},
    "chat_session_tombstones": {},
    "ticket_tombstones": {},
    "chat_messages": {"session_id": "chat_sessions"},
    "chat_message_tombstones": {"session_id": "chat_sessions"},
    "chat_attachments": {"message_id": "chat_messages"},
    "tickets": {},
    "chat_tickets": {"session_id": "chat_sessions", "ticket_id": "tickets"},
    "chat_drafts": {"session_id": "chat_sessions"},
    "chat_draft_pieces": {"draft_id": "chat_drafts"},
}


Connect = Callable[[], psycopg.Connection[Any]]


class Rows:
    """A tenant's rows, written by plain SQL."""

    def __init__(self, connection: psycopg.Connection[Any], tenant: str):
        self.connection = connection
        self.tenant = tenant
        self._numbers = itertools.count(1)

    def add(self, table: str, **columns: Any) -> uuid.UUID:
        """Insert a row and return its id. Missing columns and parents get valid values."""
        for column, parent in PARENTS[table].items():
            if column not in columns:
                columns[column] = self.add(parent)
        row = {"tenant_id": self.tenant, **self._others(table), **columns}
        statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) RETURNING {}").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, row)),
            sql.SQL(", ").join(map(sql.Placeholder, row)),
            sql.Identifier(ID_COLUMNS.get(table, "id")),
        )
        return self.connection.execute(statement, row).fetchone()[0]  # type: ignore[index,no-any-return]

    def _others(self, table: str) -> dict[str, Any]:
        """The columns that have no default, besides those of PARENTS."""
        number = next(self._numbers)
        match table:
            case "chat_session_tombstones" | "ticket_tombstones":
                return {ID_COLUMNS[table]: uuid.uuid4()}
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
            case "chat_drafts":
                expires_at = "2999-01-01Z"
                return {"id": uuid.uuid4(), "role": "assistant", "expires_at": expires_at}
            case "chat_draft_pieces":
                return {"start_offset": 0, "content": "hello"}
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
        """The sessions whose has_ticket does not match their links."""
        statement = """
            SELECT id FROM chat_sessions s
             WHERE tenant_id = %s AND has_ticket <> EXISTS (
                SELECT FROM chat_tickets WHERE tenant_id = s.tenant_id AND session_id = s.id)
        """
        return self.connection.execute(statement, [self.tenant]).fetchall()


@contextlib.contextmanager
def rejected_by(kind: type[psycopg.Error], name: str) -> Iterator[None]:
    """Expects a statement to be rejected with this SQLSTATE by this constraint (or NOT NULL)."""
    with pytest.raises(psycopg.Error) as caught:
        yield
    diag = caught.value.diag
    assert (diag.sqlstate, diag.constraint_name or diag.column_name) == (kind.sqlstate, name)
