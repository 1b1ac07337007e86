"""The collation of the tenant's columns, which an operator may change."""

from collections.abc import Callable
from typing import Any

import psycopg
from support.migrations import ask, ours
from support.plain_rows import Rows
from support.sessions import get_session

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.connection import connection_string


class TestCollation:
    COLLATIONS = """
        SELECT DISTINCT collname::text FROM pg_attribute
          JOIN pg_class c ON c.oid = attrelid JOIN pg_collation k ON k.oid = attcollation
         WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attname = 'tenant_id'
    """

    def test_empty_tables_order_tenants_by_bytes(self, database: str) -> None:
        """Every index that starts with the tenant is in an order that no library changes."""
        assert ask(database, self.COLLATIONS) == [("C",)]

    def test_servers_that_run_keep_their_prepared_statements(self, fresh_database: str) -> None:
        """The migration leaves the tables of a server that may have prepared reads of them."""
        while ask(fresh_database, self.COLLATIONS) != [("default",)]:
            assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        with psycopg.connect(connection_string(fresh_database), autocommit=True) as connection:
            tenants = "SELECT tenant_id FROM chat_sessions"
            connection.execute(tenants, prepare=True)
            assert migrate.up(fresh_database, quiet=True) == 0
            connection.execute(tenants)

    async def test_tables_with_rows_change_when_an_operator_says_so(
        self, fresh_database: str, start_server: Callable[..., Any]
    ) -> None:
        """The migration leaves them. The servers of this version go on when they are changed."""
        while ask(fresh_database, self.COLLATIONS) != [("default",)]:
            assert migrate.dbmate(fresh_database, "rollback", quiet=True) == 0
        with psycopg.connect(fresh_database, autocommit=True) as connection:
            Rows(connection, "somebody").add("chat_sessions")
            assert migrate.up(fresh_database, quiet=True) == 0
            assert ask(fresh_database, self.COLLATIONS) == [("default",)]
            # Of somebody else.
            connection.execute("CREATE TABLE strange (tenant_id uuid)")
            before = ours(fresh_database)
            api = await start_server(fresh_database, pool_size=1)
            session = await api.session()
            for change in ("C", "default", "C"):
                assert await get_session(api, session.id) == session
                connection.execute("SELECT set_tenant_collation(%s)", [change])
                assert (ours(fresh_database) == before) == (change == "default")
            assert await get_session(api, session.id) == session
            await api.message(session.id, "hello")
            connection.execute("DROP TABLE strange")
        assert ask(fresh_database, self.COLLATIONS) == [("C",)]
