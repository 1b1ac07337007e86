"""Every session has the encoding and the settings that the service relies on."""

import asyncio
import re
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest
from grpc import StatusCode
from grpc_health.v1.health_pb2 import HealthCheckRequest
from support import pooler
from support.client import Api, refused
from support.cluster import Cluster
from support.database import execute
from support.process import command

from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    ListChatMessagesRequest,
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import ListChatSessionsRequest
from chat_ticket.v1.resources_pb2 import CHAT_MESSAGE_ROLE_USER, ChatMessage
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import (
    SESSION_SETTINGS,
    connect,
    connection_string,
    differing_settings,
)

TEXT = "é € 😀"  # what LATIN1 has, what it has not, and four bytes
# What a role may have, and what a session of the service has nevertheless.
SETTINGS = {
    "client_encoding": ("LATIN1", "UTF8"),
    "DateStyle": ("German, DMY", "ISO, MDY"),
    "IntervalStyle": ("sql_standard", "postgres"),
    "TimeZone": ("Asia/Kathmandu", "UTC"),
    "standard_conforming_strings": ("off", "on"),
    "bytea_output": ("escape", "hex"),
    "default_transaction_isolation": ("serializable", "read committed"),
    "default_transaction_deferrable": ("on", "off"),
    "statement_timeout": ("1ms", "7s"),
    "lock_timeout": ("1ms", "0"),
    "idle_in_transaction_session_timeout": ("1ms", "3s"),
    "idle_session_timeout": ("20ms", "0"),
    "transaction_timeout": ("2s", "0"),
    "synchronous_commit": ("off", "on"),
    "array_nulls": ("off", "on"),
    "gin_fuzzy_search_limit": ("1", "0"),
    "exit_on_error": ("on", "off"),
}


@pytest.fixture
def role(fresh_database: str) -> Iterator[str]:
    """The URL of a role of the test's own, which may do everything in its database."""
    name = f"role_{uuid.uuid4().hex}"
    execute(fresh_database, f"CREATE ROLE {name} LOGIN IN ROLE pg_read_all_data, pg_write_all_data")
    url = urlsplit(fresh_database)
    host = url.netloc.rpartition("@")[2]
    yield url._replace(netloc=f"{name}@{host}").geturl()
    execute(fresh_database, f"DROP OWNED BY {name}", f"DROP ROLE {name}")


def set_for_role(database: str, role: str, settings: dict[str, str]) -> None:
    name = urlsplit(role).username
    for setting, value in settings.items():
        quoted = ", ".join(f"'{part}'" for part in value.split(", "))
        execute(database, f"ALTER ROLE {name} SET {setting} = {quoted}")


@pytest.mark.parametrize("name", SETTINGS)
async def test_settings_of_the_role_have_no_effect(
    fresh_database: str, role: str, name: str
) -> None:
    """Each one on its own."""
    of_role, of_service = SETTINGS[name]
    set_for_role(fresh_database, role, {name: of_role})
    async with await connect(connection_string(role, statement_timeout=7000)) as connection:
        cursor = await connection.execute(f"SHOW {name}")  # type: ignore[arg-type]
        assert await cursor.fetchone() == (of_service,)


async def test_settings_of_the_environment_have_no_effect(
    fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libpq sends PGTZ and PGDATESTYLE by themselves. Other settings of PGOPTIONS stay."""
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    monkeypatch.setenv("PGDATESTYLE", "German, DMY")
    monkeypatch.setenv("PGOPTIONS", "-c array_nulls=off -c search_path=of_the_environment")
    async with await connect(connection_string(fresh_database)) as connection:
        cursor = await connection.execute("SHOW search_path")
        assert await cursor.fetchone() == ("of_the_environment",)
        assert await differing_settings(connection) == {}
    of_the_url = (
        f"{fresh_database}{'&' if '?' in fresh_database else '?'}options=-csearch_path%3Durl"
    )
    async with await connect(connection_string(of_the_url)) as connection:
        cursor = await connection.execute("SHOW search_path")
        assert await cursor.fetchone() == ("url",)


def test_the_pooler_is_told_to_set_each_one() -> None:
    """In docs/pgbouncer.ini, as a pooler drops the options of a connection."""
    of_pooler = set(re.findall(r"SET (\w+) =", pooler.CONF.read_text().partition("[pgbouncer]")[0]))
    assert of_pooler - {"transaction_timeout"} == {*SESSION_SETTINGS, "synchronous_commit"}


async def test_stronger_commits_stay(fresh_database: str, role: str) -> None:
    """Only `off`, which loses acknowledged writes in a crash, is overridden."""
    set_for_role(fresh_database, role, {"synchronous_commit": "remote_apply"})
    async with await connect(connection_string(role)) as connection:
        cursor = await connection.execute("SHOW synchronous_commit")
        assert await cursor.fetchone() == ("remote_apply",)


async def test_service_works_with_a_hostile_role(
    fresh_database: str, role: str, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text is stored as it was sent, times are compared as instants, and idle sessions stay."""
    set_for_role(fresh_database, role, {name: text for name, (text, _) in SETTINGS.items()})
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGDATESTYLE", "German, DMY")
    monkeypatch.setenv("PGTZ", "Asia/Kathmandu")
    api: Api = await start_server(role)
    session = await api.session()
    stored = await api.message(session.id, TEXT, metadata_json=f'{{"text":"{TEXT}"}}')
    large = await api.message(session.id, TEXT * 1000)  # not on the shared connection
    with psycopg.connect(fresh_database, client_encoding="UTF8") as connection:
        rows = connection.execute(
            "SELECT convert_to(content, 'UTF8'), metadata->>'text'"
            " FROM chat_messages ORDER BY sequence"
        ).fetchall()
    assert rows == [(TEXT.encode(), TEXT), ((TEXT * 1000).encode(), None)]
    await asyncio.sleep(0.1)  # longer than the role's timeout of idle sessions
    listing = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id))
    listed = [message async for response in listing for message in response.messages]
    assert listed == [stored, large]
    search = SearchChatMessagesRequest(query="é", page_size=1)
    first = await api.messages.SearchChatMessages(search)
    search.page_token = first.next_page_token
    second = await api.messages.SearchChatMessages(search)
    assert {hit.message_id for hit in (*first.hits, *second.hits)} == {stored.id, large.id}
    batch = BatchCreateChatMessagesRequest(
        session_id=session.id,
        messages=[ChatMessage(role=CHAT_MESSAGE_ROLE_USER, content="one of two")] * 2,
    )
    assert len((await api.messages.BatchCreateChatMessages(batch)).messages) == 2
    request = ListChatSessionsRequest(start_create_time=session.create_time)
    assert [s.id for s in (await api.sessions.ListChatSessions(request)).sessions] == [session.id]


