"""Nothing leaks: what callers and operators entrust to the service is in no line and no error.

Every secret of these tests contains MARKED. Real processes go through every fault of the error
table, and then MARKED must be nowhere in what they wrote or answered.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import jwt
import psycopg
import pytest
import pytest_asyncio
from google.protobuf.field_mask_pb2 import FieldMask
from support.client import Api, Refusal, a_file, an_id
from support.process import ServerProcess, server_process
from test_errors import execute, locked, raise_on_insert

from chat_ticket.v1 import chat_attachment_pb2 as a
from chat_ticket.v1 import chat_message_pb2 as m
from chat_ticket.v1 import chat_message_pb2_grpc
from chat_ticket.v1 import chat_session_pb2 as s
from chat_ticket.v1 import chat_ticket_pb2 as t
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket_svc import config
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.commands import token as token_command
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.errors import REASONS

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "chat_ticket_svc"

# Letters and digits only: the same in JSON, in a percent-encoded URL and in a repr.
MARKED = "CaNaRy7qXw"


def secret(kind: str) -> str:
    return f"{MARKED}{kind}{uuid.uuid4().hex[:6]}"


def _forms() -> list[bytes]:
    plain = MARKED.lower().encode()
    forms = [plain, MARKED.encode().hex().encode()]
    for before in range(3):  # base64 looks different at each place in three bytes
        coded = base64.b64encode(b"\0" * before + MARKED.encode() + b"\0" * (2 - before))
        forms.append(coded[(before * 4 + 2) // 3 : (before + len(MARKED)) * 4 // 3].lower())
    return forms


def leaks(written: str | bytes) -> list[bytes]:
    """The surroundings of each secret in what was written: none is what all want to see."""
    data = written.encode() if isinstance(written, str) else written
    found = re.finditer(b"|".join(map(re.escape, _forms())), data.lower())
    return [data[max(0, each.start() - 200) : each.end() + 100] for each in found]


@pytest.mark.parametrize(
    "form",
    [
        secret("plain").encode(),
        json.dumps({"é\n": secret("json")}).encode(),
        b"postgresql://u:%21" + secret("url").encode() + b"@h",
        b"https://" + secret("host").lower().encode(),
        repr(RuntimeError(secret("repr"))).encode(),
        *(base64.b64encode(b"." * n + secret("base64").encode()) for n in range(3)),
        *(base64.urlsafe_b64encode(b"." * n + secret("base64").encode()) for n in range(3)),
        secret("hex").encode().hex().encode(),
    ],
    ids=itertools.count(),
)
def test_secret_is_seen_in_every_form(form: bytes) -> None:
    """The tests of this file would see it."""
    assert leaks(form)
    assert leaks(b"before" + form + b"behind")
    assert not leaks(b"nothing " * 100)


# ---- The faults ----

# Run by the server process before anything else: breaks what no caller and no database can break.
PLANT = f"""
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

sessions.revisions = failing(sessions.revisions, [1])
schema.Probe.missing = failing(schema.Probe.missing, [3])
notifications.Notifications._listen = failing(notifications.Notifications._listen, [1])

def call_back(text):
    time.sleep(0.15)  # long enough for asyncio's debug mode to tell of it
    raise Broken(text)

async def told():
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
    loop.create_task(told(), name="planted")
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


