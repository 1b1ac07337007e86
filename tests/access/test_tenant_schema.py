"""The schema keeps tenants apart, whatever SQL is sent."""

import asyncio

import psycopg
import pytest
from psycopg import sql
from psycopg.types.json import Jsonb
from support.client import Api
from support.plain_rows import Rows
from support.tenant_rows import TenantIds, TenantRows

FOREIGN_KEYS = """
SELECT conname, conrelid::regclass::text AS child, confrelid::regclass::text AS parent,
       array(SELECT ARRAY[c.attname, p.attname]::text[]
               FROM unnest(conkey, confkey) AS pair (child, parent)
               JOIN pg_attribute c ON c.attrelid = conrelid AND c.attnum = pair.child
               JOIN pg_attribute p ON p.attrelid = confrelid AND p.attnum = pair.parent)
  FROM pg_constraint
 WHERE contype = 'f' AND connamespace = 'public'::regnamespace
"""


UNIQUE_INDEXES = """
SELECT indrelid::regclass::text, indexrelid::regclass::text, indisprimary,
       array(SELECT attname::text FROM unnest(indkey) WITH ORDINALITY AS key (number, position)
               JOIN pg_attribute ON attrelid = indrelid AND attnum = number
              WHERE position <= indnkeyatts)
  FROM pg_index JOIN pg_class ON pg_class.oid = indrelid
 WHERE indisunique AND relnamespace = 'public'::regnamespace
"""


class TestSchema:
    def test_every_key_contains_the_tenant(self, rows: TenantRows) -> None:
        """Of every table, in the primary key and every other unique one; on both sides of each FK.

        And it is never NULL, which would let a foreign key go unchecked.
        """
        execute = rows.connection.execute
        primary = set()
        for table, index, is_primary, columns in execute(UNIQUE_INDEXES).fetchall():
            if table in rows.tables:
                assert "tenant_id" in columns, index
                primary |= {table} if is_primary else set()
        assert primary == {*rows.tables}
        for name, _, _, pairs in execute(FOREIGN_KEYS).fetchall():
            assert ["tenant_id", "tenant_id"] in pairs, name

    def test_every_reference_is_a_foreign_key(self, rows: TenantRows) -> None:
        """But for a tombstone's, whose row is gone, and for the caller's own ids."""
        referring = {
            (table, column)
            for table, columns in rows.tables.items()
            for column in columns
            if column.endswith("_id") and column != "tenant_id"
        }
        keys = rows.connection.execute(FOREIGN_KEYS).fetchall()
        foreign_keys = {(table, column) for _, table, _, pairs in keys for column, _ in pairs}
        assert referring - foreign_keys == {
            ("chat_session_tombstones", "session_id"),
            ("ticket_tombstones", "ticket_id"),
            ("chat_message_tombstones", "message_id"),
            ("chat_sessions", "user_id"),
            ("chat_messages", "author_id"),
            ("chat_drafts", "author_id"),
        }

    async def test_plain_sql_attaches_nothing_across_tenants(
        self, api: Api, other: Api, rows: TenantRows
    ) -> None:
        """No child gets a parent of another tenant, and no child moves to another tenant."""
        ours, theirs = TenantIds(api.tenant), TenantIds(other.tenant)
        await asyncio.gather(ours.make(api), theirs.make(other))
        for tenant in (ours.tenant, theirs.tenant):
            Rows(rows.connection, tenant).add("chat_draft_pieces")
        before = rows.of(ours.tenant, theirs.tenant)
        keys = rows.connection.execute(FOREIGN_KEYS).fetchall()
        assert keys
        for name, child, parent, pairs in keys:
            [(column, parent_id)] = (pair for pair in pairs if pair != ["tenant_id", "tenant_id"])
            of_theirs = sql.SQL("SELECT {} FROM {} WHERE tenant_id = %s LIMIT 1").format(
                sql.Identifier(parent_id), sql.Identifier(parent)
            )
            [foreign] = rows.connection.execute(of_theirs, [theirs.tenant]).fetchall()
            names = {"child": sql.Identifier(child), "column": sql.Identifier(column)}
            values = {"ours": ours.tenant, "theirs": theirs.tenant, "foreign": foreign[0]}
            with rows.connection.transaction(force_rollback=True):
                [[row]] = rows.connection.execute(sql.SQL(TAKE).format(**names), values).fetchall()
                values["row"] = Jsonb({**row, column: str(foreign[0])})
                with pytest.raises(psycopg.errors.ForeignKeyViolation) as caught:
                    rows.connection.execute(sql.SQL(PUT).format(**names), values)
            assert caught.value.diag.constraint_name == name
            for update in (ATTACH, MOVE):
                with pytest.raises(psycopg.errors.IntegrityError):
                    rows.connection.execute(sql.SQL(update).format(**names), values)
        assert rows.of(ours.tenant, theirs.tenant) == before


TAKE = """
DELETE FROM {child} WHERE ctid = (SELECT ctid FROM {child} WHERE tenant_id = %(ours)s LIMIT 1)
RETURNING to_jsonb({child})
"""


PUT = "INSERT INTO {child} SELECT (jsonb_populate_record(NULL::{child}, %(row)s)).*"
ATTACH = "UPDATE {child} SET {column} = %(foreign)s WHERE tenant_id = %(ours)s"
MOVE = "UPDATE {child} SET tenant_id = %(theirs)s WHERE tenant_id = %(ours)s"
