"""Connections to PostgreSQL: how each is opened, with which settings, and its state.

A role, a database and the environment may have settings for every session, and a pooler those of
another client. The service sets what it relies on, on every connection that it opens. Only
`default_transaction_read_only` is left alone: operators use it to stop all writes.
"""

import os
import select
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import psycopg
from psycopg import conninfo, pq, waiting
from psycopg.abc import PQGen

from chat_ticket_svc.config import ConfigurationError

T = TypeVar("T")

# Bounded waits, so that a dead peer is noticed within seconds. In seconds, but for
# tcp_user_timeout, which is in milliseconds.
CONNECTION_OPTIONS = {
    "connect_timeout": "3",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "chat-ticket-svc",
}

# Of what connects for a migration. By the other name, migrations recognise servers.
MIGRATION_APPLICATION_NAME = "chat-ticket-svc migrate"

ENCODING = "UTF8"
ESCAPED_BLANK = "\\ "  # in `options`, which PostgreSQL splits at blanks

# What the service relies on in every session, in the form of pg_settings; times in milliseconds.
# They are sent when the connection starts, so they override those of the role and the database.
SESSION_SETTINGS: Mapping[str, str | int] = {
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "standard_conforming_strings": "on",
    "bytea_output": "hex",
    "array_nulls": "on",  # batches of rows are arrays, whose absent fields are nulls
    "gin_fuzzy_search_limit": 0,
    "exit_on_error": "off",
    # Triggers lock a session and then check its rules, in a statement that must see new commits.
    "default_transaction_isolation": "read committed",
    "default_transaction_deferrable": "off",
    "statement_timeout": 0,
    "lock_timeout": 0,
    # A process that hangs in a transaction holds the lock of a session for so long. Another process
    # finishes the drafts of this session up to 5 seconds after their leases.
    "idle_in_transaction_session_timeout": 3_000,
    "idle_session_timeout": 0,
}
# What a connection start cannot set. Older servers do not know `transaction_timeout`, and the other
# values of `synchronous_commit` are the operator's choice: only `off` loses acknowledged writes.
# libpq sends PGDATESTYLE and PGTZ after the options, so they override SESSION_SETTINGS.
# A pooler that drops SESSION_SETTINGS shares its sessions, so there nothing is set.
SET_AFTER_START = """
SELECT set_config(wanted.name, wanted.value, false)
  FROM (VALUES ('transaction_timeout', '0'), ('synchronous_commit', 'on'),
               ('DateStyle', 'ISO, MDY'), ('TimeZone', 'UTC')) AS wanted (name, value)
 WHERE (SELECT source = 'client' FROM pg_settings WHERE name = 'idle_session_timeout')
   AND CASE wanted.name
       WHEN 'synchronous_commit' THEN current_setting('synchronous_commit') = 'off'
       ELSE current_setting(wanted.name, true) <> wanted.value END
"""

# What the service cannot set, and a role or a database may have.
SET_BY_SUPERUSERS = frozenset({"session_replication_role"})

# The settings of the session that differ from those that the service relies on. `$1` holds names
# and values in turn. Only a superuser may set `session_replication_role`: `replica` switches the
# triggers off that keep the rules.
DIFFERENCES = """
SELECT setting.name, setting.setting, setting.unit, wanted.value
  FROM unnest(%(names)s::text[], %(values)s::text[]) AS wanted (name, value)
  JOIN pg_settings AS setting ON lower(setting.name) = lower(wanted.name)
 WHERE setting.setting <> wanted.value
UNION ALL
SELECT name, setting, unit, 'on' FROM pg_settings
 WHERE name = 'synchronous_commit' AND setting = 'off'
UNION ALL
SELECT name, setting, unit, 'origin' FROM pg_settings
 WHERE name = 'session_replication_role' AND setting = 'replica'
"""


class EncodingError(ConfigurationError):
    """The database, or a session of it, has an encoding other than UTF8. The text names it."""


def require_valid_url(variable: str, url: str) -> None:
    """Raise ConfigurationError if libpq cannot parse the URL of a variable.

    libpq's own error is hidden, as it quotes the URL, which may hold a password.
    """
    try:
        parts = conninfo.conninfo_to_dict(url)
    except psycopg.Error:
        raise ConfigurationError(f"{variable}: not a URL that libpq can read") from None
    # libpq takes what precedes an unescaped character for the host and the port.
    ports = [port for port in str(parts.get("port") or "").split(",") if port]
    hosts = [host for host in str(parts.get("host") or "").split(",") if host[:1] not in ("/", "@")]
    path = urlsplit(url).path if "://" in url else ""
    if "@" in "".join([*hosts, path]) or not all(port.isdecimal() for port in ports):
        raise ConfigurationError(
            f"{variable}: its user or password has an unescaped / or @: write them as %2F and %40"
        )


