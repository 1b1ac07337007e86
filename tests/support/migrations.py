"""What migrations have made of a database."""

from typing import Any, LiteralString

import psycopg

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store.schema import MIGRATIONS

FILES = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
VERSIONS = [name.split("_")[0] for name in FILES]


def roll_back_before(url: str, version: str) -> None:
    """Take back the migration of this version, and those after it."""
    while applied(url)[-1:] >= [version]:
        assert migrate.dbmate(url, "rollback", quiet=True) == 0


def ask(url: str, statement: LiteralString) -> list[Any]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement).fetchall()


def catalog(url: str) -> list[str]:
    """All that is in a database, as definitions that can be compared with another's."""
    statement = """
        SELECT concat_ws(' ', relkind, relname, attname, attnotnull,
                         format_type(atttypid, atttypmod), attcollation::regcollation,
                         pg_get_expr(adbin, adrelid))
          FROM pg_class c
          LEFT JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped
          LEFT JOIN pg_attrdef ON adrelid = c.oid AND adnum = attnum
         WHERE relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid), convalidated)
          FROM pg_constraint WHERE connamespace = 'public'::regnamespace
         UNION ALL
        SELECT pg_get_indexdef(oid)
          FROM pg_class WHERE relkind = 'i' AND relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', pg_get_triggerdef(oid), tgenabled)
          FROM pg_trigger WHERE NOT tgisinternal
         UNION ALL
        SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace
         UNION ALL
        SELECT concat_ws(' ', typtype, typname)
          FROM pg_type WHERE typnamespace = 'public'::regnamespace
         UNION ALL
        SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'
         UNION ALL
        SELECT extname FROM pg_extension
    """
    return sorted(definition for (definition,) in ask(url, statement))


def ours(url: str) -> list[str]:
    """The catalog without the table that dbmate keeps."""
    return [definition for definition in catalog(url) if "schema_migrations" not in definition]


def applied(url: str) -> list[str]:
    return [row[0] for row in ask(url, "SELECT version FROM schema_migrations ORDER BY version")]
