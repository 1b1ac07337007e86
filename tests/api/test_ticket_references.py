"""CreateTicket, the references of tickets to another system, and lists by them."""

import asyncio
import re
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.cluster import Cluster
from support.database import execute
from support.tickets import (
    CLOSED,
    OPEN,
    PENDING,
    SOLVED,
    create_ticket,
    delete_ticket,
    get_ticket,
    update_ticket,
)

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_ticket_pb2 import ListTicketsRequest
from chat_ticket_svc.services.validate import MAX_UUID
from chat_ticket_svc.store import ticket_listing, ticket_update


async def list_tickets(api: Api, **filters: Any) -> list[r.Ticket]:
    """All of them, by pages of two."""
    request = ListTicketsRequest(page_size=2, **filters)
    found: list[r.Ticket] = []
    while True:
        page = await api.tickets.ListTickets(request)
        found += page.tickets
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


class TestCreate:
    async def test_ticket_exists_before_its_chat(self, api: Api) -> None:
        """It is stored as sent, and sessions are linked to it by its id."""
        ticket = await create_ticket(api, title="Broken", status=PENDING, external_ref="zd-4711")
        assert (ticket.title, ticket.status, ticket.external_ref) == ("Broken", PENDING, "zd-4711")
        assert (ticket.tenant_id, ticket.revision, ticket.etag) == (api.tenant, 0, "0")
        assert await get_ticket(api, ticket.id) == ticket
        link = await api.escalate((await api.session()).id, ticket_id=ticket.id)
        assert link.ticket == ticket
        assert (await create_ticket(api)).status == OPEN

    async def test_bad_fields_are_rejected_together(self, api: Api) -> None:
        """Nothing is stored."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_ticket(api, id="x", title="", status=9, external_ref="a\nb")
        assert set(refusal.fields) == {
            *("ticket.id", "ticket.title", "ticket.status", "ticket.external_ref"),
        }
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await create_ticket(api, external_ref="a" * 256)
        assert refusal.fields == {"ticket.external_ref": "256 characters, at most 255"}
        assert not await list_tickets(api)

    async def test_repeat_is_the_same_ticket(self, api: Api) -> None:
        """Sixteen at once are one; without an id each is a ticket of its own."""
        fields = {"id": an_id(), "title": "help", "external_ref": "a"}
        answers = await asyncio.gather(*(create_ticket(api, **fields) for _ in range(16)))
        assert all(answer == answers[0] for answer in answers)
        assert await list_tickets(api) == [answers[0]]
        assert (await create_ticket(api)).id != (await create_ticket(api)).id

    async def test_repeat_is_the_same_ticket_after_a_reindex(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Then PostgreSQL compares the references before the ids."""
        execute(fresh_database, "REINDEX INDEX CONCURRENTLY tickets_pkey")
        api = await start_server(fresh_database)
        for _ in range(5):
            fields = {"id": an_id(), "title": "help", "external_ref": an_id()}
            answers = await asyncio.gather(*(create_ticket(api, **fields) for _ in range(16)))
            assert all(answer == answers[0] for answer in answers)
            with refused(StatusCode.ALREADY_EXISTS, "TICKET_ALREADY_EXISTS"):
                await api.escalate((await api.session()).id, ticket=r.Ticket(**fields))

    @pytest.mark.parametrize(
        "changed", [{"title": "other"}, {"status": PENDING}, {"external_ref": "b"}]
    )
    async def test_repeat_is_compared_until_the_ticket_changes(
        self, api: Api, changed: dict[str, Any]
    ) -> None:
        """Other content is TICKET_ALREADY_EXISTS; after a change, the ticket as it is."""
        fields = {"id": an_id(), "title": "help", "external_ref": "a"}
        await create_ticket(api, **fields)
        with refused(StatusCode.ALREADY_EXISTS, "TICKET_ALREADY_EXISTS") as refusal:
            await create_ticket(api, **{**fields, **changed})
        assert refusal.details["ResourceInfo"].resource_name == fields["id"]
        ticket = await update_ticket(api, fields["id"], title="renamed")
        assert await create_ticket(api, **fields) == ticket
        assert await create_ticket(api, **{**fields, **changed}) == ticket

    async def test_id_of_another_tenant_is_free(self, api: Api, other: Api) -> None:
        """Nobody learns of another tenant's ids and references."""
        fields = {"id": an_id(), "external_ref": "a"}
        theirs = await create_ticket(other, title="theirs", **fields)
        ours = await create_ticket(api, title="ours", **fields)
        assert await get_ticket(other, theirs.id) == theirs
        assert await list_tickets(api, external_ref="a") == [ours]


