"""Concurrent calls: in any order the rules hold, and no write is lost.

Each round starts its calls together on connections of their own. Afterwards the database itself
is asked whether the invariants hold.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio
import psycopg
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode
from support.client import Api, a_file, an_id
from support.messages import (
    delete_message,
    get_message,
    redact_message,
    set_metadata,
    user_message,
)
from support.sessions import ARCHIVED, get_session, set_status
from support.tickets import CLOSED, OPEN, unlink, update_ticket

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import DeleteTicketRequest, UpdateTicketRequest

ROUNDS = 30

# The errors that an operation may get when it loses a race.
LOST = {
    StatusCode.NOT_FOUND,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ALREADY_EXISTS,
    StatusCode.ABORTED,
}

INVARIANTS = {
    "has_ticket is true exactly while linked": """
        SELECT count(*) FROM chat_sessions s
         WHERE tenant_id = %(tenant)s AND has_ticket <> EXISTS (
             SELECT FROM chat_tickets ct WHERE ct.tenant_id = s.tenant_id AND ct.session_id = s.id)
    """,
    "sequences are a part of the revisions": """
        SELECT count(*) FROM chat_messages m
          JOIN chat_sessions s ON s.tenant_id = m.tenant_id AND s.id = m.session_id
         WHERE m.tenant_id = %(tenant)s AND NOT m.revision BETWEEN m.sequence AND s.revision
    """,
    "no revision is used twice": """
        SELECT count(*) FROM (
            SELECT session_id, revision FROM (
                SELECT session_id, sequence AS revision FROM chat_messages
                 WHERE tenant_id = %(tenant)s
                UNION ALL
                SELECT session_id, revision FROM chat_messages
                 WHERE tenant_id = %(tenant)s AND revision > sequence
                UNION ALL
                SELECT session_id, revision FROM chat_message_tombstones
                 WHERE tenant_id = %(tenant)s) AS used
             GROUP BY session_id, revision HAVING count(*) > 1) AS twice
    """,
    "time follows the sequence": """
        SELECT count(*) FROM (
            SELECT created_at <= lag(created_at)
                       OVER (PARTITION BY session_id ORDER BY sequence) AS backwards
              FROM chat_messages WHERE tenant_id = %(tenant)s) AS pairs
         WHERE backwards
    """,
    "a redacted message says nothing": """
        SELECT count(*) FROM chat_messages m
         WHERE tenant_id = %(tenant)s AND redacted
           AND (content <> '[redacted]' OR metadata IS NOT NULL OR EXISTS (
               SELECT FROM chat_attachments a
                WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id))
    """,
    "no id is both alive and buried": """
        SELECT count(*) FROM chat_messages m
          JOIN chat_message_tombstones t ON t.tenant_id = m.tenant_id AND t.message_id = m.id
         WHERE m.tenant_id = %(tenant)s
    """,
}


@pytest.fixture
async def callers(server: Any, tenant: str) -> AsyncIterator[list[Api]]:
    """Clients with a connection each."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(Api(f"127.0.0.1:{server.port}", tenant))
            for _ in range(4)
        ]


async def race(*operations: Callable[[], Awaitable[Any]]) -> list[StatusCode]:
    """Start all at once and return their outcomes. A call may lose, but not fail otherwise.

    Which is sent first changes by chance: the same one would win each round on an idle machine.
    """
    barrier = asyncio.Barrier(len(operations))

    async def run(operation: Callable[[], Awaitable[Any]]) -> StatusCode:
        await barrier.wait()
        try:
            await operation()
        except grpc.aio.AioRpcError as error:
            assert error.code() in LOST, error
            return error.code()
        return StatusCode.OK

    order = random.sample(range(len(operations)), len(operations))
    outcomes = await asyncio.gather(*(run(operations[number]) for number in order))
    return [outcomes[order.index(number)] for number in range(len(operations))]


def assert_invariants(database: str, tenant: str) -> None:
    with psycopg.connect(database) as connection:
        for name, sql in INVARIANTS.items():
            row = connection.execute(sql, {"tenant": tenant}).fetchone()  # type: ignore[call-overload]
            assert row == (0,), name


