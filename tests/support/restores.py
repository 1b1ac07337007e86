"""What a restore from a backup does to a session, in one transaction of plain SQL."""

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg

from chat_ticket.v1 import resources_pb2 as r


@contextlib.contextmanager
def restoring(database: str, backup: r.ChatSession) -> Iterator[psycopg.Connection[Any]]:
    """A session goes back to its revision in `backup`, and an epoch begins.

    What is done on the connection counts as done after the restore. No server is notified.
    """
    params = {
        "tenant_id": backup.tenant_id,
        "id": backup.id,
        "revision": backup.revision,
        "epoch": backup.epoch,
    }
    with psycopg.connect(database) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")  # without triggers
        connection.execute(
            "DELETE FROM chat_messages WHERE tenant_id = %(tenant_id)s AND session_id = %(id)s"
            " AND sequence > %(revision)s",
            params,
        )
        connection.execute(
            "UPDATE chat_sessions SET revision = %(revision)s, epoch = %(epoch)s"
            " WHERE tenant_id = %(tenant_id)s AND id = %(id)s",
            params,
        )
        connection.execute("SET LOCAL session_replication_role = origin")
        connection.execute("SELECT begin_chat_epoch()")
        yield connection


def restore(database: str, backup: r.ChatSession) -> None:
    """Take a session back to its revision in `backup`, and begin an epoch."""
    with restoring(database, backup):
        pass


def begin_epoch(database: str) -> None:
    with psycopg.connect(database) as connection:
        connection.execute("SELECT begin_chat_epoch()")
