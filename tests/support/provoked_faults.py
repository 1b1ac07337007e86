"""Faults of the database and of the server itself, each with a secret in its text."""

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import psycopg

from chat_ticket.v1 import chat_message_pb2 as m
from chat_ticket.v1 import chat_session_pb2 as s
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket_svc.embedded import EmbeddedPostgres
from support.client import Api, an_id
from support.database import execute, raise_on_insert, terminate_at_commit
from support.process import ServerProcess
from support.provoked_drafts import provoke_draft_errors
from support.provoked_errors import (
    ServerOutput,
    provoke_authentication_errors,
    provoke_request_errors,
    provoke_rule_violations,
    read_all,
)
from support.provoked_feeds import provoke_feed_errors
from support.secrets import MARKED, secret

# Run by the server process before anything else: breaks what no caller and no database can break.
FAULT_INJECTION = f"""
import asyncio, gc, logging, threading, time
from chat_ticket_svc.watch import hub, notifications
from chat_ticket_svc.rpc import middleware
from chat_ticket_svc.store import schema, sessions

class Broken(RuntimeError):
    "What a library might raise."

def failing(function, calls):
    async def wrapper(*args):
        calls[0] -= 1
        if calls[0] == 0:
            raise Broken("{MARKED}")
        return await function(*args)
    return wrapper

sessions.find_moved = failing(sessions.find_moved, [1])
schema.Probe.missing = failing(schema.Probe.missing, [3])
notifications.Notifications._listen = failing(notifications.Notifications._listen, [1])

def call_back(text):
    time.sleep(0.15)  # long enough for asyncio's debug mode to log it
    raise Broken(text)

async def failing_task():
    raise Broken("{MARKED}")

async def slow():
    time.sleep(0.15)
    return "{MARKED}"

class Unraisable:
    def __del__(self):
        raise Broken("{MARKED}")

def break_everything():
    loop = asyncio.get_running_loop()
    loop.call_soon(call_back, "{MARKED}")
    loop.call_soon(__import__("functools").partial(call_back, "{MARKED}"))
    loop.create_task(failing_task(), name="planted")
    broken.append(loop.create_task(slow()))
    threading.Thread(target=call_back, args=("{MARKED}",)).start()
    loop.call_later(0.05, gc.collect)
    Unraisable()
    library = logging.getLogger("library")
    library.debug("planted {MARKED}")
    library.info("planted {MARKED}")
    library.warning("planted %r %s %d", "{MARKED}", Broken("{MARKED}"), 7)
    library.warning(Broken("{MARKED}"))
    library.warning("planted %(name)s", {{"name": "{MARKED}"}})
    try:
        raise Broken("{MARKED}")
    except Broken:
        library.exception("planted")

broken = []
start = hub.WatchHub.start

def start_and_break(self):
    start(self)
    asyncio.get_running_loop().call_later(0.2, break_everything)

hub.WatchHub.start = start_and_break
"""


# The reason of each SQLSTATE that a statement may meet.
SQLSTATES = {
    "40001": "CONTENTION",
    "53100": "DISK_FULL",
    "53200": "DATABASE_RESOURCES",
    "57014": "STATEMENT_CANCELED",
    "25006": "DATABASE_READ_ONLY",
    "0A000": "UNSUPPORTED_BY_DATABASE",
    "22003": "INVALID_ARGUMENT",
}


async def provoke_deadline(output: ServerOutput, api: Api) -> None:
    """Send a write with too little time left, and wait for the server's answer.

    A deadline of the client's would end the call in the client. If the server is slow for a moment,
    gRPC ends the call before the service does, without details.
    """
    create = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel).CreateChatSession
    metadata = [*api.sessions._metadata, ("grpc-timeout", "45m")]
    for attempt in range(20):
        try:
            call = create(s.CreateChatSessionRequest(), metadata=metadata)
            await output.expect_error("DEADLINE_EXCEEDED", call)
            return
        except AssertionError:
            if attempt == 19:
                raise


