"""The columns of an entity are declared once, as annotations of its fields."""

from typing import Annotated, NamedTuple

import pytest

from chat_ticket_svc.store.columns import BOOL, INTEGER, TEXT, column_list, microseconds, type_ids


class Note(NamedTuple):
    """An entity with a column of each kind."""

    id: Annotated[str, "n.id::text"]
    text: Annotated[str | None, "n.text"]
    is_read: Annotated[bool, "n.is_read"]
    created_at: Annotated[int, microseconds("n.created_at")]


def test_columns_are_in_the_order_of_the_fields() -> None:
    """A row of the statement is the arguments of the entity."""
    assert column_list(Note) == (
        "n.id::text, n.text, n.is_read, (extract(epoch FROM n.created_at) * 1000000)::bigint"
    )


def test_types_follow_from_the_fields() -> None:
    """A nullable column has the type of its value."""
    assert type_ids(Note) == (TEXT, TEXT, BOOL, INTEGER)


def test_field_without_a_column_is_an_error() -> None:
    """The module does not import, so the field cannot be forgotten in one statement."""

    class Incomplete(NamedTuple):
        id: Annotated[str, "n.id::text"]
        text: str

    with pytest.raises(AttributeError):
        column_list(Incomplete)