def connection_string(url: str, **session_settings: str | int) -> str:
    """`url` with CONNECTION_OPTIONS as defaults, and with SESSION_SETTINGS, some of them changed.

    The session settings override those of the URL and of PGOPTIONS.
    """
    url_options = conninfo.conninfo_to_dict(url)
    defaults = dict(CONNECTION_OPTIONS)
    if "," in f"{url_options.get('host')}{url_options.get('hostaddr')}":
        # With several hosts, connect to the primary. Writes and LISTEN need it.
        defaults["target_session_attrs"] = "read-write"
    settings = {
        **defaults,
        **url_options,
        # The pipelined connection sends UTF-8. Not among the options, as poolers honour this one.
        "client_encoding": ENCODING,
        "options": start_options(
            url_options.get("options"), {**SESSION_SETTINGS, **session_settings}
        ),
    }
    return conninfo.make_conninfo(**settings)  # type: ignore[arg-type]


def start_options(url_options: object, settings: Mapping[str, str | int]) -> str:
    """Settings as the startup parameter `options` of PostgreSQL.

    They come after the `options` of the URL, or after those of PGOPTIONS if the URL has None, and
    override them. libpq reads PGOPTIONS only for a connection without options.
    """
    first = os.environ.get("PGOPTIONS", "") if url_options is None else url_options
    own = (
        f"-c {name}={str(value).replace(' ', ESCAPED_BLANK)}" for name, value in settings.items()
    )
    return " ".join([str(first), *own]).strip()


def libpq_parameters() -> dict[str, str]:
    """The parameters of a URL that libpq knows, each with its environment variable or nothing."""
    return {
        parameter.keyword.decode(): (parameter.envvar or b"").decode()
        for parameter in pq.Conninfo.get_defaults()
    }


class PoolConnection(psycopg.AsyncConnection[Any]):
    """A connection that reads all that has arrived before it waits for more.

    libpq reads 16 kB at a time. psycopg asks the event loop before each of these reads, which costs
    more than to parse what was read.
    """

    async def wait(self, gen: PQGen[T], *args: Any, **kwargs: Any) -> T:
        return await super().wait(_read_arrived(gen, self.pgconn.socket), *args, **kwargs)


def _read_arrived(gen: PQGen[T], socket: int) -> PQGen[T]:
    """As `gen`, but after a first read it asks to wait only when nothing more has arrived."""
    arrived = None
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            wanted = gen.send(ready)
            while wanted == waiting.WAIT_R and ready & waiting.READY_R:
                if arrived is None:
                    arrived = select.poll()
                    arrived.register(socket, select.POLLIN)
                if not arrived.poll(0):
                    break
                wanted = gen.send(waiting.READY_R)
    except StopIteration as end:
        result: T = end.value
        return result


async def connect(conninfo: str) -> psycopg.AsyncConnection[Any]:
    """A connection in autocommit mode. Raises EncodingError, as `prepare_session` does."""
    connection = await psycopg.AsyncConnection.connect(conninfo, autocommit=True)
    try:
        await prepare_session(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


async def prepare_session(connection: psycopg.AsyncConnection[Any]) -> None:
    """Set what a connection start cannot set. Raises EncodingError unless all is in UTF-8."""
    require_utf8(connection)
    await connection.execute(SET_AFTER_START)


def require_utf8(connection: psycopg.BaseConnection[Any]) -> None:
    """Raise EncodingError unless the database stores UTF-8, and the session sends it."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding != ENCODING:
        raise EncodingError(
            f"the database's encoding is {encoding}, and must be {ENCODING}: create it with"
            " CREATE DATABASE name ENCODING 'UTF8' TEMPLATE template0"
        )
    encoding = connection.info.parameter_status("client_encoding")
    if encoding != ENCODING:
        raise EncodingError(
            f"the session's client_encoding is {encoding}, and must be {ENCODING}:"
            " a pooler ignores what the service asks for"
        )


async def differing_settings(
    connection: psycopg.AsyncConnection[Any], **session_settings: str | int
) -> dict[str, str]:
    """The settings of the session that differ from SESSION_SETTINGS with these changes.

    Each name has a text with its value and the one that the service needs. Without a pooler there
    are none, but for SET_BY_SUPERUSERS.
    """
    wanted = {**SESSION_SETTINGS, **session_settings}
    parameters = {"names": list(wanted), "values": [str(value) for value in wanted.values()]}
    cursor = await connection.execute(DIFFERENCES, parameters)
    return {
        name: f"is {value}{unit or ''}, must be {needed}{unit or ''}"
        async for name, value, unit, needed in cursor
    }


def is_read_only(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server has reported that it is read-only. It does so with any response."""
    parameter = connection.info.parameter_status
    return "on" in (parameter("in_hot_standby"), parameter("default_transaction_read_only"))


def is_lost(error: psycopg.Error, connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the connection is unusable after this error."""
    state = error.sqlstate or ""
    return connection.closed or state.startswith("08") or state in ("57P01", "57P02", "57P03")