@dataclass
class Told:
    """Everything that came out of a server process while it met every fault."""

    process: ServerProcess
    debug: bool = False
    errors: list[tuple[str, bytes]] = field(default_factory=list)
    correlation_ids: dict[str, str] = field(default_factory=dict)
    commands: list[bytes] = field(default_factory=list)
    activity: str = ""

    async def refused(self, reason: str, call: Awaitable[Any]) -> Refusal:
        """Expects a call to be refused for this reason (one of these), and keeps what it gets."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        error = caught.value
        refusal = Refusal()
        refusal.read(error)
        assert refusal.info.reason in reason.split(), refusal.text
        parts = [(error.details() or "").encode(), (error.debug_error_string() or "").encode()]
        for key, value in (*(error.initial_metadata() or ()), *(error.trailing_metadata() or ())):
            parts += [key.encode(), value.encode() if isinstance(value, str) else value]
        self.errors.append((refusal.info.reason, b"\n".join(parts)))
        return refusal

    async def until(self, event: str) -> None:
        async with asyncio.timeout(20):
            while event not in self.process.output:
                await asyncio.sleep(0.05)

    async def broken(self, what: str, call: Awaitable[Any]) -> None:
        refusal = await self.refused("INTERNAL", call)
        self.correlation_ids[what] = refusal.info.metadata["correlation_id"]


async def whole(call: Any) -> list[Any]:
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


def bearer(directory: Path, **claims: Any) -> list[tuple[str, str]]:
    """The metadata of a caller whose token the server believes."""
    return [("authorization", f"Bearer {token(directory, **claims)}")]


def token(directory: Path, **claims: Any) -> str:
    key = (directory / "development-key.pem").read_text()
    return jwt.encode(
        {
            "iss": token_command.ISSUER,
            "aud": token_command.AUDIENCE,
            "sub": secret("sub"),
            "exp": int(time.time()) + 600,
            "tenants": "*",
            "scope": f"read write delete ticket {secret('scope')}",
            **claims,
        },
        key,
        algorithm=token_command.ALGORITHM,
        headers={"kid": token_command.KEY_ID},
    )


def a_secret_file(**fields: Any) -> r.ChatAttachment:
    return a_file(**{"file_name": f"{secret('name')}.png", **fields})


async def refuse_requests(told: Told, api: Api) -> None:
    """Everything malformed, with a secret in every text."""
    invalid = "INVALID_ARGUMENT"
    bad = secret("value")
    message = r.ChatMessage(
        id=bad,
        content=f"{bad}\0",
        role=99,  # type: ignore[arg-type]
        metadata_json=f'{{"{bad}": {bad}}}',
        attachments=[
            a_file(file_url=f"https://{bad}:{bad}@h/{bad}", file_name=f"{bad}\n", file_type=bad),
            a_file(id=bad, file_url=f"{bad}://{bad}?{bad}"),
        ],
    )
    request = m.CreateChatMessageRequest(session_id=bad, message=message)
    refusal = await told.refused(invalid, api.messages.CreateChatMessage(request))
    assert len(refusal.fields) >= 5
    calls = [api.sessions.GetChatSession(s.GetChatSessionRequest(session_id=bad))]
    calls.append(api.sessions.DeleteChatSession(s.DeleteChatSessionRequest(etag=bad)))
    calls.append(api.sessions.ListChatSessions(s.ListChatSessionsRequest(page_token=bad)))
    calls.append(api.messages.SearchChatMessages(m.SearchChatMessagesRequest(query=bad * 99)))
    calls.append(whole(api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=bad))))
    calls.append(
        api.tickets.CreateChatTicket(
            t.CreateChatTicketRequest(
                session_id=bad, ticket=r.Ticket(id=bad, title=f"{bad * 99}\0")
            )
        )
    )
    for metadata_json in (bad, f'{{"{bad}": NaN}}', f'["{bad}"]', f'{{"a": "\\{bad}"}}'):
        update = m.UpdateChatMessageRequest(
            message=r.ChatMessage(id=an_id(), metadata_json=metadata_json),
            update_mask=FieldMask(paths=["metadata_json"]),
        )
        calls.append(api.messages.UpdateChatMessage(update))
    for call in calls:
        await told.refused(invalid, call)
    for method, stub in (("GetChatSession", "unary_unary"), ("WatchChatSession", "unary_stream")):
        raw = getattr(api.channel, stub)(f"/chat_ticket.v1.ChatSessionService/{method}")
        call = raw(b"\xff" + bad.encode(), metadata=api.sessions._metadata)
        await told.refused(invalid, call if stub == "unary_unary" else whole(call))


async def refuse_callers(told: Told, api: Api, keys: Path) -> None:
    """Every credential and tenant that does not do, each of them a secret."""
    get = s.GetChatSessionRequest(session_id=an_id())
    valid = bearer(keys)
    forged = (
        f"{token(keys).rpartition('.')[0]}.{base64.b64encode(secret('sign').encode()).decode()}"
    )
    unknown_key = jwt.encode({"sub": secret("sub")}, "0" * 32, headers={"kid": secret("kid")})
    cases: list[tuple[str, list[tuple[str, str]]]] = [
        ("CREDENTIAL_REQUIRED", []),
        ("CREDENTIAL_INVALID", [("authorization", f"Basic {secret('basic')}")]),
        ("CREDENTIAL_INVALID", [("authorization", secret("bare"))]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {secret('malformed')}.x.y")]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {forged}")]),
        ("CREDENTIAL_INVALID", [("authorization", f"Bearer {unknown_key}")]),
        ("CREDENTIAL_INVALID", bearer(keys, iss=secret("iss"))),
        ("CREDENTIAL_INVALID", bearer(keys, tenants=[f" {secret('claim')} "])),
        ("CREDENTIAL_INVALID", [*valid, *valid]),
        ("CREDENTIAL_EXPIRED", bearer(keys, exp=1)),
        ("PERMISSION_REQUIRED", bearer(keys, scope=secret("scope"))),
        ("TENANT_REQUIRED", valid),
        ("TENANT_NOT_ALLOWED", [*bearer(keys, tenants=["a", "b"]), ("x-tenant-id", "c")]),
        ("INVALID_ARGUMENT", [*valid, ("x-tenant-id", secret("tenant") * 20)]),
        ("INVALID_ARGUMENT", [*valid, *[("x-tenant-id", secret("tenant"))] * 2]),
    ]
    stub = api.sessions._stub
    for reason, metadata in cases:
        await told.refused(reason, stub.GetChatSession(get, metadata=metadata, timeout=10))


async def use_everything(api: Api, store: str) -> tuple[str, str]:
    """Every kind of secret goes in and comes out again; returns a session and its message."""
    session = await api.session()
    message = await api.message(
        session.id,
        secret("content"),
        metadata_json=json.dumps({secret("key"): [secret("value")]}),
        attachments=[a_secret_file(file_url=f"{store}/{secret('path')}?sig={secret('query')}")],
    )
    batch = m.BatchCreateChatMessagesRequest(
        session_id=session.id,
        messages=[r.ChatMessage(content=secret("batch"), role=r.CHAT_MESSAGE_ROLE_ASSISTANT)] * 2,
    )
    await api.messages.BatchCreateChatMessages(batch)
    await api.messages.SearchChatMessages(m.SearchChatMessagesRequest(query=secret("query")))
    listed = await whole(
        api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=session.id))
    )
    assert leaks(str(listed)), "the caller gets what is theirs"
    await api.escalate(session.id, ticket=r.Ticket(title=secret("title")))
    return session.id, message.id


async def refuse_by_rules(told: Told, api: Api, database: str, store: str) -> None:
    """What is absent, taken, or against a rule."""
    session_id, message_id = await use_everything(api, store)
    none = an_id()
    sessions, messages, attachments, tickets = (
        api.sessions,
        api.messages,
        api.attachments,
        api.tickets,
    )
    get = s.GetChatSessionRequest(session_id=none)
    await told.refused("CHAT_SESSION_NOT_FOUND", sessions.GetChatSession(get))
    await told.refused("CHAT_SESSION_NOT_FOUND", api.message(none, secret("content")))
    await told.refused(
        "CHAT_MESSAGE_NOT_FOUND",
        messages.GetChatMessage(m.GetChatMessageRequest(message_id=none)),
    )
    await told.refused(
        "CHAT_ATTACHMENT_NOT_FOUND",
        attachments.GetChatAttachment(a.GetChatAttachmentRequest(attachment_id=none)),
    )
    await told.refused(
        "CHAT_TICKET_NOT_FOUND",
        tickets.GetChatTicket(t.GetChatTicketRequest(chat_ticket_id=none)),
    )
    await told.refused("TICKET_NOT_FOUND", tickets.GetTicket(t.GetTicketRequest(ticket_id=none)))

    await told.refused(
        "CHAT_MESSAGE_ALREADY_EXISTS", api.message(session_id, secret("content"), id=message_id)
    )
    file_id = an_id()
    with_file = {"file_url": f"{store}/{secret('path')}", "id": file_id}
    second = await api.message(session_id, secret("content"))
    await api.attachment(second.id, **with_file)
    third = await api.message(session_id, secret("content"))
    await told.refused(
        "CHAT_ATTACHMENT_ALREADY_EXISTS",
        api.attachment(third.id, **with_file, file_name=secret("name")),
    )
    await told.refused(
        "TOO_MANY_ATTACHMENTS", api.attachment(second.id, file_url=f"{store}/{secret('path')}")
    )
    for url in (
        f"https://127.0.0.1/{secret('path')}?{secret('query')}",
        f"{store}/gone/{secret('path')}?{secret('query')}",
        f"{store}/moved/{secret('path')}?{secret('query')}",
        f"http://127.0.0.1:1/{secret('path')}?{secret('query')}",
    ):
        await told.refused("ATTACHMENT_URL_NOT_ACCESSIBLE", api.attachment(third.id, file_url=url))
    await told.refused(
        "SESSION_HAS_TICKET", api.escalate(session_id, ticket=r.Ticket(title=secret("title")))
    )
    await told.refused(
        "SESSION_HAS_ACTIVE_TICKET",
        sessions.DeleteChatSession(s.DeleteChatSessionRequest(session_id=session_id)),
    )
    await told.refused(
        "ETAG_MISMATCH",
        sessions.DeleteChatSession(s.DeleteChatSessionRequest(session_id=session_id, etag="99")),
    )
    link = (
        await tickets.ListChatTickets(t.ListChatTicketsRequest(session_id=session_id))
    ).chat_tickets[0]
    await told.refused(
        "TICKET_LINKED", tickets.DeleteTicket(t.DeleteTicketRequest(ticket_id=link.ticket.id))
    )
    other = await api.session()
    await told.refused(
        "CHAT_TICKET_ALREADY_EXISTS",
        api.escalate(other.id, chat_ticket_id=link.id, ticket=r.Ticket(title=secret("title"))),
    )
    taken = r.Ticket(id=link.ticket.id, title=secret("title"))
    await told.refused("TICKET_ALREADY_EXISTS", api.escalate(other.id, ticket=taken))
    archived = await api.session(status=r.CHAT_SESSION_STATUS_ARCHIVED)
    await told.refused(
        "SESSION_ARCHIVED", api.escalate(archived.id, ticket=r.Ticket(title=secret("title")))
    )
    beyond = s.WatchChatSessionRequest(session_id=session_id, after_revision=99)
    await told.refused("REVISION_OUT_OF_RANGE", whole(sessions.WatchChatSession(beyond)))
    watch = s.WatchChatSessionRequest(session_id=session_id)
    watching = [sessions.WatchChatSession(watch) for _ in range(2)]
    for call in watching:
        await call.read()
    await told.refused("QUOTA_EXCEEDED", whole(sessions.WatchChatSession(watch)))
    await told.until("could not poll")
    for call in watching:
        call.cancel()
    with locked(database, session_id):
        calls = [
            asyncio.ensure_future(api.message(session_id, secret("content"))) for _ in "x" * 30
        ]
        await asyncio.wait(calls)
    for call in calls:
        if call.exception() is not None:
            await told.refused("POOL_QUEUE_FULL CONTENTION DATABASE_UNAVAILABLE", call)
    long = await api.session()
    many = [r.ChatMessage(content=secret("x") * 300, role=r.CHAT_MESSAGE_ROLE_USER)] * 400
    batch = m.BatchCreateChatMessagesRequest(session_id=long.id, messages=many)
    await api.messages.BatchCreateChatMessages(batch)
    # Without the probe the window stays small, and a reader that stops is soon waited for.
    options = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(api.address, options=options) as channel:
        slow = chat_message_pb2_grpc.ChatMessageServiceStub(channel).ListChatMessages(
            m.ListChatMessagesRequest(session_id=long.id), metadata=api.sessions._metadata
        )
        await slow.read()
        await asyncio.sleep(1.5)
        await told.refused("SLOW_READER", whole(slow))


# The reason of each SQLSTATE that a statement may meet.
SQLSTATES = {
    "40001": "CONTENTION",
    "53100": "DISK_FULL",
    "53200": "DATABASE_RESOURCES",
    "57014": "DEADLINE_EXCEEDED",
    "25006": "DATABASE_READ_ONLY",
    "0A000": "UNSUPPORTED_BY_DATABASE",
    "22003": "INVALID_ARGUMENT",
}


async def break_the_database(told: Told, api: Api, database: str) -> None:
    """What only a database can say, with a secret in all that it says."""
    said = ", ".join(
        f"{option} = '{secret(option)}'"
        for option in ("DETAIL", "HINT", "COLUMN", "DATATYPE", "SCHEMA", "TABLE", "CONSTRAINT")
    )
    raising = (
        f"RAISE NOTICE '{secret('NOTICE')}'; RAISE '{secret('MESSAGE')}' USING {said}, ERRCODE"
    )
    for sqlstate, reason in SQLSTATES.items():
        raise_on_insert(database, f"{raising} = '{sqlstate}'")
        await told.refused(reason, api.session())
    raise_on_insert(database, f"{raising} = 'XX000'")
    await told.broken("XX000", api.session())
    raise_on_insert(database, "RETURN NULL")
    await told.refused("CHAT_SESSION_ALREADY_EXISTS", api.session(id=an_id()))
    execute(database, "DROP TRIGGER sabotage ON chat_sessions")

    refused_content = "ALTER TABLE chat_messages ADD CONSTRAINT no_content CHECK (content = 'fine')"
    execute(database, f"{refused_content} NOT VALID")
    session = await api.session()
    row = api.message(session.id, secret("row"), metadata_json=json.dumps({"a": secret("row")}))
    await told.broken("23514", row)
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
    await told.broken("KeyError", api.sessions.GetChatSession(get))
    listing = api.messages.ListChatMessages(m.ListChatMessagesRequest(session_id=session.id))
    assert len((await listing.read()).messages) == 32, "the stream has begun"
    await told.broken("KeyError in a stream", whole(listing))

    execute(
        database,
        "CREATE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER hang_up AFTER DELETE ON chat_sessions"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hang_up()",
    )
    delete = s.DeleteChatSessionRequest(session_id=session.id)
    await told.refused("OUTCOME_UNKNOWN", api.sessions.DeleteChatSession(delete))

    # The notifier's own statement fails, on the connections that follow these.
    with psycopg.connect(database, autocommit=True) as connection:
        told.activity = str(
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
        while "RaiseException" not in told.process.output:  # the notifier has connected anew
            await api.message(session.id, secret("content"))
            await asyncio.sleep(0.1)


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def database_name(url: str) -> str:
    return re.search(r"/(\w+)\?", url)[1]  # type: ignore[index]


@contextlib.asynccontextmanager
async def file_store() -> AsyncIterator[str]:
    """The URL of a server of files, which has all but /gone and moves /moved to nowhere."""

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


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL that these tests may stop, and where `guarded` needs a password."""
    data = tmp_path_factory.mktemp("leaks") / "data"
    with EmbeddedPostgres(data, durable=False) as postgres:
        rules = data / "pg_hba.conf"
        rules.write_text(f"local all guarded scram-sha-256\n{rules.read_text()}")
        execute(postgres.url("postgres"), "CREATE ROLE guarded LOGIN", "SELECT pg_reload_conf()")
        assert migrate.up(postgres.url("template_of_leaks"), quiet=True) == 0
        yield postgres


