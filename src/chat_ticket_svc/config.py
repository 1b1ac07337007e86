"""All settings of the service, read from environment variables.

Settings are immutable. All errors are reported together, and without the values, because some of
the values are secrets.
"""

import os
import re
import sys
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from chat_ticket_svc.limits import (
    CALLS_PER_SECOND_AND_CORE,
    MAX_CORES_OF_PROCESS,
    Limits,
    Quotas,
)
from chat_ticket_svc.search_language import SEARCH_LANGUAGES

# A comma-separated list in the environment, a tuple here.
CommaSeparated = Annotated[tuple[str, ...], NoDecode]

PREFIX = "CHAT_TICKET_"

# The key that verifies one of these signatures cannot create one, unlike the key of an HMAC.
ASYMMETRIC_ALGORITHMS = {
    *("RS256", "RS384", "RS512"),
    *("PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512"),
    "EdDSA",
}

# The characters that RFC 3986 allows. If a URL has others, dbmate prints it, with its password.
URL_CHARACTERS = re.compile(r"([A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})*")

# The scheme and user info of a URL, and its hosts.
HOSTS = re.compile(r"([a-z]+://(?:[^/?#]*@)?)([^/?#]*)")

MAX_WORKERS = 128


class ConfigurationError(Exception):
    """One or more settings are not valid, with one line for each problem."""


