"""What is said when the database cannot be reached: the cause, and no secret."""

import asyncio
import contextlib
import uuid
from argparse import Namespace
from collections.abc import AsyncIterator, Iterator
from urllib.parse import urlsplit

import pytest
from support.database import execute
from support.secrets import leaks, secret

from chat_ticket_svc.commands import migrate_status
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import UnavailableError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url


async def cause(url: str) -> str:
    """What is said of a database that cannot be reached."""
    with pytest.raises(UnavailableError) as caught:
        await schema.facts(url)
    text = str(caught.value)
    assert caught.value.reason == "DATABASE_UNAVAILABLE"
    assert not leaks(text)
    assert text.startswith("the database cannot be reached: ")
    return text.removeprefix("the database cannot be reached: ")


def named(url: str, *, user: str = "", database: str = "") -> str:
    """The URL with another user or database."""
    parts = urlsplit(url)
    if user:
        password_and_host = f":{secret('password')}@" + parts.netloc.rpartition("@")[2]
        parts = parts._replace(netloc=user + password_and_host)
    return parts._replace(path=f"/{database}" if database else parts.path).geturl()


@pytest.fixture
def role(fresh_database: str) -> Iterator[str]:
    """A role of the test's own, without rights."""
    name = f"role_{uuid.uuid4().hex}"
    execute(fresh_database, f"CREATE ROLE {name} LOGIN")
    yield name
    execute(fresh_database, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


async def test_database_does_not_exist(fresh_database: str) -> None:
    url = named(fresh_database, database=f"no_{secret('such')}")
    assert await cause(url) == "the database does not exist"


async def test_role_does_not_exist(fresh_database: str) -> None:
    assert await cause(named(fresh_database, user=secret("user"))) == "the role does not exist"


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("ALTER ROLE {role} NOLOGIN", "the role may not log in"),
        (
            "REVOKE CONNECT ON DATABASE {database} FROM PUBLIC",
            "the role may not connect to the database",
        ),
        (
            "ALTER DATABASE {database} ALLOW_CONNECTIONS false",
            "the database accepts no connections",
        ),
        (
            "ALTER ROLE {role} CONNECTION LIMIT 0",
            "too many connections: all of the server's, the database's or the role's are in use",
        ),
        ("SELECT", "the role lacks rights on the tables of this service"),
        (
            "REVOKE USAGE ON SCHEMA public FROM PUBLIC",
            "the role lacks rights on the tables of this service",
        ),
    ],
)
async def test_role_lacks_rights(
    cluster_url: str,
    fresh_database: str,
    role: str,
    statement: str,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To log in, to connect, to find the tables, or to read them. `migrate-status` says it too."""
    database = urlsplit(fresh_database).path[1:]
    execute(
        fresh_database if "SCHEMA" in statement else cluster_url,
        statement.format(role=role, database=database),
    )
    try:
        url = named(fresh_database, user=role)
        assert await cause(url) == expected
        monkeypatch.setenv("DATABASE_URL", url)
        with pytest.raises(UnavailableError, match=expected):
            await asyncio.to_thread(migrate_status.run, Namespace())
    finally:
        execute(cluster_url, f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


@pytest.fixture
def cluster_url(fresh_database: str) -> str:
    """The URL of another database of the same server."""
    return named(fresh_database, database="postgres")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:{}@nosuchhost.invalid/x", "the host name does not resolve"),
        (
            "postgresql://u:{}@127.0.0.1:1,localhost:1/x",
            "connection refused: nothing listens at the host and port",
        ),
        ("postgresql://u:{}@/x?host=/nowhere/{}", "no server has this socket"),
        ("postgresql:///x?service={}", "the service file does not define the service"),
        (
            "postgresql://u:{}@127.0.0.1:1,nosuchhost.invalid/x",
            "connection refused: nothing listens at the host and port",
        ),
    ],
)
async def test_host_is_out_of_reach(url: str, expected: str) -> None:
    assert await cause(url.replace("{}", secret("password"))) == expected


@contextlib.asynccontextmanager
async def server_that_sends(first: bytes, *more: bytes) -> AsyncIterator[str]:
    """The address of a server that sends these answers, the first to a request for TLS."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            for data in (first, *more):
                await reader.read(1024)
                writer.write(data)
                await writer.drain()
            await reader.read()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"{host}:{port}"


def error_response(sqlstate: str, message: str) -> bytes:
    """PostgreSQL's message for an error, in its protocol."""
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": message}
    body = b"".join(f"{name}{text}\0".encode() for name, text in fields.items()) + b"\0"
    return b"E" + (len(body) + 4).to_bytes(4, "big") + body


# What cannot be provoked in the test's own PostgreSQL, as PostgreSQL and PgBouncer word it.
REFUSALS = {
    "the server refuses the user or its password": (
        "28P01",
        'password authentication failed for user "{}"',
    ),
    "pg_hba.conf has no entry for this host, user and database without TLS": (
        "28000",
        'no pg_hba.conf entry for host "10.0.0.1", user "{}", database "{}", no encryption',
    ),
    "pg_hba.conf allows no connection from this host as this user": (
        "28000",
        'no pg_hba.conf entry for host "10.0.0.1", user "{}", database "{}", SSL encryption',
    ),
    "too many connections: all of the server's, the database's or the role's are in use": (
        "53300",
        "sorry, too many clients already",
    ),
    "the server is starting, or is a standby that accepts no connections": (
        "57P03",
        "the database system is starting up",
    ),
    "the server is shutting down": ("57P03", "the database system is shutting down"),
    "PgBouncer refuses the settings of the connection:"
    " add options to its ignore_startup_parameters": (
        "08P01",
        "unsupported startup parameter: options",
    ),
    "the database does not exist in PgBouncer's configuration": ("3D000", "no such database: {}"),
    "PgBouncer cannot connect to PostgreSQL": (
        "08P01",
        "server login has been failing, try again later (server_login_retry)",
    ),
    "the server refuses the connection; its log says why": ("28000", "Anmeldung: {}"),
}


@pytest.mark.parametrize("expected", REFUSALS)
async def test_server_refuses_the_connection(expected: str) -> None:
    sqlstate, message = REFUSALS[expected]
    response = error_response(sqlstate, message.replace("{}", secret("user")))
    async with server_that_sends(b"N", response) as address:
        assert await cause(f"postgresql://u:{secret('password')}@{address}/x") == expected


@pytest.mark.parametrize(
    ("parameters", "first", "expected"),
    [
        ("sslmode=require", b"N", "the URL requires TLS, and the server has none"),
        ("sslmode=require", b"HTTP/1.1 400\r\n\r\n", "what listens there is no PostgreSQL"),
        ("sslmode=require", b"S", "the TLS handshake failed"),
        (
            "sslmode=verify-full&sslrootcert=/nowhere",
            b"S",
            "TLS: the file of sslrootcert does not exist",
        ),
        ("connect_timeout=2", b"", "the host does not respond in time"),
    ],
)
async def test_tls_or_the_protocol_fails(parameters: str, first: bytes, expected: str) -> None:
    async with server_that_sends(first, b"x" * 100) as address:
        url = f"postgresql://u:{secret('password')}@{address}/x?{parameters}"
        assert await cause(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:a/{}@db.internal/x",
        "postgresql://u:{}@b@db.internal/x",
        "postgresql://u@corp:{}@db.internal:5432/x",
        "postgresql://u:1/{}@db.internal:5432/x",
    ],
)
def test_unescaped_characters_of_the_password_are_named(url: str) -> None:
    """libpq would take a part of the password for the host, the port or the database."""
    with pytest.raises(ConfigurationError, match="has an unescaped / or @") as caught:
        require_valid_url("DATABASE_URL", url.format(secret("password")))
    assert not leaks(str(caught.value))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u%40corp:a%2Fb%40c@db.internal:5432,other/x%40y",
        "postgresql:///x?host=/tmp/a@b&port=5432",
        "postgresql://[::1]:5432/x?options=-c%20search_path%3Dchat",
        "host=db.internal user=u@corp password=a/b@c",
        "",
    ],
)
def test_escaped_characters_are_accepted(url: str) -> None:
    require_valid_url("DATABASE_URL", url)