def with_secrets(url: str) -> str:
    """The same database, by a URL with a password."""
    return url.replace("postgres@", f"postgres:{secret('password')}@")


FORMATS = {
    "json, debug": {
        "CHAT_TICKET_LOG_FORMAT": "json",
        "CHAT_TICKET_LOG_LEVEL": "debug",
        "PYTHONDEVMODE": "1",
        "PYTHONASYNCIODEBUG": "1",
    },
    "console, default": {"CHAT_TICKET_LOG_FORMAT": "console"},
}


@pytest_asyncio.fixture(scope="module", params=list(FORMATS))
async def told(
    request: pytest.FixtureRequest,
    postgres: EmbeddedPostgres,
    tmp_path_factory: pytest.TempPathFactory,
) -> Told:
    """A server that has been through everything, and has ended."""
    directory = tmp_path_factory.mktemp("keys")
    (directory / "sitecustomize.py").write_text(PLANT)
    keys = token_command.development_settings(directory)
    database = postgres.url(f"leaks_{uuid.uuid4().hex}")
    execute(
        postgres.url("postgres"),
        f"CREATE DATABASE {database_name(database)} TEMPLATE template_of_leaks",
    )
    async with file_store() as store:
        settings = {
            "PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")]),
            "DATABASE_LISTEN_URL": with_secrets(database),
            "MIGRATE_DATABASE_URL": with_secrets(database),
            "CHAT_TICKET_AUTH": "jwt",
            **{f"CHAT_TICKET_{name.upper()}": value for name, value in keys.items()},
            "CHAT_TICKET_POOL_SIZE": "2",
            "CHAT_TICKET_LOCK_TIMEOUT_MS": "300",
            "CHAT_TICKET_STREAM_WRITE_TIMEOUT_SECONDS": "0.5",
            "CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS": "0.2",
            "CHAT_TICKET_DRAIN_SECONDS": "1",
            "CHAT_TICKET_LIMITS__ATTACHMENTS": "1",
            "CHAT_TICKET_QUOTAS__SESSION_STREAMS": "2",
            "CHAT_TICKET_ATTACHMENT_URL_SCHEMES": "http,https",
            "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS": f"{store.removeprefix('http://')}",
            **FORMATS[request.param],
        }
        with server_process(with_secrets(database), **settings) as process:
            told = Told(process, debug="debug" in request.param)
            async with Api(await address_of(process), "acme") as api:
                api.sessions._metadata += bearer(directory)
                await everything(told, api, database, store, directory, postgres)
    return told


