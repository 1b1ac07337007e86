"""How this service connects to PostgreSQL: the connection string, and what a connection tells."""

from typing import Any

import psycopg
from psycopg import conninfo

from chat_ticket_svc.config import ConfigurationError

# Bounded waits, so that a dead peer is noticed within seconds (reliability notes 10 and 15).
CONNECTION_OPTIONS = {
    "connect_timeout": "3",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "chat-ticket-svc",
}


def require_valid_url(variable: str, url: str) -> None:
    """ConfigurationError unless libpq can read the URL of a variable; its own error quotes it."""
    try:
        connection_string(url)
    except psycopg.Error:
        raise ConfigurationError(f"{variable}: is not a URL that libpq can read") from None


def connection_string(url: str, **session_settings: str | int) -> str:
    """`url` with our timeouts added, and PostgreSQL settings for the session as options."""
    given = conninfo.conninfo_to_dict(url)
    options = [str(given["options"])] if "options" in given else []
    options += [f"-c {name}={value}" for name, value in session_settings.items()]
    defaults = dict(CONNECTION_OPTIONS)
    if "," in f"{given.get('host')}{given.get('hostaddr')}":
        # Of several hosts the primary is meant: all that we do needs it, LISTEN too.
        defaults["target_session_attrs"] = "read-write"
    return conninfo.make_conninfo(
        **{**defaults, **given, "options": " ".join(options)}  # type: ignore[arg-type]
    )


def is_read_only(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server has told so by now: it does with the answer to any statement."""
    told = connection.info.parameter_status
    return "on" in (told("in_hot_standby"), told("default_transaction_read_only"))


def is_lost(error: psycopg.Error, connection: psycopg.AsyncConnection[Any]) -> bool:
    state = error.sqlstate or ""
    return connection.closed or state.startswith("08") or state in ("57P01", "57P02", "57P03")
