"""`chat-ticket-svc export --user` and `erase --user`: one person's data, of one tenant."""

import asyncio
import contextlib
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import grpc.aio
import psycopg
import pytest
from support.client import Api
from support.database import session_locked, store_database, wait_for_lock_waiters
from support.process import Finished, command
from support.tenant_data import counts, many_messages, parsed, terminal
from support.tickets import CLOSED, SOLVED, create_ticket, get_ticket, unlink, update_ticket
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc.store import erasure, retention
from chat_ticket_svc.store.retention import Rule

USER = "kundin ürsula 7"


async def export(database: str, tenant: str, *arguments: str) -> Finished:
    options = ("--tenant", tenant, "--user", USER, *arguments)
    return await command("export", *options, DATABASE_URL=database)


async def erase(database: str, tenant: str, *arguments: str) -> Finished:
    options = ("--tenant", tenant, "--user", USER, *arguments)
    return await command("erase", *options, DATABASE_URL=database)


class Filled:
    """A tenant with two users, and a session of nobody. Each session has a message."""

    def __init__(self, api: Api, database: str):
        self.api = api
        self.database = database

    async def fill(self) -> None:
        self.first, self.second = await self.session(USER), await self.session(USER)
        self.neighbour = await self.session("kundin ürsula 70")
        self.nobody = await self.session("")
        for session_id in (self.first, self.second, self.neighbour, self.nobody):
            message = await self.api.message(session_id, f"of {session_id}")
            await self.api.attachment(message.id)
        self.own = await self.api.escalate(self.first)
        self.shared = await self.api.escalate(self.neighbour)
        await self.api.escalate(self.second, ticket_id=self.shared.ticket_id)
        self.other = await self.api.escalate(self.nobody)

    async def session(self, user_id: str) -> str:
        return (await self.api.session(user_id=user_id)).id

    async def close_tickets(self) -> None:
        for ticket_id in (self.own.ticket_id, self.shared.ticket_id):
            await update_ticket(self.api, ticket_id, status=CLOSED)


@pytest.fixture
async def filled(api: Api, database: str) -> Filled:
    filled = Filled(api, database)
    await filled.fill()
    return filled


def sessions_and_tickets(database: str, tenant: str) -> tuple[set[str], set[str]]:
    with psycopg.connect(database) as connection:
        sessions, tickets = (
            {
                row[0]
                for row in connection.execute(
                    f"SELECT id::text FROM {table} WHERE tenant_id = %s", [tenant]
                )
            }
            for table in ("chat_sessions", "tickets")
        )
    return sessions, tickets