async def delete_session(api: Api, session_id: str) -> None:
    await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session_id))


async def set_ticket(api: Api, ticket_id: str, status: int) -> None:
    request = UpdateTicketRequest(
        ticket=r.Ticket(id=ticket_id, status=status), update_mask=FieldMask(paths=["status"])
    )
    await api.tickets.UpdateTicket(request)


async def exists(api: Api, session_id: str) -> bool:
    try:
        await get_session(api, session_id)
    except grpc.aio.AioRpcError as error:
        assert error.code() is StatusCode.NOT_FOUND
        return False
    return True


async def test_escalate_archive_delete_append(callers: list[Api], database: str) -> None:
    """The four together: an escalation that was acknowledged keeps its session."""
    one, two, three, four = callers
    seen = set()
    for _ in range(ROUNDS):
        session_id = (await one.session()).id
        link, archive, drop, append = await race(
            lambda: one.escalate(session_id),
            lambda: set_status(two, session_id, ARCHIVED),
            lambda: delete_session(three, session_id),
            lambda: four.message(session_id),
        )
        assert (link, drop) != (StatusCode.OK, StatusCode.OK), "a committed ticket was destroyed"
        assert await exists(one, session_id) == (drop is not StatusCode.OK)
        seen.add((link, archive, drop, append))
    assert len(seen) > 1, "the calls never raced"
    assert_invariants(database, one.tenant)


async def test_escalate_against_archive(callers: list[Api], database: str) -> None:
    """Never linked after archiving: either the ticket came first, or it is rejected."""
    one, two, *_ = callers
    for _ in range(ROUNDS):
        session_id = (await one.session()).id
        link, archive = await race(
            lambda: one.escalate(session_id),
            lambda: set_status(two, session_id, ARCHIVED),
        )
        assert archive is StatusCode.OK
        assert link in (StatusCode.OK, StatusCode.FAILED_PRECONDITION)
        with psycopg.connect(database) as connection:
            rows = connection.execute(
                "SELECT ct.created_at < s.updated_at FROM chat_sessions s"
                " JOIN chat_tickets ct ON ct.tenant_id = s.tenant_id AND ct.session_id = s.id"
                " WHERE s.tenant_id = %s AND s.id = %s",
                [one.tenant, session_id],
            ).fetchall()
        assert rows == ([(True,)] if link is StatusCode.OK else [])
    assert_invariants(database, one.tenant)


async def test_two_escalations_of_one_session(callers: list[Api], database: str) -> None:
    """One wins; no ticket of the others is left behind."""
    for _ in range(ROUNDS):
        session_id = (await callers[0].session()).id
        codes = await race(*(lambda api=api: api.escalate(session_id) for api in callers))
        assert sorted(code.name for code in codes) == ["ALREADY_EXISTS"] * 3 + ["OK"]
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "SELECT (SELECT count(*) FROM tickets WHERE tenant_id = %(t)s),"
            " (SELECT count(*) FROM chat_tickets WHERE tenant_id = %(t)s)",
            {"t": callers[0].tenant},
        ).fetchone()
    assert row == (ROUNDS, ROUNDS)
    assert_invariants(database, callers[0].tenant)


async def test_delete_against_reopened_ticket(callers: list[Api]) -> None:
    """A ticket that is reopened during a delete prevents the delete, or is too late."""
    one, two, *_ = callers
    for _ in range(ROUNDS):
        session_id = (await one.session()).id
        link = await one.escalate(session_id)
        await set_ticket(one, link.ticket_id, CLOSED)
        drop, reopen = await race(
            lambda: delete_session(one, session_id),
            lambda: set_ticket(two, link.ticket_id, OPEN),
        )
        assert reopen is StatusCode.OK
        assert drop in (StatusCode.OK, StatusCode.FAILED_PRECONDITION)
        assert await exists(one, session_id) == (drop is StatusCode.FAILED_PRECONDITION)


