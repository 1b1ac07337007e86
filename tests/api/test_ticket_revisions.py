"""The revision of a ticket, its etag, and what its changes are to the sessions that it serves."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, refused
from support.database import session_locked, wait_for_lock_waiters
from support.sessions import get_session
from support.tickets import (
    PENDING,
    SOLVED,
    create_ticket,
    delete_ticket,
    get_ticket,
    link_sessions,
    unlink,
    update_ticket,
)

from chat_ticket_svc.store import ticket_update


class TestRevision:
    async def test_counts_the_changes(self, api: Api) -> None:
        """One for each call that changes anything, however many fields; the etag is its text."""
        ticket = await create_ticket(api)
        for revision, fields in enumerate(
            [{"title": "a"}, {"status": SOLVED, "external_ref": "zd-1"}, {"external_ref": ""}], 1
        ):
            ticket = await update_ticket(api, ticket.id, **fields)
            assert (ticket.revision, ticket.etag) == (revision, str(revision))
            assert await update_ticket(api, ticket.id, **fields) == ticket
        await api.escalate((await api.session()).id, ticket_id=ticket.id)
        assert await get_ticket(api, ticket.id) == ticket, "a link is no change of the ticket"

    async def test_counts_those_of_an_older_server(self, api: Api, database: str) -> None:
        """Which knows nothing of revisions; the sessions are changed with it."""
        link = await api.escalate((await api.session()).id)
        with psycopg.connect(database) as connection:
            connection.execute(
                "UPDATE tickets SET title = coalesce(NULL, title), status = 'solved',"
                " updated_at = next_change_time(updated_at) WHERE id = %s",
                [link.ticket_id],
            )
        ticket = await get_ticket(api, link.ticket_id)
        assert (ticket.revision, ticket.status) == (1, SOLVED)
        assert (await get_session(api, link.session_id)).revision == 2

    async def test_change_is_one_of_every_session(self, api: Api) -> None:
        """Each takes one revision and a new time; other sessions and equal values none."""
        ticket = await create_ticket(api)
        linked = [await api.session() for _ in range(3)]
        links = [await api.escalate(session.id, ticket_id=ticket.id) for session in linked]
        apart = await api.session()
        await unlink(api, links[2].id)
        before = [await get_session(api, session.id) for session in (*linked, apart)]
        await update_ticket(api, ticket.id, status=PENDING)
        await update_ticket(api, ticket.id, status=PENDING)
        after = [await get_session(api, session.id) for session in (*linked, apart)]
        assert [b.revision - a.revision for a, b in zip(before, after, strict=True)] == [1, 1, 0, 0]
        assert after[2:] == before[2:]
        for a, b in zip(before[:2], after[:2], strict=True):
            assert b.update_time.ToNanoseconds() > a.update_time.ToNanoseconds()

    async def test_equal_values_wait_for_nobody(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Whoever holds a session of the ticket holds up only who changes the ticket."""
        api = await start_server(fresh_database)
        link = await api.escalate((await api.session()).id)
        with session_locked(fresh_database, link.session_id):
            async with asyncio.timeout(1):
                assert await update_ticket(api, link.ticket_id, title="help") == link.ticket
            changing = asyncio.create_task(update_ticket(api, link.ticket_id, title="new"))
            await wait_for_lock_waiters(fresh_database, 1)
            assert await get_ticket(api, link.ticket_id) == link.ticket
        assert (await changing).title == "new"