class Settings(BaseSettings):
    """The settings of one server process, each read from the variable that `variable` names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        extra="ignore",
    )

    # The database
    database_url: str = Field(
        default="",
        validation_alias="DATABASE_URL",
        description="Required, except with `--embedded`. "
        "`postgresql://user:password@host:port/db`; `?host=/dir` for a Unix socket. It may name "
        "several hosts, as in `one:5432,other:5432`: the first that accepts writes is used.",
    )
    database_listen_url: str = Field(
        default="",
        validation_alias="DATABASE_LISTEN_URL",
        description="The URL of a direct connection for LISTEN and NOTIFY. Needed when "
        "`DATABASE_URL` is a connection pooler. The default is `DATABASE_URL`.",
    )
    migrate_database_url: str = Field(
        default="",
        validation_alias="MIGRATE_DATABASE_URL",
        description="The URL of a direct connection to one host, for migrations. Required when "
        "`DATABASE_URL` names several hosts. Needed when it is a connection pooler. The default "
        "is `DATABASE_URL`.",
    )
    pool_size: int = Field(
        default=10,
        ge=1,
        le=1000,
        description="Connections in the database pool of a process. One tenant may use half of "
        "them. Up to 4 times this many calls, of all tenants together, may wait for one, for at "
        "most 2 seconds each. Each tenant is guaranteed a fair share of this queue. All tenants "
        "share 2 more connections: one for reads by id, one for small messages.",
    )
    prepare_statements: bool = Field(
        default=True,
        description="Prepare statements. Set it to false behind a pooler that does not support "
        "prepared statements, such as PgBouncer before 1.21.",
    )
    statement_timeout_ms: int = Field(
        default=10_000,
        ge=1,
        description="PostgreSQL's `statement_timeout`. Behind PgBouncer, set it in PgBouncer's "
        "`connect_query`.",
    )
    lock_timeout_ms: int = Field(
        default=2_000,
        ge=1,
        description="PostgreSQL's `lock_timeout`. Behind PgBouncer, set it in PgBouncer's "
        "`connect_query`.",
    )

    # The server
    host: str = Field(
        default="127.0.0.1",
        description="The address to listen on. An address that is not loopback requires "
        "credentials and TLS.",
    )
    port: int = Field(
        default=50051, ge=0, le=65535, description="The port to listen on. 0 means any free port."
    )
    workers: int = Field(
        default=1,
        ge=1,
        le=MAX_WORKERS,
        description="Server processes that share the port. `serve --workers N` overrides it.",
    )
    reflection: bool = Field(default=True, description="Serve gRPC reflection.")
    unary_timeout_seconds: float = Field(
        default=10, gt=0, description="The deadline of a unary call that has none of its own."
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Serve Prometheus metrics at `/metrics` on this port of `CHAT_TICKET_HOST`, "
        "without credentials. 0 means any free port. With several workers, the first uses this "
        "port and the others use the following ones. Not set: no metrics.",
    )
    drain_seconds: float = Field(
        default=10, ge=0, description="How long calls may continue after SIGTERM."
    )

    # Callers
    auth: Literal["none", "jwt", "mtls", "jwt,mtls"] = Field(
        default="none", description="How callers authenticate."
    )
    allow_insecure: bool = Field(
        default=False,
        description="Allow listening on a public address without credentials or without TLS. The "
        "server logs a warning.",
    )
    tls_certificate: Path | None = Field(
        default=None,
        description="PEM file with the server's certificate. With the key, the server serves TLS. "
        "Both files may be renewed while it runs.",
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file with the key of the certificate."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file with the certificate authorities that sign client certificates.",
    )
    mtls_policy: Path | None = Field(
        default=None,
        description="TOML file that lists the callers with client certificates, and their tenants "
        "and permissions.",
    )
    jwks: str = Field(
        default="",
        description="The JSON Web Key Set: a file, or an `https://` URL (`http://` on loopback).",
    )
    jwt_issuer: str = Field(default="", description="The value that the token's `iss` must equal.")
    jwt_audience: str = Field(
        default="", description="The value that the token's `aud` must equal or contain."
    )
    jwt_algorithms: CommaSeparated = Field(
        default=("RS256", "ES256", "EdDSA"),
        description="The allowed signature algorithms, separated by commas. Only public-key "
        "algorithms are supported.",
    )
    jwt_tenants_claim: str = Field(
        default="tenants",
        description="The claim that lists the token's tenants: a list of ids, or `*` for all.",
    )
    jwt_permissions_claim: str = Field(
        default="scope",
        description="The claim that lists the token's permissions: a text separated by spaces, as "
        "in `scope`, or a list, as in Auth0's `permissions`.",
    )
    jwt_subject_claim: str = Field(
        default="sub", description="The claim that names the caller in the log."
    )
    quotas: Quotas = Quotas()

    # Streams
    watch_heartbeat_seconds: float = Field(
        default=15,
        gt=0,
        description="A watch sends a heartbeat when its session has not changed for this long.",
    )
    stream_write_timeout_seconds: float = Field(
        default=30,
        gt=0,
        description="How long a client may leave a stream unread before the server ends the "
        "stream, with the reason `SLOW_READER`.",
    )
    watch_poll_interval_seconds: float = Field(
        default=2,
        gt=0,
        description="How often a process reads the revisions of all its watched sessions. This is "
        "the fallback for lost notifications.",
    )

    # Drafts
    draft_seconds: float = Field(
        default=60,
        ge=1,
        le=3600,
        description="When the writer of a draft is silent for this long, its draft becomes a "
        "message with the state `INCOMPLETE`. All servers of a database need the same.",
    )

    # Deleted sessions and tickets
    session_tombstone_days: int = Field(
        default=30,
        ge=1,
        le=3650,
        description="How long the id of a deleted session is rejected when a session is created. "
        "It is kept for so many days, without anything of what the session was. The ids of deleted "
        "tickets are kept as long. So a cursor of `WatchChatSessions` is good for so many days: an "
        "older one can be refused with `CURSOR_EXPIRED`. All servers of a database need the same.",
    )

    # Attachments
    attachment_url_check: bool = Field(
        default=True,
        description="Request one byte of each attachment URL before storing it. A process checks "
        "100 URLs at a time, and 25 of one tenant.",
    )
    attachment_url_schemes: CommaSeparated = Field(
        default=("https",),
        description="The allowed schemes of attachment URLs: `https`, or `https,http` for both.",
    )
    attachment_url_allowed_hosts: CommaSeparated = Field(
        default=(),
        description="Internal hosts that an attachment URL may name: `host` or `host:port`, "
        "separated by commas.",
    )

    # Search
    search_language: str = Field(
        default="english",
        description="The search language of tenants that have none of their own: the text search "
        "configuration of PostgreSQL that stems messages without a `language_code`. One of "
        f"{', '.join(f'`{language}`' for language in SEARCH_LANGUAGES)}; `simple` does not stem. "
        "All servers of a database need the same.",
    )

    limits: Limits = Limits()
    log_format: Literal["auto", "json", "console"] = Field(
        default="auto",
        description="The format of the log. `auto` is `console` on a terminal, otherwise `json`.",
    )
    access_log: bool = Field(default=True, description="Log a line for each call, at level `info`.")
    traces: bool = Field(
        default=False, description="Send OpenTelemetry traces. Needs the extra `tracing`."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The lowest level that is logged."
    )

    @field_validator("database_url", "database_listen_url", "migrate_database_url")
    @classmethod
    def _validate_database_url(cls, value: str) -> str:
        if value and not value.startswith(("postgres://", "postgresql://")):
            raise ValueError("must be a postgresql:// URL")
        if not URL_CHARACTERS.fullmatch(value) or not all(map(_is_parseable, _urls_by_host(value))):
            raise ValueError("must be a valid URL, with special characters percent-encoded")
        return value

    @field_validator("migrate_database_url")
    @classmethod
    def _require_single_host(cls, value: str) -> str:
        if has_several_hosts(value):
            raise ValueError("must name a single host, the primary")
        return value

    @field_validator(
        "attachment_url_schemes", "attachment_url_allowed_hosts", "jwt_algorithms", mode="before"
    )
    @classmethod
    def _split_at_commas(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part for part in (part.strip() for part in value.split(",")) if part)
        return value

    @field_validator("attachment_url_schemes")
    @classmethod
    def _validate_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - {"http", "https"}:
            raise ValueError("must be https, http or both, separated by a comma")
        return value

    @field_validator("search_language")
    @classmethod
    def _validate_search_language(cls, value: str) -> str:
        if value not in SEARCH_LANGUAGES:
            raise ValueError(f"must be one of {', '.join(SEARCH_LANGUAGES)}")
        return value

    @field_validator("jwt_algorithms")
    @classmethod
    def _require_asymmetric_algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - ASYMMETRIC_ALGORITHMS:
            raise ValueError(f"must be one or more of {', '.join(sorted(ASYMMETRIC_ALGORITHMS))}")
        return value

    @field_validator("jwks")
    @classmethod
    def _require_trustworthy_jwks(cls, value: str) -> str:
        if not _is_parseable(value):
            raise ValueError("must be a URL or the path of a file")
        url = urlsplit(value)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise ValueError("must be an https:// URL or the path of a file")
        return value

    @model_validator(mode="after")
    def _validate_access(self) -> Self:
        """TLS and each kind of authentication require further settings; so does public access."""
        required: dict[str, str] = {}
        if self.tls_certificate or self.tls_key:
            required |= dict.fromkeys(("tls_certificate", "tls_key"), "the other one of the pair")
        if "mtls" in self.auth:
            names = ["tls_certificate", "tls_key", "tls_client_ca", "mtls_policy"]
            required |= dict.fromkeys(names, f"{variable('auth')}={self.auth}")
        if "jwt" in self.auth:
            names = ["jwks", "jwt_issuer", "jwt_audience"]
            required |= dict.fromkeys(names, f"{variable('auth')}={self.auth}")
        problems = [
            f"{variable(name)}: required by {reason}"
            for name, reason in required.items()
            if not getattr(self, name)
        ]
        if self.exposure and not self.allow_insecure:
            problems.append(
                f"{variable('host')}: must be a loopback address, because {self.exposure}: "
                f"set {variable('auth')} and {variable('tls_certificate')}, "
                f"or accept the risk with {variable('allow_insecure')}=true"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def tenant_calls_per_second(self) -> float:
        """The rate of a tenant in this process: as set, or what suits the machine."""
        if self.quotas.tenant_calls_per_second is not None:
            return self.quotas.tenant_calls_per_second
        return CALLS_PER_SECOND_AND_CORE * min(_cores() / self.workers, MAX_CORES_OF_PROCESS)

    @property
    def exposure(self) -> str:
        """What anyone on the network could do to this server. Empty for a safe configuration."""
        if is_loopback(self.host):
            return ""
        if self.auth == "none":
            return "anyone could act for any tenant"
        return "" if self.tls_certificate else "anyone on the network path could steal credentials"

    @property
    def listen_url(self) -> str:
        """The URL for LISTEN, which does not work through a connection pooler."""
        return self.database_listen_url or self.database_url

    @property
    def migrate_url(self) -> str:
        return self.migrate_database_url or self.database_url


def _cores() -> int:
    """The cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def has_several_hosts(url: str) -> bool:
    """Whether libpq would try several hosts in turn. dbmate accepts only one."""
    query = parse_qs(urlsplit(url).query)
    return len(_urls_by_host(url)) > 1 or any(
        "," in value for name in ("host", "hostaddr") for value in query.get(name, ())
    )