async def test_redact_against_what_the_message_gets(callers: list[Api], database: str) -> None:
    """Metadata and files are refused, or they are gone: nothing survives a redaction."""
    one, two, three, four = callers
    seen = set()
    for round_ in range(ROUNDS):
        session_id = (await one.session()).id
        message = await one.message(session_id, metadata_json="{}", attachments=[a_file()])
        take = delete_message if round_ % 2 else redact_message
        redact, attach, set_, taken = await race(
            lambda: redact_message(one, message.id),
            lambda: two.attachment(message.id),
            lambda: set_metadata(three, message.id, '{"a": 1}'),
            lambda: take(four, message.id),
        )
        assert taken is StatusCode.OK
        if take is redact_message:
            assert redact is StatusCode.OK
            stored = await get_message(one, message.id)
            assert (stored.redacted, stored.metadata_json) == (True, "")
            assert not stored.attachments
        seen.add((redact, attach, set_, taken))
    assert len(seen) > 2, "the calls never raced"
    assert_invariants(database, one.tenant)


async def test_answer_of_an_update_is_of_that_update(callers: list[Api]) -> None:
    """The answer has the title that the call set, whatever others set just after."""
    ticket_id = (await callers[0].escalate((await callers[0].session()).id)).ticket_id
    answered: list[bool] = []

    async def rename(api: Api, title: str) -> None:
        answered.append((await update_ticket(api, ticket_id, title=title)).title == title)

    for round_ in range(ROUNDS):
        await asyncio.gather(*(rename(api, f"{round_} {n}") for n, api in enumerate(callers * 2)))
    assert all(answered), f"{answered.count(False)} answers of {len(answered)} are of another call"


async def test_unlink_against_delete(callers: list[Api], database: str) -> None:
    """Unlinking, deleting the ticket and deleting the session: no deadlock reaches a caller."""
    one, two, three, _ = callers
    for _ in range(ROUNDS):
        session_id = (await one.session()).id
        link = await one.escalate(session_id)
        codes = await race(
            lambda: unlink(one, link.id),
            lambda: delete_session(two, session_id),
            lambda: three.tickets.DeleteTicket(DeleteTicketRequest(ticket_id=link.ticket_id)),
        )
        assert StatusCode.ABORTED not in codes
        assert codes[0] is StatusCode.OK
    assert_invariants(database, one.tenant)


async def test_everything_on_one_session(callers: list[Api], database: str) -> None:
    """Appends, batches, metadata, deletes and files of many callers: exact, in any order."""
    one = callers[0]
    session_id = (await one.session()).id

    async def work(api: Api, round_: int) -> None:
        message = await api.message(session_id, f"{round_}")
        request = BatchCreateChatMessagesRequest(
            session_id=session_id, messages=[user_message("a")] * 3
        )
        await asyncio.gather(
            set_metadata(api, message.id, '{"a": 1}'),
            api.attachment(message.id),
            api.messages.BatchCreateChatMessages(request),
            return_exceptions=False,
        )
        if round_ % 2:
            await delete_message(api, message.id)

    for round_ in range(10):
        await asyncio.gather(*(work(api, round_) for api in callers))
    # 1 message, 3 of the batch, metadata, a file: 6 changes; and every other round a deletion.
    assert (await get_session(one, session_id)).revision == 4 * (10 * 6 + 5)
    assert_invariants(database, one.tenant)


async def test_create_against_delete_of_the_same_message(callers: list[Api], database: str) -> None:
    """A late repeat of a create never brings a deleted message back, here or elsewhere."""
    one, two, three, _ = callers
    here, elsewhere = (await one.session()).id, (await one.session()).id
    for _ in range(ROUNDS):
        message_id = an_id()
        await one.message(here, id=message_id)
        await race(
            lambda: delete_message(one, message_id),
            lambda: two.message(here, id=message_id),
            lambda: three.message(elsewhere, id=message_id),
        )
    assert_invariants(database, one.tenant)
    with psycopg.connect(database) as connection:
        row = connection.execute(
            "SELECT count(*) FROM chat_messages WHERE tenant_id = %s", [one.tenant]
        ).fetchone()
    assert row == (0,), "every message was deleted, and stays so"