class TestReference:
    async def test_is_unique_in_the_tenant(self, api: Api) -> None:
        """By create, escalation and update; the error names the ticket that has it."""
        holder = await create_ticket(api, external_ref="zd-1")
        spare = await create_ticket(api)
        session = await api.session()
        taking = r.Ticket(title="help", external_ref="zd-1")
        for attempt in (
            create_ticket(api, external_ref="zd-1"),
            api.escalate(session.id, ticket=taking),
            update_ticket(api, spare.id, external_ref="zd-1", title="new"),
        ):
            with refused(StatusCode.ALREADY_EXISTS, "EXTERNAL_REF_TAKEN") as refusal:
                await attempt
            assert dict(refusal.info.metadata) == {"ticket_id": holder.id}
            assert refusal.details["ResourceInfo"].resource_type == "ticket"
            assert refusal.details["ResourceInfo"].resource_name == holder.id
        assert await list_tickets(api) == [spare, holder]

    async def test_of_many_at_once_one_gets_it(self, api: Api) -> None:
        """The others are told whose it is."""
        tickets = [await create_ticket(api) for _ in range(8)]

        async def take(ticket: r.Ticket) -> str:
            try:
                return (await update_ticket(api, ticket.id, external_ref="zd-1")).id
            except Exception as error:
                with refused(StatusCode.ALREADY_EXISTS, "EXTERNAL_REF_TAKEN") as refusal:
                    raise error
                return refusal.info.metadata["ticket_id"]

        assert len(set(await asyncio.gather(*map(take, tickets)))) == 1

    async def test_taken_and_then_its_own(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the refusal and its reason, another call gives the ticket the reference."""
        holder = await create_ticket(api, external_ref="a")
        ticket = await create_ticket(api)
        find_holder = ticket_update.external_ref_taken

        async def find_holder_later(*arguments: Any) -> Any:
            monkeypatch.undo()
            await update_ticket(api, holder.id, external_ref="")
            await update_ticket(api, ticket.id, external_ref="a")
            return await find_holder(*arguments)

        monkeypatch.setattr(ticket_update, "external_ref_taken", find_holder_later)
        with refused(StatusCode.ABORTED, "CONTENTION"):
            await update_ticket(api, ticket.id, external_ref="a", title="new")
        again = await update_ticket(api, ticket.id, external_ref="a", title="new")
        assert (again.external_ref, again.title, again.revision) == ("a", "new", 2)

    async def test_is_free_again_when_it_is_removed_or_its_ticket_deleted(self, api: Api) -> None:
        """An empty one removes it, which is a change."""
        first = await create_ticket(api, external_ref="zd-1")
        emptied = await update_ticket(api, first.id, external_ref="")
        assert (emptied.external_ref, emptied.revision) == ("", 1)
        second = await create_ticket(api, external_ref="zd-1")
        await delete_ticket(api, second.id)
        assert (await update_ticket(api, first.id, external_ref="zd-1")).external_ref == "zd-1"

    async def test_escalation_stores_it_and_compares_it(self, api: Api) -> None:
        """A repeat with another one is rejected until the ticket changes."""
        session, ticket_id = await api.session(), an_id()
        ticket = r.Ticket(id=ticket_id, title="help", external_ref="zd-1")
        link = await api.escalate(session.id, ticket=ticket)
        assert link.ticket.external_ref == "zd-1"
        assert await api.escalate(session.id, ticket=ticket) == link
        ticket.external_ref = "zd-2"
        with refused(StatusCode.ALREADY_EXISTS, "TICKET_ALREADY_EXISTS"):
            await api.escalate(session.id, ticket=ticket)
        changed = await update_ticket(api, ticket_id, external_ref="zd-3")
        assert (await api.escalate(session.id, ticket=ticket)).ticket == changed

    async def test_repeat_of_an_escalation_without_ids(self, api: Api) -> None:
        """It has succeeded, so the session has its ticket; that counts before the reference."""
        session, ticket = await api.session(), r.Ticket(title="help", external_ref="zd-1")
        await api.escalate(session.id, ticket=ticket)
        with refused(StatusCode.ALREADY_EXISTS, "SESSION_HAS_TICKET"):
            await api.escalate(session.id, ticket=ticket)

    async def test_any_letters_are_stored_as_sent(self, api: Api) -> None:
        """Unicode, blanks inside, 255 of them, and apart by case."""
        for external_ref in ("Ω 🙂", "№ 7/ü", "a" * 255, "A", "a"):
            ticket = await create_ticket(api, external_ref=external_ref)
            assert await list_tickets(api, external_ref=external_ref) == [ticket]


class TestList:
    async def test_filters_combine(self, api: Api) -> None:
        """Reference, status and time of the last change; newest created first."""
        tickets = [await create_ticket(api, external_ref=f"zd-{n}") for n in range(5)]
        for n in (3, 0, 4):
            tickets[n] = await update_ticket(api, tickets[n].id, status=SOLVED)
        start, end = tickets[3].update_time, tickets[4].update_time
        for filters, expected in (
            ({"external_ref": "zd-2"}, [2]),
            ({"external_ref": "zd"}, []),
            ({"external_ref": "zd-2", "statuses": [SOLVED]}, []),
            ({"external_ref": "zd-3", "statuses": [OPEN, SOLVED]}, [3]),
            ({"external_ref": "zd-3", "end_update_time": start}, []),
            ({"start_update_time": start}, [4, 3, 0]),
            ({"start_update_time": start, "end_update_time": end}, [3, 0]),
            ({"end_update_time": start}, [2, 1]),
            ({"end_update_time": end, "statuses": [SOLVED]}, [3, 0]),
            ({"end_update_time": end, "statuses": [OPEN, CLOSED]}, [2, 1]),
            ({"statuses": [SOLVED]}, [4, 3, 0]),
        ):
            assert await list_tickets(api, **filters) == [tickets[n] for n in expected], filters

    async def test_bad_filters_are_rejected_together(self, api: Api) -> None:
        """Also a page token of other filters."""
        request = ListTicketsRequest(
            external_ref="a\nb",
            start_update_time=Timestamp(nanos=-1),
            end_update_time=Timestamp(seconds=2**60),
        )
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.tickets.ListTickets(request)
        assert set(refusal.fields) == {"external_ref", "start_update_time", "end_update_time"}
        for _ in range(2):
            await create_ticket(api)
        page = await api.tickets.ListTickets(ListTicketsRequest(page_size=1))
        request = ListTicketsRequest(page_token=page.next_page_token, external_ref="a")
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await api.tickets.ListTickets(request)
        assert set(refusal.fields) == {"page_token"}


@pytest.fixture(scope="module")
def many_tickets(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """A database, and its tenant with 50,000 tickets: old ones have changed in the last minutes."""
    database, tenant = cluster.create(), f"tenant {uuid.uuid4()}"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO tickets (tenant_id, title, status, external_ref, created_at, updated_at)"
            " SELECT %s, 'x', (ARRAY['open', 'closed'])[1 + n %% 2], 'zd-' || n, created,"
            "        CASE WHEN n %% 1000 = 0 THEN timestamptz '2026-01-01' + n * interval '1 ms'"
            "             ELSE created END"
            "   FROM generate_series(1, 50000) AS n,"
            "        LATERAL (SELECT timestamptz '2020-01-01' + n * interval '1 minute')"
            "            AS time (created)",
            [tenant],
        )
        connection.execute("VACUUM ANALYZE tickets")
    yield database, tenant
    cluster.drop(database)


@pytest.mark.parametrize(
    "filters",
    [
        {"external_ref": "zd-77"},
        {"external_ref": "zd-77", "statuses": ["open", "closed"]},
        {"external_ref": "of nobody"},
        {"updated_from": "2026-01-01"},
        {"updated_from": "2026-01-01", "statuses": ["open", "pending"]},
        {"updated_from": "2020-01-02", "updated_to": "2020-01-02 01:00"},
        {"updated_to": "2020-01-01 01:00"},
        {"updated_to": "2020-01-01 01:00", "statuses": ["closed"]},
    ],
    ids=str,
)
def test_page_does_not_read_all_tickets(
    many_tickets: tuple[str, str], filters: dict[str, Any]
) -> None:
    """A reference is found by its index, and so are the few tickets that changed in a range."""
    database, tenant = many_tickets
    params = {
        **dict.fromkeys(ticket_listing.Filter._fields),
        "tenant_id": tenant,
        "limit": 51,
        "after_time": "infinity",
        "after_id": MAX_UUID,
        **filters,
    }
    statement = (
        ticket_listing.LIST_TICKETS_OF_STATUSES
        if "statuses" in filters
        else ticket_listing.LIST_TICKETS
    )
    with psycopg.connect(database) as connection:
        explain = f"EXPLAIN (ANALYZE, BUFFERS) {statement}"
        plan = "\n".join(line for (line,) in connection.execute(explain, params))  # type: ignore[call-overload]
    assert int(re.findall(r"Buffers: shared hit=(\d+)", plan)[0]) < 200, plan
    removed = sum(map(int, re.findall(r"Rows Removed by Filter: (\d+)", plan)))
    assert removed < 100, plan
