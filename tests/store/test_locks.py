"""Calls that wait for a lock, lose a commit, or exceed their deadline."""

import asyncio
from typing import Any

import psycopg
import pytest
from grpc import StatusCode
from support.client import a_file, an_id, refused
from test_attachments import delete as delete_file
from test_errors import execute, locked, raise_on_insert
from test_messages import delete, set_metadata
from test_notifications import pair, shared  # noqa: F401 - fixtures
from test_sessions import ACTIVE, RESOLVED, set_status
from test_tickets import delete as delete_ticket
from test_tickets import delete_session, session_of, unlink, update

from chat_ticket.v1 import resources_pb2 as r


async def until_waiting(database: str, count: int) -> None:
    """Until so many statements wait for a lock."""
    async with asyncio.timeout(10):
        async with await psycopg.AsyncConnection.connect(database, autocommit=True) as watch:
            while True:
                cursor = await watch.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                )
                if await cursor.fetchone() == (count,):
                    return
                await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "change", ["metadata", "attach", "detach", "delete", "unlink", "link", "drop", "status"]
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
        "detach": lambda: delete_file(api, file.id),
        "delete": lambda: delete(api, message.id),
        "unlink": lambda: unlink(api, link.id),
        "link": lambda: api.escalate(other.id, ticket=r.Ticket(id=link.ticket_id, title="x")),
        "drop": lambda: delete_session(api, other.id),
        "status": lambda: set_status(api, session.id, RESOLVED),
    }[change]
    with locked(fresh_database, session.id), locked(fresh_database, other.id):
        waiting = asyncio.create_task(operation())
        await until_waiting(fresh_database, 1)
        with psycopg.connect(fresh_database) as connection:
            for table in ("chat_messages", "chat_attachments", "chat_tickets", "tickets"):
                connection.execute(f"SELECT FROM {table} FOR UPDATE NOWAIT")  # type: ignore[arg-type]
    await asyncio.gather(waiting, return_exceptions=True)


@pytest.mark.parametrize("change", ["metadata", "attach"])
async def test_message_deleted_while_its_change_waited(
    start_server: Any, fresh_database: str, change: str
) -> None:
    """The change that comes after a deletion in the queue for the lock is NOT_FOUND."""
    api = await start_server(fresh_database)
    message = await api.message((await api.session()).id)
    with locked(fresh_database, message.session_id):
        deleting = asyncio.create_task(delete(api, message.id))
        await until_waiting(fresh_database, 1)
        changing = asyncio.create_task(
            set_metadata(api, message.id, "{}")
            if change == "metadata"
            else api.attachment(message.id)
        )
        await until_waiting(fresh_database, 2)
    await deleting
    with refused(StatusCode.NOT_FOUND, "CHAT_MESSAGE_NOT_FOUND"):
        await changing
    assert (await session_of(api, message.session_id)).revision == 2


@pytest.mark.parametrize(
    ("change", "table", "event", "safe"),
    [
        ("create", "chat_sessions", "INSERT", True),
        ("append", "chat_messages", "INSERT", True),
        ("metadata", "chat_messages", "UPDATE", True),
        ("attach", "chat_attachments", "INSERT", True),
        ("link", "chat_tickets", "INSERT", True),
        ("status", "chat_sessions", "UPDATE", True),
        ("rename", "tickets", "UPDATE", True),
        ("status of a revision", "chat_sessions", "UPDATE", False),
        ("delete", "chat_messages", "DELETE", False),
        ("detach", "chat_attachments", "DELETE", False),
        ("unlink", "chat_tickets", "DELETE", False),
        ("drop", "chat_sessions", "DELETE", False),
        ("delete ticket", "tickets", "DELETE", False),
    ],
)
async def test_lost_commit_is_repeated_only_if_that_is_safe(
    start_server: Any, fresh_database: str, change: str, table: str, event: str, safe: bool
) -> None:
    """An idempotent call is retried and succeeds; any other fails with OUTCOME_UNKNOWN."""
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
        "link": lambda: api.escalate(empty.id),
        "status": lambda: set_status(api, empty.id, RESOLVED),
        "rename": lambda: update(api, link.ticket_id, title="x"),
        "status of a revision": lambda: set_status(api, empty.id, RESOLVED, etag="2"),
        "delete": lambda: delete(api, message.id),
        "detach": lambda: delete_file(api, message.attachments[0].id),
        "unlink": lambda: unlink(api, link.id),
        "drop": lambda: delete_session(api, empty.id),
        "delete ticket": lambda: delete_ticket(api, gone.ticket_id),
    }[change]
    execute(
        fresh_database,
        "CREATE SEQUENCE attempts",
        "CREATE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('attempts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;"
        " RETURN NULL; END $$",
        f"CREATE CONSTRAINT TRIGGER hang_up AFTER {event} ON {table}"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hang_up()",
    )
    if safe:
        await operation()
    else:
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
            await operation()