async def address_of(process: ServerProcess) -> str:
    """Where a server listens, in whichever format it says so."""

    def found() -> str:
        end = time.monotonic() + 30
        while time.monotonic() < end and process.popen.poll() is None:
            plain = re.sub(r"\x1b\[\d+m", "", process.output)
            if match := re.search(r'"port": (\d+)|listening.*port=(\d+)', plain):
                return f"127.0.0.1:{match[1] or match[2]}"
            time.sleep(0.02)
        raise AssertionError(process.output)

    return await asyncio.to_thread(found)


async def everything(
    told: Told, api: Api, database: str, store: str, keys: Path, postgres: EmbeddedPostgres
) -> None:
    told.commands.append(command_line(told.process.popen.pid))
    await refuse_requests(told, api)
    await refuse_callers(told, api, keys)
    await refuse_by_rules(told, api, database, store)
    await break_the_database(told, api, database)
    postgres.stop()
    try:
        gone = api.message(an_id(), secret("content"))
        await told.refused("DATABASE_UNAVAILABLE OUTCOME_UNKNOWN", gone)
        search = m.SearchChatMessagesRequest(query=secret("query"))
        await told.refused("DATABASE_UNAVAILABLE", api.messages.SearchChatMessages(search))
        await told.until("the database cannot be reached")
        await told.until("error connecting in")
    finally:
        postgres.start()
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                session = await api.session()
                break
    follower = api.sessions.WatchChatSession(s.WatchChatSessionRequest(session_id=session.id))
    await follower.read()
    stopping = asyncio.create_task(asyncio.to_thread(told.process.stop))
    await told.refused("DRAINING", whole(follower))
    assert await stopping == 0


