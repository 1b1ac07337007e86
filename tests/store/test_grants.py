"""The rights on new tables, of roles that serve and own no table."""

import uuid
from collections.abc import Callable

import psycopg
import pytest
from psycopg import sql
from support.cluster import Cluster
from support.migrations import roll_back_before

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
    ],
    ids=["drafts", "tombstones"],
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
