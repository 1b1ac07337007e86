"""The rights on new tables, of roles that serve and own no table."""

import uuid
from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql
from psycopg.errors import InsufficientPrivilege
from support.cluster import Cluster
from support.migrations import roll_back_before
from support.plain_rows import Rows

from chat_ticket_svc.commands import migrate

GRANTED = """
SELECT DISTINCT grantee::text, privilege_type::text, is_grantable::text
  FROM information_schema.role_table_grants
 WHERE table_name = %s AND grantee = ANY (%s)
"""


@pytest.mark.parametrize(
    ("version", "tables"),
    [
        ("20261130050000", ("chat_drafts", "chat_draft_pieces")),
        ("20261130130300", ("chat_session_tombstones",)),
        ("20261130153000", ("chat_epochs", "ticket_tombstones")),
    ],
    ids=["drafts", "tombstones", "feed"],
)
def test_new_tables_have_the_rights_of_sessions(
    of: Callable[[str], Cluster], version: str, tables: tuple[str, ...]
) -> None:
    """The migration gives them to the roles that have them, with the option to grant or without."""
    cluster = of("cluster")
    url = cluster.create()
    roles = [f"role {uuid.uuid4().hex}" for _ in range(2)]
    roll_back_before(url, version)
    with psycopg.connect(url, autocommit=True) as connection:
        serves, grants = map(sql.Identifier, roles)
        connection.execute(sql.SQL("CREATE ROLE {}").format(serves))
        connection.execute(sql.SQL("CREATE ROLE {}").format(grants))
        connection.execute(
            sql.SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON chat_sessions TO {}").format(serves)
        )
        connection.execute(
            sql.SQL("GRANT SELECT ON chat_sessions TO {} WITH GRANT OPTION").format(grants)
        )
        assert migrate.up(url, quiet=True) == 0
        expected = connection.execute(GRANTED, ["chat_sessions", roles]).fetchall()
        assert len(expected) == 5
        for table in tables:
            found = connection.execute(GRANTED, [table, roles]).fetchall()
            assert sorted(found) == sorted(expected)
    cluster.drop(url)
    for role in roles:
        cluster.execute(f'DROP ROLE "{role}"')


def test_role_that_serves_begins_epochs_only_when_they_have_begun(
    of: Callable[[str], Cluster],
) -> None:
    """Its first write after a restore begins one, with the rights of the owner. None by hand."""
    cluster = of("cluster")
    url = cluster.create()
    role = f"role {uuid.uuid4().hex}"
    serves = sql.Identifier(role)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {}").format(serves))
        connection.execute(
            sql.SQL(
                "GRANT SELECT, INSERT, UPDATE, DELETE ON chat_sessions, chat_session_tombstones,"
                " tickets, ticket_tombstones TO {}"
            ).format(serves)
        )
        connection.execute(sql.SQL("GRANT SELECT, UPDATE ON chat_epochs TO {}").format(serves))
        # Of a clone: it is another database than that of the last epoch.
        [(last,)] = connection.execute("SELECT max(ordinal) FROM chat_epochs").fetchall()
        connection.execute(sql.SQL("SET ROLE {}").format(serves))
        us = Rows(connection, "us")
        session = us.add("chat_sessions")
        us.delete("tickets", us.add("tickets"))
        us.set("chat_sessions", session, revision=1)
        assert connection.execute(
            "SELECT ordinal, feed_position >> 48 FROM chat_epochs"
            " JOIN chat_sessions ON right(epoch, 16) = chat_epochs.id"
        ).fetchall() == [(last + 1, last + 1)]
        for statement in (
            "SELECT begin_chat_epoch()",
            "INSERT INTO chat_epochs (ordinal, identity, table_oid) VALUES (99, '', 0)",
        ):
            with pytest.raises(InsufficientPrivilege):
                connection.execute(statement)
    cluster.drop(url)
    cluster.execute(f'DROP ROLE "{role}"')