async def test_etag_is_judged_behind_the_change_it_waited_for(
    start_server: Any, fresh_database: str
) -> None:
    """Of two calls with the same etag, only the first to get the lock changes anything."""
    api = await start_server(fresh_database)
    session = await api.session()
    with psycopg.connect(fresh_database) as connection:
        connection.execute("UPDATE chat_sessions SET revision = revision + 1")
        updating = asyncio.create_task(set_status(api, session.id, RESOLVED, etag=session.etag))
        await until_waiting(fresh_database, 1)
        connection.commit()
    with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
        await updating
    assert (await session_of(api, session.id)).status == ACTIVE


@pytest.mark.parametrize("table", ["chat_tickets", "chat_attachments"])
async def test_id_taken_while_the_insert_waited(
    start_server: Any, fresh_database: str, tenant: str, table: str
) -> None:
    """An id that a concurrent call inserts after the lookup is ALREADY_EXISTS."""
    api = await start_server(fresh_database)
    session, elsewhere = await api.session(), await api.session()
    message, other_message = await api.message(session.id), await api.message(elsewhere.id)
    ticket_id, taken = (await api.escalate((await api.session()).id)).ticket_id, an_id()
    insert = {
        "chat_tickets": "INSERT INTO chat_tickets (tenant_id, id, session_id, ticket_id)"
        f" VALUES ('{tenant}', '{taken}', '{elsewhere.id}', '{ticket_id}')",
        "chat_attachments": "INSERT INTO chat_attachments"
        " (tenant_id, id, message_id, file_url, file_name, file_type)"
        f" VALUES ('{tenant}', '{taken}', '{other_message.id}', 'https://a/', 'a', 'a/b')",
    }[table]
    with psycopg.connect(fresh_database) as connection:
        connection.execute(insert)  # type: ignore[call-overload]
        calling = asyncio.create_task(
            api.escalate(session.id, chat_ticket_id=taken)
            if table == "chat_tickets"
            else api.attachment(message.id, id=taken)
        )
        await until_waiting(fresh_database, 1)
        connection.commit()
    with refused(StatusCode.ALREADY_EXISTS, f"{table.upper()[:-1]}_ALREADY_EXISTS"):
        await calling


async def test_callers_own_deadline_goes_before_ours(
    start_server: Any, fresh_database: str
) -> None:
    """A caller's deadline replaces the server's default, even if it is longer."""
    api = await start_server(fresh_database, unary_timeout_seconds=0.2)
    session = await api.session()
    with locked(fresh_database, session.id):
        waiting = asyncio.create_task(api.message(session.id))
        await until_waiting(fresh_database, 1)
        await asyncio.sleep(0.5)
    assert (await waiting).sequence == 1


async def test_connection_lost_every_time_is_not_tried_for_ever(
    start_server: Any, fresh_database: str
) -> None:
    """An idempotent call is retried once."""
    api = await start_server(fresh_database, pool_size=2)
    raise_on_insert(fresh_database, "PERFORM pg_terminate_backend(pg_backend_pid())")
    with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"):
        async with asyncio.timeout(10):
            await api.session()
