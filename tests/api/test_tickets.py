"""Tickets and chat tickets through the API."""

import asyncio
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.sessions import ARCHIVED, delete_session, get_session, set_status
from support.tickets import (
    CLOSED,
    OPEN,
    PENDING,
    SOLVED,
    delete_ticket,
    get_chat_ticket,
    get_ticket,
    unlink,
    update_ticket,
)

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateChatTicketRequest,
    ListChatTicketsRequest,
    ListTicketsRequest,
    UpdateTicketRequest,
)


class TestEscalate:
    async def test_new_ticket_is_created_and_linked(self, api: Api) -> None:
        """One call opens the ticket, links it, and sets has_ticket; the revision moves once."""
        session = await api.session()
        link = await api.escalate(session.id, ticket=r.Ticket(title="Broken", status=PENDING))
        assert (link.session_id, link.ticket_id) == (session.id, link.ticket.id)
        assert (link.ticket.title, link.ticket.status) == ("Broken", PENDING)
        assert link.ticket.tenant_id == api.tenant
        assert await get_chat_ticket(api, link.id) == link
        assert await get_ticket(api, link.ticket_id) == link.ticket
        changed = await get_session(api, session.id)
        assert (changed.has_ticket, changed.revision) == (True, 1)
        assert changed.update_time.ToNanoseconds() > session.update_time.ToNanoseconds()

    async def test_ticket_may_serve_several_sessions(self, api: Api) -> None:
        """An existing ticket is linked as it is; status defaults to open."""
        link = await api.escalate((await api.session()).id)
        again = await api.escalate((await api.session()).id, ticket_id=link.ticket_id)
        assert again.ticket == link.ticket
        assert again.ticket.status == OPEN

    async def test_session_has_one_ticket(self, api: Api) -> None:
        """The second fails, new or existing, and creates no ticket."""
        session = await api.session()
        link = await api.escalate(session.id)
        for fields in ({}, {"ticket_id": link.ticket_id}):
            with refused(StatusCode.ALREADY_EXISTS, "SESSION_HAS_TICKET") as refusal:
                await api.escalate(session.id, **fields)
            assert refusal.details["ResourceInfo"].resource_name == session.id
        tickets = await api.tickets.ListTickets(ListTicketsRequest())
        assert [ticket.id for ticket in tickets.tickets] == [link.ticket_id]
        assert (await get_session(api, session.id)).revision == 1

    async def test_archived_session_cannot_be_linked(self, api: Api) -> None:
        """Refused, and the ticket that would have been opened is not there."""
        session = await api.session(status=r.CHAT_SESSION_STATUS_ARCHIVED)
        with refused(StatusCode.FAILED_PRECONDITION, "SESSION_ARCHIVED") as refusal:
            await api.escalate(session.id)
        [violation] = refusal.details["PreconditionFailure"].violations
        assert violation.subject == f"chat_sessions/{session.id}"
        assert not (await api.tickets.ListTickets(ListTicketsRequest())).tickets
        assert not (await get_session(api, session.id)).has_ticket

    async def test_session_and_ticket_must_exist_in_the_tenant(self, api: Api, other: Api) -> None:
        """Absent and foreign look the same."""
        session = await api.session()
        theirs = await other.escalate((await other.session()).id)
        for session_id in (theirs.session_id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await api.escalate(session_id)
        for ticket_id in (theirs.ticket_id, an_id()):
            with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND") as refusal:
                await api.escalate(session.id, ticket_id=ticket_id)
            assert refusal.text == f"ticket {ticket_id} does not exist"
        assert not (await get_session(api, session.id)).has_ticket

    async def test_bad_fields_are_rejected_together(self, api: Api) -> None:
        """A target is required; a new ticket has a title of 1 to 500 characters."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.tickets.CreateChatTicket(CreateChatTicketRequest(chat_ticket_id="x"))
        assert set(refusal.fields) == {"session_id", "chat_ticket_id", "ticket_id", "ticket"}
        session = await api.session()
        for title, status in (("", 9), ("a" * 501, -1), ("a\0", 5)):
            ticket = r.Ticket(title=title, status=status, id="x")  # type: ignore[arg-type]
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await api.escalate(session.id, ticket=ticket)
            assert set(refusal.fields) == {"ticket.id", "ticket.title", "ticket.status"}
        assert (await api.escalate(session.id, ticket=r.Ticket(title="é" * 500))).ticket.title

    @pytest.mark.parametrize(
        "title",
        [
            *("Refund\r\nBcc: x@example.com", "\n", " ", "\u3000", "a\u202eb", "a\u2028b", "a\x7f"),
            *(" a", "a\u00a0", "\x85", "\u2066\u202c", "\u202a\u2067\u202c\u2069", "\u202c\u202a"),
        ],
    )
    async def test_title_is_one_line(self, api: Api, title: str) -> None:
        """Others are refused, on create and update."""
        link = await api.escalate((await api.session()).id)
        for refused_call in (
            api.escalate((await api.session()).id, ticket=r.Ticket(title=title)),
            update_ticket(api, link.ticket_id, title=title),
        ):
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await refused_call
            assert list(refusal.fields) == ["ticket.title"]

    @pytest.mark.parametrize(
        "title", ["a b", "\u202aa\u2067b\u2069\u202c", "\u200fא\u200e", "Ω 🙂", "e\u0301"]
    )
    async def test_title_is_stored_as_sent(self, api: Api, title: str) -> None:
        """Bidirectional controls in pairs are text as any other."""
        link = await api.escalate((await api.session()).id, ticket=r.Ticket(title=title))
        assert link.ticket.title == title


class TestRepeat:
    async def test_repeat_with_the_links_id(self, api: Api) -> None:
        """Sixteen at once are one link and one ticket."""
        session = await api.session()
        link_id = an_id()
        answers = await asyncio.gather(
            *(api.escalate(session.id, chat_ticket_id=link_id) for _ in range(16))
        )
        assert all(answer == answers[0] for answer in answers)
        assert len((await api.tickets.ListTickets(ListTicketsRequest())).tickets) == 1

    async def test_repeat_with_the_tickets_id(self, api: Api) -> None:
        """The id of the new ticket is enough to make it safe to repeat."""
        session = await api.session()
        ticket = r.Ticket(id=an_id(), title="help")
        answers = await asyncio.gather(
            *(api.escalate(session.id, ticket=ticket) for _ in range(16))
        )
        assert all(answer == answers[0] for answer in answers)

    async def test_repeat_returns_the_ticket_as_it_is(self, api: Api) -> None:
        """Title and status are compared only while the ticket is unchanged."""
        session = await api.session()
        link_id = an_id()
        link = await api.escalate(session.id, chat_ticket_id=link_id)
        ticket = await update_ticket(api, link.ticket_id, title="renamed", status=SOLVED)
        assert (await api.escalate(session.id, chat_ticket_id=link_id)).ticket == ticket

    async def test_repeat_on_a_session_archived_since(self, api: Api) -> None:
        """The id is looked up before the rule is judged."""
        session = await api.session()
        link_id = an_id()
        link = await api.escalate(session.id, chat_ticket_id=link_id)
        await set_status(api, session.id, ARCHIVED)
        assert await api.escalate(session.id, chat_ticket_id=link_id) == link

    async def test_ids_of_something_else_are_rejected(self, api: Api) -> None:
        """Another session, another ticket, another title."""
        first, second = await api.session(), await api.session()
        link = await api.escalate(first.id)
        for session_id, fields, reason in (
            (second.id, {"chat_ticket_id": link.id}, "CHAT_TICKET_ALREADY_EXISTS"),
            (
                first.id,
                {"chat_ticket_id": link.id, "ticket": r.Ticket(title="other")},
                "CHAT_TICKET_ALREADY_EXISTS",
            ),
            (
                second.id,
                {"ticket": r.Ticket(id=link.ticket_id, title="help")},
                "TICKET_ALREADY_EXISTS",
            ),
        ):
            with refused(StatusCode.ALREADY_EXISTS, reason):
                await api.escalate(session_id, **fields)
        assert not (await get_session(api, second.id)).has_ticket

    @pytest.mark.parametrize(
        "changed",
        [
            {"ticket": r.Ticket(id=an_id(), title="help")},
            {"ticket": r.Ticket(title="other")},
            {"ticket": r.Ticket(title="help", status=PENDING)},
            {"ticket_id": an_id()},
        ],
        ids=["id", "title", "status", "existing"],
    )
    async def test_other_target_is_rejected(self, api: Api, changed: dict[str, Any]) -> None:
        """A link's id cannot be used again for another ticket or another ticket id."""
        session = await api.session()
        ticket = r.Ticket(id=an_id(), title="help")
        link = await api.escalate(session.id, chat_ticket_id=an_id(), ticket=ticket)
        with refused(StatusCode.ALREADY_EXISTS, "CHAT_TICKET_ALREADY_EXISTS"):
            await api.escalate(session.id, chat_ticket_id=link.id, **changed)
        assert await api.escalate(session.id, chat_ticket_id=link.id, ticket=ticket) == link

    async def test_other_ticket_with_the_tickets_id_is_rejected(self, api: Api) -> None:
        """The id of a new ticket cannot be used again with another title or status."""
        session = await api.session()
        ticket_id = an_id()
        await api.escalate(session.id, ticket=r.Ticket(id=ticket_id, title="help"))
        for fields in ({"title": "other"}, {"title": "help", "status": PENDING}):
            with refused(StatusCode.ALREADY_EXISTS, "TICKET_ALREADY_EXISTS"):
                await api.escalate(session.id, ticket=r.Ticket(id=ticket_id, **fields))
        with refused(StatusCode.ALREADY_EXISTS, "SESSION_HAS_TICKET"):
            await api.escalate(session.id, ticket=r.Ticket(id=an_id(), title="help"))


class TestUnlink:
    async def test_unlinked_session_can_be_linked_again(self, api: Api) -> None:
        """has_ticket follows; a repeat is NOT_FOUND; a new ticket can be linked."""
        session = await api.session()
        link = await api.escalate(session.id)
        await unlink(api, link.id)
        changed = await get_session(api, session.id)
        assert (changed.has_ticket, changed.revision) == (False, 2)
        assert await get_ticket(api, link.ticket_id) == link.ticket
        for attempt in (get_chat_ticket, unlink):
            with refused(StatusCode.NOT_FOUND, "CHAT_TICKET_NOT_FOUND"):
                await attempt(api, link.id)
        await api.escalate(session.id)

    async def test_foreign_link_is_out_of_reach(self, api: Api, other: Api) -> None:
        """Nobody reads or deletes another tenant's link."""
        theirs = await other.escalate((await other.session()).id)
        for attempt in (get_chat_ticket, unlink):
            with refused(StatusCode.NOT_FOUND, "CHAT_TICKET_NOT_FOUND"):
                await attempt(api, theirs.id)
        assert await get_chat_ticket(other, theirs.id) == theirs


class TestDeleteSession:
    @pytest.mark.parametrize("status", [OPEN, PENDING])
    async def test_session_with_an_active_ticket_cannot_be_deleted(
        self, api: Api, status: int
    ) -> None:
        """Open and pending tickets are active, and nothing of the session is deleted."""
        session = await api.session()
        message = await api.message(session.id)
        await api.escalate(session.id, ticket=r.Ticket(title="help", status=status))
        with refused(StatusCode.FAILED_PRECONDITION, "SESSION_HAS_ACTIVE_TICKET") as refusal:
            await delete_session(api, session.id)
        [violation] = refusal.details["PreconditionFailure"].violations
        assert violation.subject == f"chat_sessions/{session.id}"
        assert (await get_session(api, message.session_id)).revision == 2

    @pytest.mark.parametrize("status", [SOLVED, CLOSED])
    async def test_session_with_a_closed_ticket_can_be_deleted(self, api: Api, status: int) -> None:
        """The link is deleted with the session, and the ticket stays."""
        session = await api.session()
        link = await api.escalate(session.id)
        await update_ticket(api, link.ticket_id, status=status)
        await delete_session(api, session.id)
        with refused(StatusCode.NOT_FOUND, "CHAT_TICKET_NOT_FOUND"):
            await get_chat_ticket(api, link.id)
        assert (await get_ticket(api, link.ticket_id)).status == status


class TestTickets:
    async def test_update_changes_what_the_mask_names(self, api: Api) -> None:
        """Each change is one of the session too: its revision counts it."""
        session = await api.session()
        ticket = (await api.escalate(session.id)).ticket
        renamed = await update_ticket(api, ticket.id, title="new")
        assert (renamed.title, renamed.status) == ("new", OPEN)
        solved = await update_ticket(api, ticket.id, status=SOLVED)
        assert (solved.title, solved.status) == ("new", SOLVED)
        times = [t.update_time.ToNanoseconds() for t in (ticket, renamed, solved)]
        assert times == sorted(set(times))
        assert await update_ticket(api, ticket.id, title="new", status=SOLVED) == solved
        assert (await get_session(api, session.id)).revision == 3

    async def test_update_is_validated(self, api: Api) -> None:
        """Empty mask, unknown field, empty title and no status are rejected."""
        ticket = (await api.escalate((await api.session()).id)).ticket
        for paths, fields in (
            ([], ["update_mask"]),
            (["tenant_id"], ["update_mask"]),
            (["title", "status"], ["ticket.title", "ticket.status"]),
        ):
            request = UpdateTicketRequest(
                ticket=r.Ticket(id=ticket.id), update_mask=FieldMask(paths=paths)
            )
            with refused(StatusCode.INVALID_ARGUMENT) as refusal:
                await api.tickets.UpdateTicket(request)
            assert list(refusal.fields) == fields
        assert await get_ticket(api, ticket.id) == ticket

    async def test_linked_ticket_cannot_be_deleted(self, api: Api) -> None:
        """After the link is gone it can; a repeat is NOT_FOUND."""
        link = await api.escalate((await api.session()).id)
        with refused(StatusCode.FAILED_PRECONDITION, "TICKET_LINKED"):
            await delete_ticket(api, link.ticket_id)
        await unlink(api, link.id)
        await delete_ticket(api, link.ticket_id)
        for attempt in (get_ticket, delete_ticket):
            with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND"):
                await attempt(api, link.ticket_id)

    async def test_foreign_ticket_is_out_of_reach(self, api: Api, other: Api) -> None:
        """Nobody reads, changes or deletes another tenant's ticket."""
        link = await other.escalate((await other.session()).id)
        await unlink(other, link.id)
        for attempt in (get_ticket, delete_ticket):
            with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND"):
                await attempt(api, link.ticket_id)
        with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND"):
            await update_ticket(api, link.ticket_id, title="mine")
        assert await get_ticket(other, link.ticket_id) == link.ticket

    async def test_list_newest_first_by_status(self, api: Api, other: Api) -> None:
        """Pages meet each ticket once; statuses filter."""
        tickets = [(await api.escalate((await api.session()).id)).ticket for _ in range(5)]
        await other.escalate((await other.session()).id)
        await update_ticket(api, tickets[1].id, status=CLOSED)
        found: list[str] = []
        request = ListTicketsRequest(statuses=[OPEN], page_size=2)
        while True:
            page = await api.tickets.ListTickets(request)
            found += [ticket.id for ticket in page.tickets]
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        assert found == [tickets[n].id for n in (4, 3, 2, 0)]
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.tickets.ListTickets(
                ListTicketsRequest(statuses=[7], page_size=-1, page_token="x")  # type: ignore[list-item]
            )
        assert set(refusal.fields) == {"statuses[0]", "page_size", "page_token"}


class TestListLinks:
    async def test_of_a_session_and_of_a_ticket(self, api: Api) -> None:
        """The seeds' third query, both ways, each link with its ticket, oldest first."""
        first = await api.escalate((await api.session()).id)
        links = [
            first,
            *[
                await api.escalate((await api.session()).id, ticket_id=first.ticket_id)
                for _ in range(4)
            ],
        ]
        of_session = await api.tickets.ListChatTickets(
            ListChatTicketsRequest(session_id=first.session_id)
        )
        assert list(of_session.chat_tickets) == [first]
        found: list[r.ChatTicket] = []
        request = ListChatTicketsRequest(ticket_id=first.ticket_id, page_size=2)
        while True:
            page = await api.tickets.ListChatTickets(request)
            found += page.chat_tickets
            request.page_token = page.next_page_token
            if not request.page_token:
                break
        assert found == links

    async def test_parent_is_required_and_must_exist(self, api: Api, other: Api) -> None:
        """No parent is invalid; an absent or foreign one NOT_FOUND; an empty one an empty page."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.tickets.ListChatTickets(ListChatTicketsRequest())
        required = "required: session_id or ticket_id"
        assert refusal.fields == {"session_id": required, "ticket_id": required}
        theirs = await other.escalate((await other.session()).id)
        for session_id in (theirs.session_id, an_id()):
            with refused(StatusCode.NOT_FOUND, "CHAT_SESSION_NOT_FOUND"):
                await api.tickets.ListChatTickets(ListChatTicketsRequest(session_id=session_id))
        for ticket_id in (theirs.ticket_id, an_id()):
            with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND"):
                await api.tickets.ListChatTickets(ListChatTicketsRequest(ticket_id=ticket_id))
        session = await api.session()
        page = await api.tickets.ListChatTickets(ListChatTicketsRequest(session_id=session.id))
        assert not page.chat_tickets
