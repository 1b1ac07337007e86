"""Connection strings for PostgreSQL, and the state of a connection."""

from typing import Any

import psycopg
from psycopg import conninfo

from chat_ticket_svc.config import ConfigurationError

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


def require_valid_url(variable: str, url: str) -> None:
    """Raise ConfigurationError if libpq cannot parse the URL of a variable.

    libpq's own error is hidden, as it quotes the URL, which may hold a password.
    """
    try:
        connection_string(url)
    except psycopg.Error:
        raise ConfigurationError(f"{variable}: not a URL that libpq can read") from None


def connection_string(url: str, **session_settings: str | int) -> str:
    """`url` with CONNECTION_OPTIONS as defaults, and PostgreSQL settings for the session added."""
    url_options = conninfo.conninfo_to_dict(url)
    options = [str(url_options["options"])] if "options" in url_options else []
    options += [f"-c {name}={value}" for name, value in session_settings.items()]
    defaults = dict(CONNECTION_OPTIONS)
    if "," in f"{url_options.get('host')}{url_options.get('hostaddr')}":
        # With several hosts, connect to the primary. Writes and LISTEN need it.
        defaults["target_session_attrs"] = "read-write"
    return conninfo.make_conninfo(
        **{**defaults, **url_options, "options": " ".join(options)}  # type: ignore[arg-type]
    )


def is_read_only(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server has reported that it is read-only. It does so with any response."""
    parameter = connection.info.parameter_status
    return "on" in (parameter("in_hot_standby"), parameter("default_transaction_read_only"))


def is_lost(error: psycopg.Error, connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the connection is unusable after this error."""
    state = error.sqlstate or ""
    return connection.closed or state.startswith("08") or state in ("57P01", "57P02", "57P03")
