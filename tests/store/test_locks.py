"""Calls that wait for a lock, lose a commit, or exceed their deadline."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.attachments import delete_attachment
from support.client import a_file, an_id, refused
from support.database import (
    execute,
    raise_on_insert,
    session_locked,
    terminate_at_commit,
    wait_for_lock_waiters,
)
from support.messages import delete_message, redact_message, set_metadata, user_message
from support.sessions import ACTIVE, RESOLVED, delete_session, get_session, set_status
from support.tickets import create_ticket, delete_ticket, unlink, update_ticket

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest


@pytest.mark.parametrize(
    "change",
    ["metadata", "attach", "detach", "redact", "delete", "unlink", "link", "drop", "status"],
)
async def test_session_is_locked_before_anything_else(
    start_server: Any, fresh_database: str, change: str
) -> None:
    """A change that waits for the session's lock holds no other lock, so it cannot deadlock."""
    api = await start_server(fresh_database)
    session, other = await api.session(), await api.session()
    file = a_file(id=an_id())
    message = await api.message(session.id, attachments=[file])
    link = await api.escalate(session.id)
    operation = {
        "metadata": lambda: set_metadata(api, message.id, "{}"),
        "attach": lambda: api.attachment(message.id),
        "detach": lambda: delete_attachment(api, file.id),
        "redact": lambda: redact_message(api, message.id),
        "delete": lambda: delete_message(api, message.id),
        "unlink": lambda: unlink(api, link.id),
        "link": lambda: api.escalate(other.id, ticket=r.Ticket(id=link.ticket_id, title="x")),
        "drop": lambda: delete_session(api, other.id),
        "status": lambda: set_status(api, session.id, RESOLVED),
    }[change]
    with session_locked(fresh_database, session.id), session_locked(fresh_database, other.id):
        waiting = asyncio.create_task(operation())
        await wait_for_lock_waiters(fresh_database, 1)
        with psycopg.connect(fresh_database) as connection:
            for table in ("chat_messages", "chat_attachments", "chat_tickets", "tickets"):
                connection.execute(f"SELECT FROM {table} FOR UPDATE NOWAIT")  # type: ignore[arg-type]
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("change", ["metadata", "attach", "redact"])
async def test_message_deleted_while_its_change_waited(
    start_server: Any, fresh_database: str, change: str
) -> None:
    """A change that waited for the lock behind a deletion is NOT_FOUND."""
    api = await start_server(fresh_database)
    message = await api.message((await api.session()).id)
    with session_locked(fresh_database, message.session_id):
        deleting = asyncio.create_task(delete_message(api, message.id))
        await wait_for_lock_waiters(fresh_database, 1)
        changing = asyncio.create_task(
            {
                "metadata": lambda: set_metadata(api, message.id, "{}"),
                "attach": lambda: api.attachment(message.id),
                "redact": lambda: redact_message(api, message.id),
            }[change]()
        )
        await wait_for_lock_waiters(fresh_database, 2)
    await deleting
    with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
        await changing
    assert (await get_session(api, message.session_id)).revision == 2