async def provoke_database_errors(output: ServerOutput, api: Api, database: str) -> None:
    """Provoke errors of the database, with a secret in every field of the error."""
    fields = ", ".join(
        f"{option} = '{secret(option)}'"
        for option in ("DETAIL", "HINT", "COLUMN", "DATATYPE", "SCHEMA", "TABLE", "CONSTRAINT")
    )
    raising = (
        f"RAISE NOTICE '{secret('NOTICE')}'; RAISE '{secret('MESSAGE')}' USING {fields}, ERRCODE"
    )
    for sqlstate, reason in SQLSTATES.items():
        raise_on_insert(database, f"{raising} = '{sqlstate}'")
        await output.expect_error(reason, api.session())
    await provoke_deadline(output, api)
    raise_on_insert(database, f"{raising} = 'XX000'")
    await output.expect_internal_error("XX000", api.session())
    raise_on_insert(database, "RETURN NULL")
    await output.expect_error("CHAT_SESSION_DELETED", api.session(id=an_id()))
    execute(database, "DROP TRIGGER sabotage ON chat_sessions")

    refused_content = "ALTER TABLE chat_messages ADD CONSTRAINT no_content CHECK (content = 'fine')"
    execute(database, f"{refused_content} NOT VALID")
    session = await api.session()
    row = api.message(session.id, secret("row"), metadata_json=json.dumps({"a": secret("row")}))
    await output.expect_internal_error("23514", row)
    execute(database, "ALTER TABLE chat_messages DROP CONSTRAINT no_content")

    execute(
        database,
        "ALTER TABLE chat_sessions DROP CONSTRAINT chat_sessions_status_check",
        "ALTER TABLE chat_messages DROP CONSTRAINT chat_messages_role_check",
    )
    strange = await api.session()
    for _ in range(40):
        last = await api.message(session.id, secret("content"))
    execute(
        database,
        f"UPDATE chat_sessions SET status = '{secret('status')}' WHERE id = '{strange.id}'",
        f"UPDATE chat_messages SET role = '{secret('role')}' WHERE id = '{last.id}'",
    )
    get = s.GetChatSessionRequest(session_id=strange.id)
    await output.expect_internal_error("KeyError", api.sessions.GetChatSession(get))
    listing = api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=session.id))
    assert len((await listing.read()).messages) == 32, "the stream has begun"
    await output.expect_internal_error("KeyError in a stream", read_all(listing))

    terminate_at_commit(database, "chat_sessions", "DELETE")
    delete = s.DeleteChatSessionRequest(session_id=session.id)
    await output.expect_error("OUTCOME_UNKNOWN", api.sessions.DeleteChatSession(delete))

    # The notifier's own statement fails, on the connections that follow these.
    with psycopg.connect(database, autocommit=True) as connection:
        output.activity = str(
            connection.execute(
                "SELECT application_name, query FROM pg_stat_activity"
                " WHERE application_name = 'chat-ticket-svc'"
            ).fetchall()
        )
    execute(
        database,
        "CREATE FUNCTION public.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE '{secret('notify')}'; END $$",
        f"ALTER DATABASE {database_name(database)} SET search_path = public, pg_catalog",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'chat-ticket-svc'",
    )
    session = await api.session()
    async with asyncio.timeout(20):
        while "RaiseException" not in output.process.output:  # the notifier has connected anew
            await api.message(session.id, secret("content"))
            await asyncio.sleep(0.1)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def database_name(url: str) -> str:
    return re.search(r"/(\w+)\?", url)[1]  # type: ignore[index]


@contextlib.asynccontextmanager
async def file_store() -> AsyncIterator[str]:
    """The URL of a file server: /gone is 404, and /moved redirects to a private address."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        status = b"200 OK"
        if path.startswith(b"/gone"):
            status = b"404 " + secret("phrase").encode()
        elif path.startswith(b"/moved"):
            status = f"302 X\r\nLocation: http://10.0.0.1/{secret('to')}?{secret('to')}".encode()
        writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def with_secrets(url: str) -> str:
    """The URL of the same database, with a password."""
    return url.replace("postgres@", f"postgres:{secret('password')}@")


async def address_of(process: ServerProcess) -> str:
    """The address of a server, in either log format."""

    def found() -> str:
        end = time.monotonic() + 30
        while time.monotonic() < end and process.popen.poll() is None:
            plain = re.sub(r"\x1b\[\d+m", "", process.output)
            if match := re.search(r'"port": (\d+)|listening.*port=(\d+)', plain):
                return f"127.0.0.1:{match[1] or match[2]}"
            time.sleep(0.02)
        raise AssertionError(process.output)

    return await asyncio.to_thread(found)


async def provoke_everything(
    output: ServerOutput,
    api: Api,
    database: str,
    store: str,
    keys: Path,
    postgres: EmbeddedPostgres,
) -> None:
    output.commands.append(command_line(output.process.popen.pid))
    await provoke_request_errors(output, api)
    await provoke_authentication_errors(output, api, keys)
    await provoke_rule_violations(output, api, database, store)
    await provoke_draft_errors(output, api)
    await provoke_feed_errors(output, api, database)
    await provoke_database_errors(output, api, database)
    await output.wait_for_output("finished the draft of a lost writer")
    postgres.stop()
    try:
        gone = api.message(an_id(), secret("content"))
        search = m.SearchChatMessagesRequest(query=secret("query"))
        await asyncio.gather(
            output.expect_error("DATABASE_UNAVAILABLE OUTCOME_UNKNOWN", gone),
            output.expect_error("DATABASE_UNAVAILABLE", api.messages.SearchChatMessages(search)),
        )
        await output.wait_for_output("the database cannot be reached")
        await output.wait_for_output("error connecting in")
    finally:
        postgres.start()
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                session = await api.session()
                break
    watch = api.sessions.WatchChatSession(s.WatchChatSessionRequest(session_id=session.id))
    await watch.read()
    stopping = asyncio.create_task(asyncio.to_thread(output.process.stop))
    await output.expect_error("DRAINING", read_all(watch))
    assert await stopping == 0
