"""The event `ticket` of WatchChatSession: the chat ticket of the session, as it is."""

import asyncio
from typing import Any

import psycopg
import pytest
from support.client import Api
from support.drafts import writing
from support.sessions import RESOLVED, set_status
from support.tickets import PENDING, SOLVED, create_ticket, get_chat_ticket, unlink, update_ticket
from support.watching import assert_same_state, following, watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.services import convert
from chat_ticket_svc.store import session_changes


@pytest.fixture
async def unpolled(start_server: Any, database: str) -> Api:
    """A client of a server that does not poll: only a write wakes a watcher."""
    return await start_server(database, watch_poll_interval_seconds=3600)  # type: ignore[no-any-return]


@pytest.mark.parametrize("include_drafts", [False, True])
class TestTicket:
    async def test_comes_after_the_session_at_the_beginning(
        self, api: Api, include_drafts: bool
    ) -> None:
        """At the position of the stream, also when it resumes."""
        session = await api.session()
        message = await api.message(session.id)
        link = await api.escalate(session.id)
        for after, kinds in (
            (0, ["session", "ticket", "messages_created", "caught_up"]),
            (message.sequence, ["session", "ticket", "caught_up"]),
            (2, ["session", "ticket", "caught_up"]),
        ):
            async with watching(api, session.id, after, include_drafts=include_drafts) as watcher:
                events = [await watcher.next() for _ in kinds]
                assert watcher.kinds == kinds
                assert events[1].ticket == link
                assert [event.revision for event in events[:2]] == [after, after]
                await assert_same_state(api, watcher, session.id)

    async def test_tells_of_link_change_and_unlink(
        self, unpolled: Api, include_drafts: bool
    ) -> None:
        """After the session where that changes too, and without any field when it is unlinked."""
        api = unpolled
        session = await api.session()
        async with watching(api, session.id, include_drafts=include_drafts) as watcher:
            await watcher.until("caught_up")
            watcher.kinds.clear()

            link = await api.escalate(session.id)
            event = await watcher.next()
            assert (event.session.has_ticket, event.revision) == (True, 0)
            event = await watcher.next()
            assert (event.ticket, event.revision) == (link, 1)

            for number, fields in enumerate(
                [{"status": PENDING}, {"title": "new"}, {"external_ref": "zd-1"}], 2
            ):
                ticket = await update_ticket(api, link.ticket_id, **fields)
                event = await watcher.next()
                assert (event.ticket.ticket, event.revision) == (ticket, number)
                assert event.ticket == await get_chat_ticket(api, link.id)
            await update_ticket(api, link.ticket_id, title="new")

            await unlink(api, link.id)
            assert not (await watcher.next()).session.has_ticket
            event = await watcher.next()
            assert (event.WhichOneof("event"), event.ticket) == ("ticket", r.ChatTicket())
            await update_ticket(api, link.ticket_id, status=SOLVED)

            again = await api.escalate(session.id, ticket_id=link.ticket_id)
            await watcher.next()
            assert (await watcher.next()).ticket == again
            assert watcher.kinds == [
                *("session", "ticket", "ticket", "ticket", "ticket"),
                *("session", "ticket", "session", "ticket"),
            ]
            await assert_same_state(api, watcher, session.id)

    async def test_comes_before_the_messages_that_came_with_it(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch, include_drafts: bool
    ) -> None:
        """At the position before them: whoever resumes there gets them."""
        api = unpolled
        session = await api.session()
        link = await api.escalate(session.id)
        read, hold = session_changes.page, asyncio.Event()

        async def held(*arguments: Any, **named: Any) -> Any:
            await hold.wait()
            return await read(*arguments, **named)

        async with watching(api, session.id, include_drafts=include_drafts) as watcher:
            await watcher.until("caught_up")
            monkeypatch.setattr(session_changes, "page", held)
            await api.message(session.id)
            await set_status(api, session.id, RESOLVED)
            solved = await update_ticket(api, link.ticket_id, status=SOLVED)
            hold.set()
            events = [await watcher.next() for _ in range(3)]
            assert watcher.kinds[-3:] == ["session", "ticket", "messages_created"]
            assert [event.revision for event in events] == [1, 1, 4]
            assert events[1].ticket.ticket == solved

    async def test_changes_that_cancel_each_other_out_are_not_told(
        self, unpolled: Api, monkeypatch: pytest.MonkeyPatch, include_drafts: bool
    ) -> None:
        """The session was linked and unlinked: a heartbeat carries the new revision."""
        api = unpolled
        session = await api.session()
        read, hold = session_changes.page, asyncio.Event()

        async def held(*arguments: Any, **named: Any) -> Any:
            await hold.wait()
            return await read(*arguments, **named)

        async with watching(api, session.id, include_drafts=include_drafts) as watcher:
            await watcher.until("caught_up")
            monkeypatch.setattr(session_changes, "page", held)
            await unlink(api, (await api.escalate(session.id)).id)
            hold.set()
            event = await watcher.next()
            assert (event.WhichOneof("event"), event.revision) == ("heartbeat", 2)