@pytest.mark.parametrize(
    ("change", "table", "event", "safe"),
    [
        ("create", "chat_sessions", "INSERT", True),
        ("append", "chat_messages", "INSERT", True),
        ("metadata", "chat_messages", "UPDATE", True),
        ("attach", "chat_attachments", "INSERT", True),
        ("redact", "chat_messages", "UPDATE", True),
        ("redact a revision", "chat_messages", "UPDATE", True),
        ("link", "chat_tickets", "INSERT", True),
        ("status", "chat_sessions", "UPDATE", True),
        ("rename", "tickets", "UPDATE", True),
        ("status of a revision", "chat_sessions", "UPDATE", False),
        ("delete", "chat_messages", "DELETE", False),
        ("detach", "chat_attachments", "DELETE", False),
        ("unlink", "chat_tickets", "DELETE", False),
        ("drop", "chat_sessions", "DELETE", False),
        ("delete ticket", "tickets", "DELETE", False),
        ("create ticket", "tickets", "INSERT", True),
        ("rename of a revision", "tickets", "UPDATE", False),
    ],
)
async def test_lost_commit_is_repeated_only_if_that_is_safe(
    start_server: Any, fresh_database: str, change: str, table: str, event: str, safe: bool
) -> None:
    """An idempotent call is retried and succeeds; any other fails with OUTCOME_UNKNOWN.

    It has RetryInfo unless the call, repeated as it is, would fail for its own success. A deletion
    that is repeated is NOT_FOUND, which callers take as success.
    """
    api = await start_server(fresh_database, pool_size=2)
    session, empty = await api.session(), await api.session()
    message = await api.message(session.id, attachments=[a_file()])
    link = await api.escalate(session.id)
    gone = await api.escalate(empty.id)
    await unlink(api, gone.id)
    operation = {
        "create": lambda: api.session(),
        "append": lambda: api.message(empty.id),
        "metadata": lambda: set_metadata(api, message.id, "{}"),
        "attach": lambda: api.attachment(message.id),
        "redact": lambda: redact_message(api, message.id),
        "redact a revision": lambda: redact_message(api, message.id, message.etag),
        "link": lambda: api.escalate(empty.id),
        "status": lambda: set_status(api, empty.id, RESOLVED),
        "rename": lambda: update_ticket(api, link.ticket_id, title="x"),
        "create ticket": lambda: create_ticket(api),
        "rename of a revision": lambda: update_ticket(api, link.ticket_id, etag="0", title="x"),
        "status of a revision": lambda: set_status(api, empty.id, RESOLVED, etag="2"),
        "delete": lambda: delete_message(api, message.id),
        "detach": lambda: delete_attachment(api, message.attachments[0].id),
        "unlink": lambda: unlink(api, link.id),
        "drop": lambda: delete_session(api, empty.id),
        "delete ticket": lambda: delete_ticket(api, gone.ticket_id),
    }[change]
    terminate_at_commit(fresh_database, table, event, only_first=True)
    if safe:
        await operation()
    else:
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            await operation()
        assert ("RetryInfo" in refusal.details) == (not change.endswith("of a revision"))


async def test_etag_is_compared_after_waiting_for_a_concurrent_change(
    start_server: Any, fresh_database: str
) -> None:
    """Of two calls with the same etag, only the first to get the lock changes anything."""
    api = await start_server(fresh_database)
    session = await api.session()
    with psycopg.connect(fresh_database) as connection:
        connection.execute("UPDATE chat_sessions SET revision = revision + 1")
        updating = asyncio.create_task(set_status(api, session.id, RESOLVED, etag=session.etag))
        await wait_for_lock_waiters(fresh_database, 1)
        connection.commit()
    with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
        await updating
    assert (await get_session(api, session.id)).status == ACTIVE


@pytest.mark.parametrize("table", ["chat_tickets", "chat_attachments"])
async def test_id_inserted_by_another_while_the_insert_waited(
    start_server: Any, fresh_database: str, tenant: str, table: str
) -> None:
    """An id that a concurrent call inserts after the lookup is ALREADY_EXISTS."""
    api = await start_server(fresh_database)
    session, elsewhere = await api.session(), await api.session()
    message, other_message = await api.message(session.id), await api.message(elsewhere.id)
    ticket_id, taken_id = (await api.escalate((await api.session()).id)).ticket_id, an_id()
    insert = {
        "chat_tickets": "INSERT INTO chat_tickets (tenant_id, id, session_id, ticket_id)"
        f" VALUES ('{tenant}', '{taken_id}', '{elsewhere.id}', '{ticket_id}')",
        "chat_attachments": "INSERT INTO chat_attachments"
        " (tenant_id, id, message_id, file_url, file_name, file_type)"
        f" VALUES ('{tenant}', '{taken_id}', '{other_message.id}', 'https://a/', 'a', 'a/b')",
    }[table]
    with psycopg.connect(fresh_database) as connection:
        connection.execute(insert)  # type: ignore[call-overload]
        calling = asyncio.create_task(
            api.escalate(session.id, chat_ticket_id=taken_id)
            if table == "chat_tickets"
            else api.attachment(message.id, id=taken_id)
        )
        await wait_for_lock_waiters(fresh_database, 1)
        connection.commit()
    with refused(StatusCode.ALREADY_EXISTS, f"{table.upper()[:-1]}_ALREADY_EXISTS"):
        await calling