class TestExport:
    async def test_only_what_is_of_the_user_is_exported(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """As of a tenant: the tickets of the user's sessions, then each session."""
        done = await export(database, tenant)
        assert (done.status, done.errors) == (0, "")
        lines = parsed(done)
        assert [type(line) for line in lines] == [
            *(r.Ticket, r.Ticket),
            *(r.ChatSession, r.ChatMessage, r.ChatTicket) * 2,
        ]
        assert [line.id for line in lines[:3]] == [
            *(filled.own.ticket_id, filled.shared.ticket_id, filled.first),
        ]
        assert [line.content for line in lines if isinstance(line, r.ChatMessage)] == [
            *(f"of {filled.first}", f"of {filled.second}"),
        ]
        assert lines[2].user_id == USER
        assert lines[3].attachments

    async def test_user_of_another_tenant_is_not_there(
        self, filled: Filled, other: Api, database: str
    ) -> None:
        """Who has the same id."""
        session_id = (await other.session(user_id=USER)).id
        assert [line.id for line in parsed(await export(database, other.tenant))] == [session_id]
        assert filled.first != session_id

    @pytest.mark.usefixtures("api")
    async def test_user_without_data_is_an_error(self, database: str, tenant: str) -> None:
        """The id may be misspelt."""
        done = await export(database, tenant)
        assert (done.status, done.output) == (1, "")
        assert done.errors == f"chat-ticket-svc: user {USER} of tenant {tenant} has no data\n"

    async def test_many_sessions_are_there_once_in_order(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Of several pages."""
        expected = [(await api.session(user_id=USER)).id for _ in range(45)]
        lines = (await export(database, tenant)).output.splitlines()
        assert [json.loads(line)["chatSession"]["id"] for line in lines] == expected


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("export", ("--user", "")),
        ("erase", ("--user", "", "--yes")),
        ("erase", ("--user", "a\nb", "--yes")),
        ("erase", ("--user", "x" * 256, "--yes")),
        ("erase", ("--user", " x", "--yes")),
        ("export", ("--user", "x", "--session", "00000000-0000-0000-0000-000000000000")),
    ],
)
async def test_user_that_cannot_be_is_refused(
    filled: Filled, database: str, name: str, arguments: tuple[str, ...]
) -> None:
    """Above all an empty one, as of a variable that is not set: it does not mean the tenant."""
    tenant = filled.api.tenant
    before = counts(database, tenant)
    done = await command(name, "--tenant", tenant, *arguments, DATABASE_URL=database)
    assert (done.status, done.output) == (2, "")
    assert counts(database, tenant) == before


class TestErase:
    async def test_everything_of_the_user_is_erased_and_nothing_of_others(
        self, filled: Filled, other: Api, database: str, tenant: str
    ) -> None:
        """With the tickets that served the user's sessions alone."""
        neighbour = Filled(other, database)
        await neighbour.fill()
        before = counts(database, other.tenant)
        await filled.close_tickets()
        done = await erase(database, tenant, "--yes")
        assert done.status == 0, done
        assert "2 sessions, 2 messages, 2 attachments" in done.output
        assert "2 chat tickets, 2 tickets (0 of them active)" in done.output
        assert "tickets that serve other sessions too, and stay: 1" in done.output
        assert sessions_and_tickets(database, tenant) == (
            {filled.neighbour, filled.nobody},
            {filled.shared.ticket_id, filled.other.ticket_id},
        )
        left = counts(database, tenant)
        assert left["chat_messages"] == left["chat_attachments"] == left["chat_tickets"] == 2
        assert counts(database, other.tenant) == before
        again = await erase(database, tenant, "--yes")
        assert again == (0, f"user {USER} of tenant {tenant} has no data\n", "")

    async def test_ids_of_erased_sessions_are_not_used_again(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """What is left of a session, or of a ticket, is its id, until it is swept."""
        await filled.close_tickets()
        _, before = sessions_and_tickets(database, tenant)
        assert (await erase(database, tenant, "--yes")).status == 0
        with psycopg.connect(database) as connection:
            left = connection.execute(
                "SELECT session_id::text FROM chat_session_tombstones WHERE tenant_id = %s",
                [tenant],
            ).fetchall()
            left_of_tickets = connection.execute(
                "SELECT to_jsonb(t) - '{tenant_id,deleted_at,feed_position,feed_bucket}'::text[]"
                "  FROM ticket_tombstones t WHERE tenant_id = %s",
                [tenant],
            ).fetchall()
        assert {row[0] for row in left} == {filled.first, filled.second}
        erased = before - sessions_and_tickets(database, tenant)[1]
        assert erased
        assert sorted(row["ticket_id"] for (row,) in left_of_tickets) == sorted(erased)
        assert {name for (row,) in left_of_tickets for name in row} == {"ticket_id"}

    @pytest.mark.usefixtures("filled")
    async def test_a_dry_run_only_counts(self, database: str, tenant: str) -> None:
        before = counts(database, tenant)
        done = await erase(database, tenant, "--dry-run", "--active-tickets")
        assert done.status == 0
        assert f"user {USER} of tenant {tenant} has 2 sessions, 2 messages" in done.output
        assert counts(database, tenant) == before

    async def test_active_tickets_prevent_the_erase(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """Also one that serves others. With --active-tickets, that one stays, and is theirs."""
        before = counts(database, tenant)
        done = await erase(database, tenant, "--yes")
        assert done.status == 1
        assert f"{filled.own.ticket_id} (open)" in done.errors
        assert f"{filled.shared.ticket_id} (open)" in done.errors
        assert filled.other.ticket_id not in done.errors
        assert counts(database, tenant) == before
        assert (await erase(database, tenant, "--yes", "--active-tickets")).status == 0
        assert sessions_and_tickets(database, tenant) == (
            {filled.neighbour, filled.nobody},
            {filled.shared.ticket_id, filled.other.ticket_id},
        )
        await unlink(filled.api, filled.shared.id)  # of the neighbour's session, which has it still

    async def test_ticket_of_two_sessions_of_the_user_is_erased_with_the_last(
        self, api: Api, database: str, tenant: str
    ) -> None:
        """Though they are not in one batch."""
        sessions = [(await api.session(user_id=USER)).id for _ in range(3)]
        for session_id in sessions:
            many_messages(database, tenant, session_id, erasure.ROWS_PER_BATCH)
        link = await api.escalate(sessions[0])
        await api.escalate(sessions[2], ticket_id=link.ticket_id)
        await update_ticket(api, link.ticket_id, status=CLOSED)
        assert (await erase(database, tenant, "--yes")).status == 0
        assert not any(counts(database, tenant).values())

    @pytest.mark.parametrize(("typed", "is_erased"), [(USER, True), ("yes", False), ("", False)])
    async def test_on_a_terminal_the_user_is_to_be_typed(
        self, filled: Filled, database: str, typed: str, is_erased: bool
    ) -> None:
        """Not the tenant."""
        tenant = filled.api.tenant
        with terminal() as (ours, theirs):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "chat_ticket_svc", "erase", "--active-tickets"),
                *("--tenant", tenant, "--user", USER),
                env={**os.environ, "DATABASE_URL": database, "LC_ALL": "C.UTF-8"},
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
            )
            os.write(ours, f"{typed}\n".encode())
            assert await process.wait() == (0 if is_erased else 1)
        assert counts(database, tenant)["chat_sessions"] == (2 if is_erased else 4)

    async def test_erase_resumes_after_it_was_killed(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """A session is erased whole, and its ticket with it."""
        await filled.close_tickets()
        with psycopg.connect(database) as connection:
            connection.execute(
                "DELETE FROM chat_messages WHERE session_id = ANY (%s::uuid[])",
                [[filled.first, filled.second]],
            )
        for session_id in (filled.first, filled.second):
            many_messages(database, tenant, session_id, 10_000)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chat_ticket_svc", "erase", "--yes"),
            *("--tenant", tenant, "--user", USER),
            env={**os.environ, "DATABASE_URL": database},
        )
        while counts(database, tenant)["chat_messages"] == 20_002:
            await asyncio.sleep(0.01)
        process.kill()
        await process.wait()
        left = counts(database, tenant)
        is_second_left = left["chat_sessions"] == 3
        assert left["chat_messages"] == (10_002 if is_second_left else 2)
        assert left["tickets"] == 2, "of the first session"
        assert (await erase(database, tenant, "--yes")).status == 0
        assert counts(database, tenant)["chat_messages"] == 2

    async def test_ticket_opened_during_the_erase_stays_with_its_session(
        self, filled: Filled, database: str, tenant: str
    ) -> None:
        """It was not asked for. The others are erased."""
        await filled.close_tickets()
        session_id = await filled.session(USER)
        await filled.api.escalate(session_id)
        async with store_database(database) as db:
            deleted = [n async for n in erasure.erase(db, tenant, USER, active_tickets=False)]
        assert sum(deleted) == 7
        sessions, tickets = sessions_and_tickets(database, tenant)
        assert sessions == {filled.neighbour, filled.nobody, session_id}
        assert filled.own.ticket_id not in tickets

    async def test_watchers_receive_the_deletion(
        self, api: Api, database: str, tenant: str
    ) -> None:
        session_id = (await api.session(user_id=USER)).id
        async with watching(api, session_id) as watcher:
            await watcher.until("caught_up")
            assert (await erase(database, tenant, "--yes")).status == 0
            assert (await watcher.next()).HasField("session_deleted")
            await watcher.end()


@pytest.mark.parametrize("user_id", [None, USER])
async def test_sessions_are_locked_before_their_tickets(
    start_server: Any, fresh_database: str, user_id: str | None
) -> None:
    """As by all others, so that an erase and a call wait for each other, and never deadlock."""
    api = await start_server(fresh_database)
    session_ids = [(await api.session(user_id=USER)).id for _ in range(3)]
    link = await api.escalate(session_ids[1])
    await api.escalate(session_ids[0], ticket_id=link.ticket_id)
    await update_ticket(api, link.ticket_id, status=CLOSED)

    async def erase_all() -> None:
        async with store_database(fresh_database) as db:
            async for _ in erasure.erase(db, api.tenant, user_id, active_tickets=False):
                pass

    # The last in the order of ids: the others are locked by then.
    with session_locked(fresh_database, max(session_ids)):
        erasing = asyncio.create_task(erase_all())
        await wait_for_lock_waiters(fresh_database, 1)
        with psycopg.connect(fresh_database) as connection:
            for table in ("tickets", "chat_tickets"):
                connection.execute(f"SELECT FROM {table} FOR UPDATE NOWAIT")  # type: ignore[arg-type]
            free = connection.execute("SELECT FROM chat_sessions FOR UPDATE SKIP LOCKED").rowcount
        assert free == 0, "sessions are locked in the order of their ids"
    await erasing
    assert not any(counts(fresh_database, api.tenant).values())


async def test_ticket_that_is_linked_meanwhile_stays(
    filled: Filled, database: str, tenant: str
) -> None:
    """The link comes first or finds no ticket: nothing is left that points nowhere."""
    await filled.close_tickets()
    new = await filled.api.session()
    with session_locked(database, filled.second):
        erasing = asyncio.create_task(erase(database, tenant, "--yes"))
        await wait_for_lock_waiters(database, 1)
        await filled.api.escalate(new.id, ticket_id=filled.own.ticket_id)
    assert (await erasing).status == 0
    assert (await get_ticket(filled.api, filled.own.ticket_id)).id == filled.own.ticket_id


@pytest.mark.parametrize("deletion", ["tenant", "user", "expire"])
async def test_no_deadlock_with_calls_on_the_same_tickets(
    start_server: Any, fresh_database: str, deletion: str
) -> None:
    """Links, changes of tickets and a deletion wait for each other in one order."""
    api = await start_server(fresh_database)
    session_ids = [(await api.session(user_id=USER)).id for _ in range(60)]
    tickets = [(await create_ticket(api, title="help")).id for _ in range(3)]
    is_deleted = asyncio.Event()

    async def link(number: int) -> None:
        for session_id in session_ids[number::6]:
            with contextlib.suppress(grpc.aio.AioRpcError):
                ticket_id = tickets[random.randrange(3)]
                await api.escalate(session_id, ticket_id=ticket_id)

    async def change(ticket_id: str) -> None:
        while not is_deleted.is_set():
            for status in (SOLVED, CLOSED):
                with contextlib.suppress(grpc.aio.AioRpcError):
                    await update_ticket(api, ticket_id, status=status)

    async def delete() -> None:
        rule = Rule(older_than=timedelta(), statuses=None)
        async with store_database(fresh_database, lock_timeout_ms=10_000) as db:
            while sessions_and_tickets(fresh_database, api.tenant)[0]:
                if deletion == "expire":
                    deleting: AsyncIterator[Any] = retention.expire(db, api.tenant, rule)
                else:
                    user_id = USER if deletion == "user" else None
                    deleting = erasure.erase(db, api.tenant, user_id, active_tickets=False)
                async for _ in deleting:
                    pass
        is_deleted.set()

    await asyncio.gather(
        delete(), *(link(number) for number in range(6)), *(change(each) for each in tickets)
    )
    with psycopg.connect(fresh_database) as connection:
        connection.execute("SELECT pg_stat_force_next_flush()")
        deadlocks = connection.execute(
            "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        ).fetchone()
    assert deadlocks == (0,)
