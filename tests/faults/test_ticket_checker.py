"""The checker of tickets finds what it must, in what their callers were told."""

from collections import defaultdict
from typing import Any, NamedTuple

import pytest
from grpc import StatusCode

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateChatTicketRequest,
    DeleteChatTicketRequest,
    DeleteTicketRequest,
    UpdateTicketRequest,
)
from faults.checker import Stored, check_ticket
from faults.record import Attempt, Write


class Row(NamedTuple):
    """A ticket, or a link of it, as the checker reads it."""

    id: str
    title: str = "help"
    status: str = "open"
    revision: int = 0


LINK = Row("link")


def write(kind: str, request: Any, code: StatusCode = StatusCode.OK) -> Write:
    attempts = [Attempt(began=0, ended=1, code=code)]
    return Write(kind=kind, tenant="t", session_id="s", request=request, attempts=attempts)


def update(title: str, code: StatusCode = StatusCode.OK) -> Write:
    ticket = r.Ticket(id="1", title=title, status=r.TICKET_STATUS_SOLVED)
    return write("UpdateTicket", UpdateTicketRequest(ticket=ticket), code)


CREATE = write(
    "CreateChatTicket",
    CreateChatTicketRequest(chat_ticket_id="link", ticket=r.Ticket(id="1", title="help")),
)
UNLINK = write("DeleteChatTicket", DeleteChatTicketRequest())
DELETE = write("DeleteTicket", DeleteTicketRequest())
LOST = StatusCode.DEADLINE_EXCEEDED  # its outcome is not known


def violations(writes: list[Write], ticket: Row | None, *links: Row) -> str:
    stored = Stored({}, defaultdict(list), {"s": Row("s")}, list(links), {})
    if ticket is not None:
        stored.tickets["1"] = ticket
    return str([each.text for each in check_ticket(CREATE, [CREATE, *writes], stored)])


@pytest.mark.parametrize(
    ("writes", "ticket", "links"),
    [
        ([], Row("1"), [LINK]),
        ([update("a")], Row("1", "a", "solved", 1), [LINK]),
        ([update("a"), update("b", LOST)], Row("1", "a", "solved", 1), [LINK]),
        ([update("a"), update("b", LOST)], Row("1", "b", "solved", 2), [LINK]),
        ([update("a", StatusCode.NOT_FOUND)], Row("1"), [LINK]),
        ([UNLINK], Row("1"), []),
        ([UNLINK, DELETE], None, []),
    ],
)
def test_ticket_is_as_its_caller_made_it(
    writes: list[Write], ticket: Row | None, links: list[Row]
) -> None:
    """With the last change that was acknowledged, or one after it whose outcome is unknown."""
    assert violations(writes, ticket, *links) == "[]"


@pytest.mark.parametrize(
    ("writes", "ticket", "links", "found"),
    [
        ([], Row("1"), [], "the ticket of session s is lost"),
        ([], None, [LINK], "ticket 1 is lost"),
        ([UNLINK], Row("1"), [LINK], "is linked, and was unlinked"),
        ([UNLINK, DELETE], Row("1"), [], "is there, and was deleted"),
        ([update("a")], Row("1"), [LINK], "is not as it was acknowledged"),
        ([update("a"), update("b")], Row("1", "a", "solved", 1), [LINK], "is not as it was ackno"),
        ([update("a", StatusCode.NOT_FOUND)], Row("1", "a"), [LINK], "is not as it was ackno"),
        ([update("a"), update("b")], Row("1", "b", "solved", 1), [LINK], "has too few revisions"),
    ],
)
def test_checker_finds_a_wrong_ticket(
    writes: list[Write], ticket: Row | None, links: list[Row], found: str
) -> None:
    """A link, a ticket or a change that is lost, or that was refused or undone and is there."""
    assert found in violations(writes, ticket, *links)