async def test_callers_deadline_applies_before_ours(start_server: Any, fresh_database: str) -> None:
    """A caller's deadline replaces the server's default, even if it is longer."""
    api = await start_server(fresh_database, unary_timeout_seconds=0.2)
    session = await api.session()
    with session_locked(fresh_database, session.id):
        waiting = asyncio.create_task(api.message(session.id))
        await wait_for_lock_waiters(fresh_database, 1)
        await asyncio.sleep(0.5)
    assert (await waiting).sequence == 1


async def test_create_with_an_unknown_outcome_names_the_id_to_repeat_it_with(
    start_server: Any, fresh_database: str
) -> None:
    """Retried once by the server, an id-less create has no RetryInfo, but the id that it got.

    Repeated with this id it is safe. So a create with an id has RetryInfo. A batch of more messages
    than an error can name has neither.
    """
    api = await start_server(fresh_database, pool_size=2)
    session = await api.session()
    parent = await api.message(session.id)

    async def batch(size: int, message_ids: str = "") -> str:
        ids = message_ids.split(",") if message_ids else [""] * size
        messages = [user_message("a", id=message_id) for message_id in ids]
        request = BatchCreateChatMessagesRequest(session_id=session.id, messages=messages)
        created = (await api.messages.BatchCreateChatMessages(request)).messages
        return ",".join(message.id for message in created)

    creates: dict[str, tuple[str, Callable[[str], Awaitable[Any]]]] = {
        "session_id": ("chat_sessions", lambda id_: api.session(id=id_)),
        "message_id": ("chat_messages", lambda id_: api.message(session.id, id=id_)),
        "message_ids": ("chat_messages", lambda ids: batch(3, ids)),
        "attachment_id": ("chat_attachments", lambda id_: api.attachment(parent.id, id=id_)),
        "chat_ticket_id": (
            "chat_tickets",
            lambda id_: api.escalate(session.id, chat_ticket_id=id_),
        ),
        "ticket_id": ("tickets", lambda id_: create_ticket(api, id=id_)),
    }
    for key, (table, create) in creates.items():
        terminate_at_commit(fresh_database, table, "INSERT")
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            async with asyncio.timeout(10):
                await create("")
        assert list(refusal.info.metadata) == [key]
        assert "RetryInfo" not in refusal.details
        assigned = refusal.info.metadata[key]
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            await create(assigned)
        assert not refusal.info.metadata
        assert "RetryInfo" in refusal.details
        if key == "message_ids":
            with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
                await batch(101)
            assert not refusal.info.metadata
            assert "RetryInfo" not in refusal.details
        execute(fresh_database, f"DROP TRIGGER hang_up ON {table}")
        created = await create(assigned)
        assert created == await create(assigned)
        assert (created if key == "message_ids" else created.id) == assigned


async def test_write_that_may_have_been_stored_is_never_said_to_have_failed(
    start_server: Any, fresh_database: str
) -> None:
    """What the second attempt meets says nothing of the first, whose connection was lost."""
    api = await start_server(fresh_database, pool_size=2)
    execute(fresh_database, "CREATE SEQUENCE attempts")
    for sqlstate in ("40001", "55P03", "25006", "53100", "0A000"):
        raise_on_insert(
            fresh_database,
            "IF nextval('attempts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid());"
            f" ELSE RAISE 'x' USING ERRCODE = '{sqlstate}'; END IF",
        )
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await api.session()
        execute(fresh_database, "ALTER SEQUENCE attempts RESTART")