def _urls_by_host(url: str) -> list[str]:
    """A database URL with several hosts, as libpq allows, as one URL for each host."""
    match = HOSTS.match(url)
    if match is None:
        return [url]
    prefix, hosts, suffix = match[1], match[2], url[match.end() :]
    return [f"{prefix}{host}{suffix}" for host in hosts.split(",")]


def _is_parseable(url: str) -> bool:
    """Whether urlsplit accepts the URL. Its errors quote the URL, so they are not shown."""
    try:
        parts = urlsplit(url)
        return parts.port != 0
    except ValueError:
        return False


def read_file(variable: str, path: Path) -> bytes:
    """The bytes of the file that a variable names. Raises ConfigurationError if it is unreadable.

    The error never shows the path, because users sometimes set the file's content instead.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{variable}: {error.strerror}") from error


def variable(field: str) -> str:
    """The environment variable of a field. A validation alias is already a variable."""
    return field if field.isupper() else f"{PREFIX}{field.upper()}"


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """Variables with our prefix that are not settings: probably misspelt, and without effect."""
    settings = {variable(name) for name in Settings.model_fields}
    return sorted(
        name
        for name in environment
        if name.startswith(PREFIX) and name.partition("__")[0] not in settings
    )


def load(**overrides: object) -> Settings:
    """Read the environment. Raises one ConfigurationError that lists all problems."""
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            text = problem["msg"].removeprefix("Value error, ")
            if problem["loc"]:
                text = f"{variable('__'.join(str(part) for part in problem['loc']))}: {text}"
            lines.append(text)
        raise ConfigurationError("\n".join(lines)) from None
    except SettingsError as error:
        # A group, such as the quotas, in a single variable. The text names it, without the value.
        raise ConfigurationError(str(error)) from None
    return settings