async def test_writes_stopped_by_the_operator_stay_stopped(
    fresh_database: str, role: str, start_server: Any
) -> None:
    """`default_transaction_read_only` of a role is no accident, so it is left alone."""
    set_for_role(fresh_database, role, {"default_transaction_read_only": "on"})
    api: Api = await start_server(role)
    with refused(StatusCode.UNAVAILABLE, "DATABASE_READ_ONLY"):
        await api.session()


async def test_settings_that_a_pooler_drops_are_found(
    fresh_database: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PgBouncer does, which ignores the options of a connection."""
    set_for_role(
        fresh_database,
        role,
        {
            "statement_timeout": "30s",
            "default_transaction_isolation": "serializable",
            "synchronous_commit": "off",
        },
    )
    monkeypatch.setattr(
        schema,
        "connection_string",
        lambda url, **settings: psycopg.conninfo.make_conninfo(
            connection_string(url, **settings), options=""
        ),
    )
    differing = (await schema.facts(role, statement_timeout=10_000)).differing_settings
    assert differing.pop("TimeZone", None) in (None, "is Etc/UTC, must be UTC")
    assert differing == {
        "statement_timeout": "is 30000ms, must be 10000ms",
        "default_transaction_isolation": "is serializable, must be read committed",
        "idle_in_transaction_session_timeout": "is 0ms, must be 3000ms",
        "synchronous_commit": "is off, must be on",
    }


def test_migrate_works_with_what_only_libpq_knows(
    fresh_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dbmate's driver refuses another encoding or style of dates, and what only libpq knows."""
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    monkeypatch.setenv("PGDATESTYLE", "German, DMY")
    monkeypatch.setenv("PGGSSENCMODE", "disable")
    parameters = {
        "client_encoding": "LATIN1",
        "keepalives_idle": "10",
        "tcp_user_timeout": "5000",
        "channel_binding": "prefer",
        "gssencmode": "prefer",
        "connect_timeout": "9",
        "target_session_attrs": "read-write",
    }
    separator = "&" if "?" in fresh_database else "?"
    url = f"{fresh_database}{separator}{urlencode(parameters)}"
    assert migrate.up(url, quiet=True) == 0


@pytest.fixture
def ascii_database(cluster: Cluster) -> Iterator[str]:
    """The URL of a database in SQL_ASCII, where PostgreSQL stores any bytes."""
    name = f"ascii_{uuid.uuid4().hex}"
    cluster.execute(
        f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0"
        " LC_COLLATE 'C' LC_CTYPE 'C'"
    )
    yield cluster.url(name)
    cluster.drop(cluster.url(name))


ASCII = "the database's encoding is SQL_ASCII, and must be UTF8"


async def test_a_database_in_another_encoding_is_refused(ascii_database: str) -> None:
    """By the commands, in one line that names the encoding."""
    finished = await asyncio.gather(
        *(
            command(name, DATABASE_URL=ascii_database, CHAT_TICKET_PORT="0")
            for name in ("migrate", "migrate-status", "serve", "check")
        )
    )
    for done in finished:
        assert done.status == 1
        assert done.errors.count("\n") <= 1
        assert ASCII in done.errors + done.output
    with psycopg.connect(ascii_database) as connection:
        row = connection.execute("SELECT to_regclass('schema_migrations')").fetchone()
    assert row == (None,), "nothing was migrated"


async def test_a_database_that_appears_in_another_encoding_is_not_served(
    start_server: Any, cluster: Cluster, ascii_database: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that started without it stays NOT_SERVING, and says why once."""
    later = f"later_{uuid.uuid4().hex}"
    lines: list[str] = []

    async def until_said(text: str) -> None:
        async with asyncio.timeout(30):
            while not any(text in line for line in lines):
                await asyncio.sleep(0.05)
                captured = capsys.readouterr()
                printed = (captured.out + captured.err).split("\n")
                lines.extend(line for line in printed if "not serving" in line)

    api: Api = await start_server(cluster.url(later))
    try:
        await until_said("the database does not exist")
        cluster.execute(f"ALTER DATABASE {urlsplit(ascii_database).path[1:]} RENAME TO {later}")
        await until_said(ASCII)
        await asyncio.sleep(1.5)  # for a probe that would say it again
        assert (await api.health.Check(HealthCheckRequest())).status == 2
    finally:
        cluster.drop(cluster.url(later))
    captured = capsys.readouterr()
    lines += [line for line in (captured.out + captured.err).split("\n") if "not serving" in line]
    assert sum("the database does not exist" in line for line in lines) == 1
    assert sum(ASCII in line for line in lines) == 1
