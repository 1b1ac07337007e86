"""The columns of each entity, declared once, as annotations of the fields of its row.

A field is annotated with the SQL expression that reads it: `status: Annotated[str, "t.status"]`.
Every statement that returns the entity selects `column_list(Entity)`. So a new column is one new
field.
"""

from typing import Any, LiteralString, get_args, get_type_hints

# PostgreSQL's type ids. In binary format, a timestamp can be read as an integer, and text as bytes.
BOOL, BYTES, INTEGER, TEXT = 16, 17, 20, 25

_TYPE_IDS = {bool: BOOL, int: INTEGER, str: TEXT}


def microseconds(column: LiteralString) -> LiteralString:
    """A timestamp column as microseconds since the Unix epoch."""
    return f"(extract(epoch FROM {column}) * 1000000)::bigint"


def columns(entity: type) -> dict[str, LiteralString]:
    """The SQL expression of each field, in order."""
    hints: dict[str, Any] = get_type_hints(entity, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items()}


def column_list(entity: type) -> LiteralString:
    """The SQL expressions of all fields, in order, for SELECT or RETURNING.

    They have no aliases, so `ORDER BY created_at` sorts by the table's column and uses its index.
    """
    return ", ".join(columns(entity).values())


def type_ids(entity: type) -> tuple[int, ...]:
    """The types to decode the columns as, for `fetch_typed`."""
    kinds = ((get_args(hint) or (hint,))[0] for hint in get_type_hints(entity).values())
    return tuple(_TYPE_IDS[kind] for kind in kinds)