class TestEtag:
    async def test_update_with_the_current_one_succeeds_once(self, api: Api) -> None:
        """Of many with the same etag one wins; the others learn the revision."""
        ticket = (await api.escalate((await api.session()).id)).ticket

        async def update(number: int) -> bool:
            try:
                await update_ticket(api, ticket.id, etag=ticket.etag, title=f"number {number}")
            except Exception as error:
                with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
                    raise error
                assert dict(refusal.info.metadata) == {"revision": "1"}
                return False
            return True

        assert sum(await asyncio.gather(*map(update, range(8)))) == 1
        assert (await get_ticket(api, ticket.id)).revision == 1

    async def test_is_checked_even_if_nothing_would_change(self, api: Api) -> None:
        """The caller decided by a state that is gone."""
        ticket = await create_ticket(api)
        await update_ticket(api, ticket.id, title="new")
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
            await update_ticket(api, ticket.id, etag=ticket.etag, title="new")

    async def test_is_compared_after_waiting_for_a_concurrent_change(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """The change that came first counts, also when the ticket is to be deleted."""
        api = await start_server(fresh_database)
        ticket = await create_ticket(api)
        with psycopg.connect(fresh_database) as connection:
            connection.execute("UPDATE tickets SET status = 'solved'")
            calls = [
                asyncio.create_task(update_ticket(api, ticket.id, etag=ticket.etag, title="new")),
                asyncio.create_task(delete_ticket(api, ticket.id, etag=ticket.etag)),
            ]
            await wait_for_lock_waiters(fresh_database, 2)
            connection.commit()
        for call in calls:
            with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
                await call
            assert refusal.info.metadata["revision"] == "1"
        assert (await get_ticket(api, ticket.id)).title == "help"

    async def test_delete_with_another_one_is_refused(self, api: Api) -> None:
        """With the current one the ticket is deleted."""
        ticket = await create_ticket(api)
        changed = await update_ticket(api, ticket.id, title="new")
        with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as refusal:
            await delete_ticket(api, ticket.id, etag=ticket.etag)
        assert dict(refusal.info.metadata) == {"revision": "1"}
        await delete_ticket(api, ticket.id, etag=changed.etag)
        with refused(StatusCode.NOT_FOUND, "TICKET_NOT_FOUND"):
            await delete_ticket(api, ticket.id, etag=changed.etag)

    async def test_must_be_one(self, api: Api) -> None:
        """An etag that the service cannot have made is invalid."""
        ticket = await create_ticket(api)
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await update_ticket(api, ticket.id, etag="x", title="")
        assert set(refusal.fields) == {"ticket.etag", "ticket.title"}
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await delete_ticket(api, ticket.id, etag="x")
        assert set(refusal.fields) == {"etag"}


class TestManySessions:
    async def test_ticket_takes_500_and_no_more(self, api: Api, database: str) -> None:
        """The next link is refused and leaves nothing; a change reaches all 500."""
        ticket = await create_ticket(api)
        linked = link_sessions(database, api.tenant, ticket.id, 500)
        session = await api.session()
        with refused(StatusCode.FAILED_PRECONDITION, "TICKET_HAS_TOO_MANY_SESSIONS") as refusal:
            await api.escalate(session.id, ticket_id=ticket.id)
        assert refusal.text == "500 sessions are linked to the ticket, at most 500"
        [violation] = refusal.details["PreconditionFailure"].violations
        assert violation.subject == f"tickets/{ticket.id}"
        assert await get_session(api, session.id) == session
        await update_ticket(api, ticket.id, status=SOLVED)
        assert [(await get_session(api, id_)).revision for id_ in linked] == [2] * 500

    async def test_of_many_links_at_once_only_the_500th_is_made(
        self, api: Api, database: str
    ) -> None:
        """They count under the lock of the ticket."""
        ticket = await create_ticket(api)
        link_sessions(database, api.tenant, ticket.id, 498)
        sessions = [await api.session() for _ in range(8)]

        async def link(session_id: str) -> bool:
            try:
                await api.escalate(session_id, ticket_id=ticket.id)
            except Exception as error:
                with refused(StatusCode.FAILED_PRECONDITION, "TICKET_HAS_TOO_MANY_SESSIONS"):
                    raise error
                return False
            return True

        assert sum(await asyncio.gather(*(link(session.id) for session in sessions))) == 2

    async def test_ticket_that_has_more_cannot_change(self, api: Api, database: str) -> None:
        """As was once possible. Equal values are no change; unlinked from one, it can."""
        ticket = await create_ticket(api)
        linked = link_sessions(database, api.tenant, ticket.id, 500)
        [more] = link_sessions(database, api.tenant, ticket.id, 1)
        with refused(StatusCode.FAILED_PRECONDITION, "TICKET_HAS_TOO_MANY_SESSIONS") as refusal:
            await update_ticket(api, ticket.id, title="new")
        assert refusal.text == "501 sessions are linked to the ticket, at most 500"
        assert await update_ticket(api, ticket.id, title="help") == ticket
        assert (await get_session(api, linked[0])).revision == 1
        with psycopg.connect(database) as connection:
            connection.execute("DELETE FROM chat_tickets WHERE session_id = %s", [more])
        assert (await update_ticket(api, ticket.id, title="new")).revision == 1


@pytest.mark.parametrize("is_busy", [False, True])
async def test_session_linked_while_the_update_waits_is_changed_too(
    start_server: Any,
    fresh_database: str,
    tenant: str,
    monkeypatch: pytest.MonkeyPatch,
    is_busy: bool,
) -> None:
    """If somebody has locked that session by then, the update starts again and waits for it."""
    if is_busy:
        nothing = "SELECT NULL WHERE false"
        monkeypatch.setattr(ticket_update, "LOCK_SESSIONS_AT_ONCE", nothing)
    api = await start_server(fresh_database)
    ticket = await create_ticket(api)
    first = await api.session()
    await api.escalate(first.id, ticket_id=ticket.id)
    with psycopg.connect(fresh_database) as connection:
        connection.execute("SELECT FROM tickets WHERE id = %s FOR NO KEY UPDATE", [ticket.id])
        updating = asyncio.create_task(update_ticket(api, ticket.id, status=SOLVED))
        await wait_for_lock_waiters(fresh_database, 1)
        late = []
        for _ in range(5):
            [session_id] = connection.execute(
                "INSERT INTO chat_sessions (tenant_id) VALUES (%s) RETURNING id", [tenant]
            ).fetchone() or (None,)
            connection.execute(
                "INSERT INTO chat_tickets (tenant_id, session_id, ticket_id) VALUES (%s, %s, %s)",
                [tenant, session_id, ticket.id],
            )
            late.append(str(session_id))
        connection.commit()
    assert (await updating).status == SOLVED
    for session_id in (first.id, *late):
        assert (await get_session(api, session_id)).revision == 2