async def test_every_session_of_the_ticket_is_told(unpolled: Api) -> None:
    """And no session of another ticket."""
    api = unpolled
    ticket = await create_ticket(api)
    sessions = [await api.session() for _ in range(3)]
    for session in sessions[:2]:
        await api.escalate(session.id, ticket_id=ticket.id)
    await api.escalate(sessions[2].id)
    async with (
        watching(api, sessions[0].id) as first,
        watching(api, sessions[1].id) as second,
        watching(api, sessions[2].id) as apart,
    ):
        for watcher in (first, second, apart):
            await watcher.until("caught_up")
        solved = await update_ticket(api, ticket.id, status=SOLVED)
        assert (await first.next()).ticket.ticket == solved
        assert (await second.next()).ticket.ticket == solved
        await api.message(sessions[2].id)
        assert (await apart.next()).HasField("messages_created")


async def test_watchers_share_the_event(unpolled: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read and made once for all of them."""
    api = unpolled
    session = await api.session()
    link = await api.escalate(session.id)
    made, make = [], convert.chat_ticket

    def counted(row: Any) -> r.ChatTicket:
        made.append(row)
        return make(row)

    async with (
        watching(api, session.id) as one,
        watching(api, session.id) as two,
        watching(api, session.id) as three,
    ):
        for watcher in (one, two, three):
            await watcher.until("caught_up")
        monkeypatch.setattr(convert, "chat_ticket", counted)
        solved = await update_ticket(api, link.ticket_id, status=SOLVED)
        for watcher in (one, two, three):
            assert (await watcher.next()).ticket.ticket == solved
    assert len(made) == 1


async def test_update_on_another_server_is_told_at_once(two_clients: tuple[Api, Api]) -> None:
    """By NOTIFY: no poll runs here."""
    one, two = two_clients
    session = await one.session()
    link = await one.escalate(session.id)
    async with watching(one, session.id) as here:
        await here.until("caught_up")
        solved = await update_ticket(two, link.ticket_id, status=SOLVED)
        assert (await here.next()).ticket.ticket == solved


async def test_update_by_an_older_server_is_found_by_the_poll(
    start_server: Any, database: str
) -> None:
    """It announces no change of the sessions, but the schema counts it."""
    api = await start_server(database, watch_poll_interval_seconds=0.1)
    session = await api.session()
    link = await api.escalate(session.id)
    async with watching(api, session.id) as watcher:
        await watcher.until("caught_up")
        with psycopg.connect(database) as connection:
            connection.execute(
                "UPDATE tickets SET status = 'solved', updated_at = next_change_time(updated_at)"
                " WHERE id = %s",
                [link.ticket_id],
            )
        assert (await watcher.next()).ticket.ticket.status == SOLVED
        await assert_same_state(api, watcher, session.id)


async def test_ticket_does_not_disturb_open_drafts(unpolled: Api) -> None:
    """The draft goes on, at the position after the ticket."""
    api = unpolled
    session = await api.session()
    link = await api.escalate(session.id)
    async with following(api, session.id) as watcher, writing(api, session.id) as writer:
        await writer.append("Hello")
        await watcher.until_draft(writer.draft_id, "Hello")
        solved = await update_ticket(api, link.ticket_id, status=SOLVED)
        assert (await watcher.until("ticket")).ticket.ticket == solved
        await writer.append(", you")
        await watcher.until_draft(writer.draft_id, "Hello, you")


def test_page_of_a_session_without_a_ticket_reads_no_ticket(
    fresh_database: str,
) -> None:
    """The tables of tickets are not touched: such a session pays nothing."""
    params = {
        "tenant_id": "t",
        "session_id": "00000000-0000-4000-8000-000000000000",
        "after": 0,
        "limit": 32,
        "bytes": 65536,
    }
    with psycopg.connect(fresh_database) as connection:
        connection.execute(
            "INSERT INTO chat_sessions (tenant_id, id) VALUES (%(tenant_id)s, %(session_id)s)",
            params,
        )
        explain = f"EXPLAIN (ANALYZE, COSTS OFF) {session_changes.PAGE}"
        rows = connection.execute(explain, params).fetchall()  # type: ignore[call-overload]
    plan = [line for (line,) in rows if " on chat_tickets " in line or " on tickets " in line]
    assert len(plan) == 2
    assert all("never executed" in line for line in plan), plan
