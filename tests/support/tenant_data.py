"""What the commands that export, erase or expire data work on, and what they print."""

import contextlib
import json
import os
import pty
import termios
from collections.abc import Iterator
from typing import Any

import psycopg
from google.protobuf.json_format import ParseDict

from chat_ticket.v1 import resources_pb2 as r
from support.process import Finished

TABLES = (
    "chat_sessions",
    "chat_messages",
    "chat_message_tombstones",
    "chat_attachments",
    "chat_tickets",
    "tickets",
    "chat_drafts",
    "chat_draft_pieces",
    "tenant_settings",
)
KINDS = {
    "ticket": r.Ticket,
    "chatSession": r.ChatSession,
    "chatMessage": r.ChatMessage,
    "chatTicket": r.ChatTicket,
}


def parsed(done: Finished) -> list[Any]:
    """The messages of the lines of an export."""
    found = []
    for line in done.output.splitlines():
        [(kind, fields)] = json.loads(line).items()
        found.append(ParseDict(fields, KINDS[kind]()))
    return found


def counts(database: str, tenant: str) -> dict[str, int]:
    with psycopg.connect(database) as connection:
        return {
            table: connection.execute(
                f"SELECT count(*) FROM {table} WHERE tenant_id = %s", [tenant]
            ).fetchone()[0]
            for table in TABLES
        }


def session_of(database: str, tenant: str, user_id: str | None) -> str:
    """A new session of a user, or of nobody."""
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "INSERT INTO chat_sessions (tenant_id, user_id) VALUES (%s, %s) RETURNING id::text",
            [tenant, user_id],
        ).fetchone()
    assert row is not None
    return str(row[0])


def many_messages(database: str, tenant: str, session_id: str, count: int) -> None:
    """As the service stores them, but faster."""
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO chat_messages (tenant_id, id, session_id, sequence, revision, role,"
            " content) SELECT %s, gen_random_uuid(), %s, n, n, 'user', 'message ' || n"
            " FROM generate_series(1, %s) n",
            [tenant, session_id, count],
        )
        connection.execute(
            "UPDATE chat_sessions SET revision = %s WHERE tenant_id = %s AND id = %s",
            [count, tenant, session_id],
        )


@contextlib.contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    os.set_blocking(ours, False)
    try:
        yield ours, theirs
    finally:
        os.close(ours)
        os.close(theirs)