# ---- What came out ----


class TestServer:
    def test_log_has_no_secret(self, told: Told) -> None:
        """In no byte of either stream, whatever went wrong."""
        assert not leaks(told.process.output)

    def test_errors_have_no_secret(self, told: Told) -> None:
        """Neither the status, nor its details, nor any other trailer."""
        assert {reason: leaks(error) for reason, error in told.errors if leaks(error)} == {}

    def test_every_reason_there_is_was_met(self, told: Told) -> None:
        """Those of the catalog in errors.py; a new one has to be provoked here."""
        reasons = {reason.name for reason in REASONS}
        met = {reason for reason, _ in told.errors}
        # The server does not start with a method of which METHOD_NOT_ALLOWED could be said; the
        # others have tests of their own: test_out_of_reach, and test_url_attacks.
        assert reasons - met == {"METHOD_NOT_ALLOWED", "KEYS_UNAVAILABLE", "URL_CHECKS_BUSY"}

    def test_faults_are_told_in_the_log(self, told: Told) -> None:
        """Without their texts they are there: silence would not be discretion."""
        for event in (
            "internal error",
            "error in the background",
            "unexpected error",
            "notifier lost its connection",
            "listener lost its connection",
            "could not poll the watched sessions",
            "not serving",
            "planted",
            "error connecting in",
            "draining",
        ):
            assert event in told.process.output, event
        assert told.process.output.count("Broken") >= 8

    def test_library_lines_keep_words_kinds_and_numbers(self, told: Told) -> None:
        """What is left of a line tells what happened."""
        assert "planted ... Broken 7" in told.process.output

    def test_debug_says_more(self, told: Told) -> None:
        """At its level the server does log what is below the others."""
        assert ("token rejected" in told.process.output) == told.debug
        assert ("Executing" in told.process.output) == told.debug, "asyncio's debug mode"

    def test_correlation_id_is_in_one_line_with_the_whole_story(self, told: Told) -> None:
        """The method, every error by kind, the SQLSTATE and the places; nothing of their texts."""
        story = {
            "XX000": ("CreateChatSession", ["InternalError_"], "XX000", "store/sessions.py"),
            "23514": (
                "CreateChatMessage",
                ["CheckViolation", "ConstraintViolation"],
                "no_content",
                "store/append.py",
            ),
            "KeyError": ("GetChatSession", ["KeyError"], "KeyError", "convert.py"),
            "KeyError in a stream": ("ListChatMessages", ["KeyError"], "KeyError", "convert.py"),
        }
        assert told.correlation_ids.keys() == story.keys()
        assert told.process.output.count("internal error") == len(story)
        for what, (method, kinds, name, place) in story.items():
            correlation_id = told.correlation_ids[what]
            [line] = [line for line in told.process.output.splitlines() if correlation_id in line]
            assert "internal error" in line
            assert f"Service/{method}" in line
            assert name in line
            assert re.search(rf"{place}:\d+ \w+", line)
            for kind in kinds:
                assert kind in line
            if line.startswith("{"):
                told_errors = json.loads(line)["errors"]
                assert [error["error"] for error in told_errors] == kinds
                assert all(error["frames"] for error in told_errors)
                assert told_errors[0].get("sqlstate", what[:8]) == what[:8]
                assert {"table_name", "constraint_name"}.isdisjoint(told_errors[0]) == (
                    what != "23514"
                ), "only names, and not what only stands in their place"

    def test_errors_in_the_background_are_told_whole(self, told: Told) -> None:
        """What nobody awaited, called or caught has its kind and its place in one line each."""
        for about in ("Exception in callback", "Task exception was never retrieved"):
            assert about in told.process.output
        for place in ("call_back", "told", "__del__"):
            assert re.search(rf"sitecustomize\.py:\d+ {place}\b", told.process.output), place
        assert "Traceback" not in told.process.output

    def test_others_on_the_machine_see_nothing(self, told: Told) -> None:
        """Neither the list of processes nor that of the database's connections."""
        assert told.commands
        assert "SELECT" in told.activity
        assert not leaks(b"".join(told.commands) + told.activity.encode())


