"""Says why PostgreSQL cannot be reached, without the secrets that libpq's texts may quote.

A connection that fails has no SQLSTATE in libpq's interface, so its text is matched. The texts are
libpq's, psycopg's, PgBouncer's, and PostgreSQL's in English. The SQLSTATE of each is beside it.
"""

import re

import psycopg

from chat_ticket_svc import errors
from chat_ticket_svc.config import ConfigurationError

_CAUSES = {
    # The client's side, or the network.
    "failed to resolve host|could not translate host name": "the host name does not resolve",
    "Connection refused": "connection refused: nothing listens at the host and port",
    "on socket .* failed: No such file or directory": "no server has this socket",
    "[Tt]imeout expired": "the host does not respond in time",
    "No route to host|Network is unreachable": "there is no route to the host",
    "on socket .* failed: Permission denied": "this process may not open the socket",
    "invalid [a-z_]+ value|invalid integer value|bad value for": (
        "the URL has a parameter with an invalid value"
    ),
    'definition of service "[^"]*" not found': "the service file does not define the service",
    'service file "[^"]*" not found': "the service file does not exist",
    "no password supplied": "the server asks for a password, and the URL has none",
    "server does not support SSL": "the URL requires TLS, and the server has none",
    "certificate verify failed": "TLS: the authority of the server's certificate is not trusted",
    "root certificate file .* does not exist": "TLS: the file of sslrootcert does not exist",
    "server certificate for .* does not match": "TLS: the server's certificate has another name",
    "could not (?:read|load) .*(?:certificate|private key)|certificate present, but not private key"
    "|private key file": "TLS: the client's certificate or key cannot be used",
    "SSL error|SSL SYSCALL error": "the TLS handshake failed",
    "received invalid response|expected authentication request": (
        "what listens there is no PostgreSQL"
    ),
    "session is read-only|server is in hot standby mode": "no host accepts writes",
    "server closed the connection unexpectedly|Connection reset": (
        "the server closed the connection"
    ),
    # PgBouncer
    "unsupported startup parameter": (
        "PgBouncer refuses the settings of the connection:"
        " add options to its ignore_startup_parameters"
    ),
    "no such database": "the database does not exist in PgBouncer's configuration",
    "no such user": "the user does not exist in PgBouncer's configuration",
    "no more connections allowed": "PgBouncer has too many clients: see its max_client_conn",
    "query_wait_timeout": "PgBouncer had no connection within its query_wait_timeout",
    "server login (?:failed|has been failing)|server_login_retry|cannot connect to server"
    "|connect failed": "PgBouncer cannot connect to PostgreSQL",
    "the database system is (?:not yet accepting|not accepting|starting)": (
        "the server is starting, or is a standby that accepts no connections"  # 57P03
    ),
    "the database system is shutting down": "the server is shutting down",  # 57P03
    "the database system is in recovery": "the server recovers from a crash",  # 57P03
    "(?:password|SASL|PAM|LDAP|GSSAPI|Ident|Peer|certificate) authentication failed": (
        "the server refuses the user or its password"  # 28P01, 28000
    ),
    "no pg_hba.conf entry.*(?:no encryption|SSL off)": (
        "pg_hba.conf has no entry for this host, user and database without TLS"  # 28000
    ),
    "no pg_hba.conf entry(?!.*(?:no encryption|SSL off))|pg_hba.conf rejects": (
        "pg_hba.conf allows no connection from this host as this user"  # 28000
    ),
    "requires a valid client certificate": "the server asks for a client certificate",  # 28000
    'role "[^"]*" does not exist': "the role does not exist",  # 28000
    "is not permitted to log in": "the role may not log in",  # 28000
    'database "[^"]*" does not exist': "the database does not exist",  # 3D000
    "permission denied for database": "the role may not connect to the database",  # 42501
    "permission denied to set parameter": (
        "the role may not set a parameter that the URL's options name"  # 42501
    ),
    "unrecognized configuration parameter": (
        "the URL's options name a parameter that the server does not know"  # 42704
    ),
    "is not currently accepting connections": "the database accepts no connections",  # 55000
    "too many clients|remaining connection slots are reserved|too many connections": (
        "too many connections: all of the server's, the database's or the role's are in use"
    ),  # 53300
}
_PATTERNS = {re.compile(pattern): cause for pattern, cause in _CAUSES.items()}
# A severity and two blanks begin PostgreSQL's own texts, in any language.
_SERVER_TEXT = re.compile(r"failed: (?:FATAL|PANIC|\S+):  ")

_SQLSTATES = {
    "42501": "the role lacks rights on the tables of this service",
    "57014": "the database does not answer in time",
    "57P01": "the server closed the connection",
    "57P02": "the server closed the connection",
    "57P03": "the server is starting or shutting down",
    "25006": "the server is read-only",
}


def cause(error: BaseException) -> str:
    """Why an attempt to use the database failed, as a clause without secrets.

    With several hosts, or several addresses of one, it names each cause once.
    """
    if isinstance(error, (ConfigurationError, errors.DomainError)):
        return str(error)
    if not isinstance(error, psycopg.Error):
        return type(error).__qualname__
    if error.sqlstate:
        unknown = f"{type(error).__qualname__}, SQLSTATE {error.sqlstate}"
        return _SQLSTATES.get(error.sqlstate, unknown)
    text = str(error)
    causes = [cause for pattern, cause in _PATTERNS.items() if pattern.search(text)]
    if causes:
        return "; ".join(dict.fromkeys(causes))
    if _SERVER_TEXT.search(text):
        return "the server refuses the connection; its log says why"
    return type(error).__qualname__


def unreachable(error: BaseException) -> errors.UnavailableError:
    """The domain error for a database that cannot be used, with the cause in its text."""
    return errors.UnavailableError(
        f"the database cannot be reached: {cause(error)}", reason="DATABASE_UNAVAILABLE"
    )