async def test_out_of_reach(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """An option that PostgreSQL refuses by its name, a wrong password, keys that do not answer."""
    keys = tmp_path
    token_command.development_settings(keys)
    url = postgres.url("template_of_leaks")
    with server_process(
        f"{with_secrets(url)}&options=-c%20{secret('option')}%3D1&passfile=/{secret('file')}",
        DATABASE_LISTEN_URL=url.replace("postgres@", f"guarded:{secret('password')}@"),
        CHAT_TICKET_LOG_LEVEL="debug",
        PYTHONDEVMODE="1",
        CHAT_TICKET_AUTH="jwt",
        CHAT_TICKET_JWKS=f"http://u:{secret('user')}@127.0.0.1:1/{secret('p')}?{secret('q')}",
        CHAT_TICKET_JWT_ISSUER=secret("iss"),
        CHAT_TICKET_JWT_AUDIENCE=secret("aud"),
    ) as process:
        told = Told(process)
        async with Api(await address_of(process), "acme") as api:
            api.sessions._metadata += bearer(keys)
            await told.refused("KEYS_UNAVAILABLE", api.session())
        for event in ("not serving", "listener lost its connection"):
            await asyncio.to_thread(process.wait_for, event)
        for about in ("could not fetch the key set", "error connecting in"):
            await told.until(about)
        assert process.stop() == 0
    assert not leaks(process.output)
    assert not leaks(told.errors[0][1])


# ---- Commands ----


# Imports everything once, and then is the process of one command after the other: ends as Python
# does, but at once.
COMMANDS = """
import gc, json, os, sys, tempfile
from chat_ticket_svc import cli, server
results = []
gc.freeze()
for arguments, environment in json.load(sys.stdin):
    written = tempfile.TemporaryFile()
    child = os.fork()
    if child == 0:
        os.dup2(written.fileno(), 1)
        os.dup2(written.fileno(), 2)
        os.environ.update(environment)
        end = 1
        try:
            cli.main(arguments)
        except SystemExit as error:
            end = error.code
            if isinstance(end, str):
                end = print(end, file=sys.stderr) or 1
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        os._exit(end or 0)
    _, status = os.waitpid(child, 0)
    written.seek(0)
    results.append((status, written.read().decode()))
print(json.dumps(results))
"""


def commands(*cases: tuple[list[str], dict[str, str]]) -> list[str]:
    """What each command, which has to fail, writes in its environment."""
    default = {"DATABASE_URL": "postgresql://u@127.0.0.1:1/x", "CHAT_TICKET_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        input=json.dumps([(arguments, default | given) for arguments, given in cases]),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    results = json.loads(done.stdout)
    for (arguments, _), (status, written) in zip(cases, results, strict=True):
        assert (status == 0) == ("--help" in arguments), written
    return [written for _, written in results]


SECRETS = {
    name: f"postgresql://u:{secret('password')}@127.0.0.1:1/x?application_name={secret('q')}"
    for name in ("DATABASE_URL", "DATABASE_LISTEN_URL", "MIGRATE_DATABASE_URL")
} | {
    "CHAT_TICKET_JWKS": f"https://u:{secret('user')}@h/{secret('path')}?{secret('query')}",
    "CHAT_TICKET_TLS_KEY": secret("key"),
    "PGPASSWORD": secret("password"),
}


class TestCommands:
    def test_help_shows_no_setting(self) -> None:
        """Whatever the environment holds."""
        names = ([], ["serve"], ["migrate"], ["migrate-status"], ["token"])
        for written in commands(*(([*name, "--help"], SECRETS) for name in names)):
            assert "usage: chat-ticket-svc" in written
            assert not leaks(written)

    def test_wrong_settings_are_named_without_their_values(self) -> None:
        """Every setting that can be wrong, all at once."""
        fields = config.Settings.model_fields
        variables = [
            config.variable(str(field.validation_alias or name))
            for name, field in fields.items()
            if name not in ("limits", "quotas")
        ]
        for group, names in (("LIMITS", config.Limits), ("QUOTAS", config.Quotas)):
            variables += [f"CHAT_TICKET_{group}__{name.upper()}" for name in names.model_fields]
        assert len(variables) > 45
        [written] = commands((["serve"], {name: secret("value") for name in variables}))
        assert not leaks(written)
        assert "Traceback" not in written
        # Any text does for these.
        text = {"HOST", "TLS_CERTIFICATE", "TLS_KEY", "TLS_CLIENT_CA", "MTLS_POLICY"}
        text |= {"JWKS", "JWT_ISSUER", "JWT_AUDIENCE", "ATTACHMENT_URL_ALLOWED_HOSTS"}
        unnamed = {name for name in variables if f"{name}:" not in written}
        assert unnamed == {f"CHAT_TICKET_{name}" for name in text}

    def test_settings_that_fit_together_badly(self, tmp_path: Path) -> None:
        """Files that are not there or hold something else, keys where a path should be."""
        pem = f"-----BEGIN PRIVATE KEY-----\n{secret('pem')}\n-----END PRIVATE KEY-----\n"
        broken = tmp_path / "broken.pem"
        broken.write_text(pem)
        callers = tmp_path / "callers.toml"
        callers.write_text(f'["a.b"]\ntenants = "{secret("t")}"\npermissions = ["{secret("p")}"]\n')
        token_command.development_settings(tmp_path)
        whole_key = tmp_path / "development-key.pem"
        missing = str(tmp_path / secret("name"))
        tls = {"CHAT_TICKET_TLS_CERTIFICATE": str(broken), "CHAT_TICKET_TLS_KEY": str(whole_key)}
        jwt_settings = {
            "CHAT_TICKET_AUTH": "jwt",
            "CHAT_TICKET_JWT_ISSUER": "i",
            "CHAT_TICKET_JWT_AUDIENCE": "a",
        }
        own = certificate(tmp_path)
        fine = tmp_path / "fine.toml"
        fine.write_text('["a.b"]\ntenants = "*"\npermissions = ["read"]\n')
        mtls = {
            **own,
            "CHAT_TICKET_AUTH": "mtls",
            "CHAT_TICKET_TLS_CLIENT_CA": own["CHAT_TICKET_TLS_CERTIFICATE"],
            "CHAT_TICKET_MTLS_POLICY": str(fine),
        }
        hosts = "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS"
        cases: list[tuple[str, dict[str, str]]] = [
            ("CHAT_TICKET_TLS_KEY", {**tls, "CHAT_TICKET_TLS_KEY": pem}),
            ("CHAT_TICKET_TLS_KEY", {**tls, "CHAT_TICKET_TLS_KEY": f"{pem * 99}"}),
            ("CHAT_TICKET_TLS_CERTIFICATE", tls),
            ("CHAT_TICKET_TLS_KEY", {**mtls, "CHAT_TICKET_TLS_KEY": str(broken)}),
            ("CHAT_TICKET_TLS_CERTIFICATE", {**tls, "CHAT_TICKET_TLS_CERTIFICATE": missing}),
            ("CHAT_TICKET_TLS_CLIENT_CA", {**mtls, "CHAT_TICKET_TLS_CLIENT_CA": missing}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": missing}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": str(callers)}),
            ("CHAT_TICKET_MTLS_POLICY", {**mtls, "CHAT_TICKET_MTLS_POLICY": str(broken)}),
            ("CHAT_TICKET_JWKS", {**jwt_settings, "CHAT_TICKET_JWKS": missing}),
            ("CHAT_TICKET_JWKS", {**jwt_settings, "CHAT_TICKET_JWKS": str(broken)}),
            ("CHAT_TICKET_JWKS", {"CHAT_TICKET_JWKS": f"https://[{secret('host')}]/"}),
            ("CHAT_TICKET_JWKS", {"CHAT_TICKET_JWKS": f"https://u:{secret('p')}℀@h/"}),
            ("limits", {"CHAT_TICKET_LIMITS": secret("limits")}),
            ("CHAT_TICKET_QUOTAS__STREAMS", {"CHAT_TICKET_QUOTAS": f'{{"streams":"{MARKED}"}}'}),
            (hosts, {hosts: f"fine,https://u:{secret('p')}@h/?{secret('q')}"}),
        ]
        written = commands(*((["serve"], settings) for _, settings in cases))
        for (name, _), text in zip(cases, written, strict=True):
            assert name in text
            assert text.startswith("chat-ticket-svc: ")
            assert "Traceback" not in text
            assert not leaks(text)

    @pytest.mark.parametrize("name", ["serve", "migrate", "migrate-status"])
    def test_url_that_cannot_be_read_is_not_shown(self, name: str) -> None:
        """The variable is named; its URL is not, nor any part of it."""
        p = secret("password")
        urls = [
            f"postgresql://u:{p}@{secret('h')}:{secret('port')}/{secret('d')}",
            f"postgresql://u:{p}%zz@h/d",
            f"postgresql://u:{p} {p}@h/d",
            f"postgresql://u:{p}^@h/d",
            f"postgresql://u:{p}[@h/d",
            f"postgresql://u:{p}℀@h/d",
            f"postgresql://u:{p}/{p}@h/d",
            f"postgresql://u:p@[{secret('h')}]/d",
            f"postgresql://{secret('h')}:1,{secret('h')}:{secret('port')}/d",
            secret("nothing"),
        ]
        if name == "serve":
            urls += [f"postgresql://u@h/d?{secret('q')}=1", f"postgresql://u@h/d?{secret('q')}"]
        for text in commands(*(([name], {"DATABASE_URL": url}) for url in urls)):
            assert text.startswith("chat-ticket-svc: DATABASE_URL: ")
            assert text.count("\n") == 1
            assert not leaks(text)

    def test_migrations_that_fail(self, postgres: EmbeddedPostgres) -> None:
        """dbmate's words can quote the URL: the SQLSTATE is told, or why there is none."""
        socket = postgres.url("template_of_leaks").replace("postgres@", "guarded@")
        guarded = socket.replace("guarded", f"guarded:{secret('password')}")
        as_root = with_secrets(postgres.url("template_of_leaks"))
        cases = {
            f"postgresql://u:{secret('p')}@127.0.0.1:1/x?application_name={secret('q')}": "refused",
            f"postgresql://u:{secret('p')}@127.0.0.1:1/x?sslmode={secret('q')}": "dbmate directly",
            f"postgresql://u:{secret('p')}@127.0.0.1:1/x?connect_timeout={secret('q')}": "dbmate",
            f"{as_root}&options=-c%20{secret('q')}%3D1": "42704",
            as_root.replace("postgres:", f"{secret('user')}:"): "28000",
            guarded: "28P01",
        }
        for name in ("migrate", "migrate-status"):
            written = commands(*(([name], {"MIGRATE_DATABASE_URL": url}) for url in cases))
            for text, expected in zip(written, cases.values(), strict=True):
                assert expected in text
                assert not leaks(text)

    def test_migration_that_fails_on_a_row(
        self,
        postgres: EmbeddedPostgres,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """Its error quotes the row; the file, the place and the SQLSTATE are told."""
        (tmp_path / "20990101000000_fail.sql").write_text(
            f"-- migrate:up\nSELECT '{secret('row')}'::int;\n-- migrate:down\n"
        )
        monkeypatch.setattr(migrate, "MIGRATIONS", tmp_path)
        assert migrate.up(postgres.url("failing"), quiet=False) != 0
        written = "".join(capfd.readouterr())
        assert "20990101000000_fail.sql" in written
        assert "22P02" in written
        assert not leaks(written)

    def test_dbmate_is_not_given_the_url_as_an_argument(self) -> None:
        """The list of processes is for all to see."""
        import socket

        with socket.create_server(("127.0.0.1", 0)) as silent:
            port = silent.getsockname()[1]
            url = f"postgresql://u:{secret('p')}@127.0.0.1:{port}/x?application_name={secret('q')}"
            migrating = subprocess.Popen(
                [sys.executable, "-m", "chat_ticket_svc", "migrate"],
                env={**os.environ, "DATABASE_URL": url},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            connection, _ = silent.accept()  # dbmate's, which now waits for an answer
            pid = migrating.pid
            [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            seen = command_line(pid) + command_line(int(child))
            connection.close()
        written, _ = migrating.communicate(timeout=30)
        assert b"dbmate" in seen
        assert not leaks(seen + written)

    def test_error_that_nobody_foresaw(self, tmp_path: Path) -> None:
        """The process ends with the whole story, and without the text."""
        (tmp_path / "sitecustomize.py").write_text(
            "from chat_ticket_svc import config\n"
            f"def load(**_): raise RuntimeError('{MARKED}') from KeyError('{MARKED}')\n"
            "config.load = load\n"
        )
        paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-m", "chat_ticket_svc", "migrate"],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert re.search(r"KeyError.*RuntimeError", done.stderr, re.DOTALL)
        assert re.search(r"cli\.py:\d+ main", done.stderr)
        assert not leaks(done.stdout + done.stderr)


def certificate(directory: Path) -> dict[str, str]:
    """The settings of a certificate of our own."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    own = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    (directory / "own.pem").write_bytes(own)
    (directory / "own-key.pem").write_bytes(private)
    return {
        "CHAT_TICKET_TLS_CERTIFICATE": str(directory / "own.pem"),
        "CHAT_TICKET_TLS_KEY": str(directory / "own-key.pem"),
    }
