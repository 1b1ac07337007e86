"""Every setting of the service, read from the environment.

Frozen once read; all that is wrong is reported at once, without the values, some of which are
secrets. The README lists the same settings.
"""

import re
from collections.abc import Iterable
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

# A comma-separated list in the environment.
CommaSeparated = Annotated[tuple[str, ...], NoDecode]

PREFIX = "CHAT_TICKET_"

# Those by which knowing how to check a token is not knowing how to make one.
SIGNATURES = {
    *("RS256", "RS384", "RS512"),
    *("PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512"),
    "EdDSA",
}

# The characters of a URL (RFC 3986). dbmate prints one that has others, password and all.
URL = re.compile(r"([A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=]|%[0-9A-Fa-f]{2})*")

# What stands before the hosts of a URL, and those.
AUTHORITY = re.compile(r"([a-z]+://(?:[^/?#]*@)?)([^/?#]*)")

KIB = 1024
MIB = 1024 * KIB


class ConfigurationError(Exception):
    """The settings are wrong: one line each."""


class Limits(BaseModel):
    """What a request may hold. Numbers of characters where nothing else is said."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    content_bytes: PositiveInt = 256 * KIB
    metadata_bytes: PositiveInt = 64 * KIB
    metadata_depth: PositiveInt = 20
    attachments: PositiveInt = 20
    batch_messages: PositiveInt = 500
    file_url: PositiveInt = 2048
    file_name: PositiveInt = 255
    file_type: PositiveInt = 255
    title: PositiveInt = 500
    query: PositiveInt = 1000


class Quotas(BaseModel):
    """What callers may use of one server process. Streams of messages and changes both count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant_calls_per_second: PositiveFloat = 200
    tenant_burst: PositiveInt = 400
    tenant_calls_in_flight: PositiveInt = 40
    tenant_streams: PositiveInt = 1000
    session_streams: PositiveInt = 100
    calls_in_flight: PositiveInt = 400
    streams: PositiveInt = 4000


class Settings(BaseSettings):
    """The settings of one server process; each is the environment variable of the same name."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        frozen=True,
        hide_input_in_errors=True,
        extra="ignore",
    )

    # The database
    database_url: str = Field(default="", validation_alias="DATABASE_URL")
    database_listen_url: str = Field(default="", validation_alias="DATABASE_LISTEN_URL")
    migrate_database_url: str = Field(default="", validation_alias="MIGRATE_DATABASE_URL")
    pool_size: int = Field(default=10, ge=1, le=1000)
    prepare_statements: bool = True
    statement_timeout_ms: int = Field(default=10_000, ge=1)
    lock_timeout_ms: int = Field(default=2_000, ge=1)

    # The server
    host: str = "127.0.0.1"
    port: int = Field(default=50051, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=128)
    reflection: bool = True
    unary_timeout_seconds: float = Field(default=10, gt=0)
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    drain_seconds: float = Field(default=10, ge=0)

    # Callers
    auth: Literal["none", "jwt", "mtls", "jwt,mtls"] = "none"
    allow_insecure: bool = False
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    mtls_policy: Path | None = None
    jwks: str = ""
    jwt_issuer: str = ""
    jwt_audience: str = ""
    jwt_algorithms: CommaSeparated = ("RS256", "ES256", "EdDSA")
    quotas: Quotas = Quotas()

    # Streams
    watch_heartbeat_seconds: float = Field(default=15, gt=0)
    stream_write_timeout_seconds: float = Field(default=30, gt=0)
    watch_poll_interval_seconds: float = Field(default=2, gt=0)

    # Attachments
    attachment_url_check: bool = True
    attachment_url_schemes: CommaSeparated = ("https",)
    attachment_url_allowed_hosts: CommaSeparated = ()

    limits: Limits = Limits()
    log_format: Literal["auto", "json", "console"] = "auto"
    access_log: bool = True
    traces: bool = False
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("database_url", "database_listen_url", "migrate_database_url")
    @classmethod
    def _a_url(cls, value: str) -> str:
        if value and not value.startswith(("postgres://", "postgresql://")):
            raise ValueError("is not a postgresql:// URL")
        if not URL.fullmatch(value) or not all(map(_is_split, _of_each_host(value))):
            raise ValueError("is not a URL with its special characters as %XX")
        return value

    @field_validator("migrate_database_url")
    @classmethod
    def _one_host(cls, value: str) -> str:
        if has_several_hosts(value):
            raise ValueError("is not a URL of one host, the primary's")
        return value

    @field_validator(
        "attachment_url_schemes", "attachment_url_allowed_hosts", "jwt_algorithms", mode="before"
    )
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part for part in (part.strip() for part in value.split(",")) if part)
        return value

    @field_validator("attachment_url_schemes")
    @classmethod
    def _known_schemes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - {"http", "https"}:
            raise ValueError("is https, http or both, separated by a comma")
        return value

    @field_validator("jwt_algorithms")
    @classmethod
    def _public_key_algorithms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or set(value) - SIGNATURES:
            raise ValueError(f"is one or more of {', '.join(sorted(SIGNATURES))}")
        return value

    @field_validator("jwks")
    @classmethod
    def _keys_that_nobody_can_swap(cls, value: str) -> str:
        if not _is_split(value):
            raise ValueError("is neither a URL nor a file")
        url = urlsplit(value)
        if url.scheme == "http" and not is_loopback(url.hostname or ""):
            raise ValueError("is neither https:// nor a file")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        """What the ways in need besides."""
        required: dict[str, str] = {}
        if self.tls_certificate or self.tls_key:
            required |= dict.fromkeys(("tls_certificate", "tls_key"), "the other of the two")
        if "mtls" in self.auth:
            names = ["tls_certificate", "tls_key", "tls_client_ca", "mtls_policy"]
            required |= dict.fromkeys(names, f"{variable('auth')}={self.auth}")
        if "jwt" in self.auth:
            names = ["jwks", "jwt_issuer", "jwt_audience"]
            required |= dict.fromkeys(names, f"{variable('auth')}={self.auth}")
        problems = [
            f"{variable(name)}: is required by {by}"
            for name, by in required.items()
            if not getattr(self, name)
        ]
        if self.exposed and not self.allow_insecure:
            problems.append(
                f"{variable('host')}: is not loopback, where {self.exposed}: "
                f"see {variable('auth')}, {variable('tls_certificate')} and, "
                f"if it must be, {variable('allow_insecure')}"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def exposed(self) -> str:
        """What anybody on the network could do to this server, if anything."""
        if is_loopback(self.host):
            return ""
        if self.auth == "none":
            return "anybody could act for any tenant"
        return "" if self.tls_certificate else "anybody on the way could read and take credentials"

    @property
    def listen_url(self) -> str:
        """Where LISTEN runs: past a pooler, which would lose it."""
        return self.database_listen_url or self.database_url

    @property
    def migrate_url(self) -> str:
        return self.migrate_database_url or self.database_url


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def has_several_hosts(url: str) -> bool:
    """Whether libpq would try one after the other; dbmate takes one."""
    query = parse_qs(urlsplit(url).query)
    return len(_of_each_host(url)) > 1 or any(
        "," in value for name in ("host", "hostaddr") for value in query.get(name, ())
    )


def _of_each_host(url: str) -> list[str]:
    """The URL of a database once for each of the hosts before its path, as libpq reads them."""
    found = AUTHORITY.match(url)
    if found is None:
        return [url]
    before, hosts, after = found[1], found[2], url[found.end() :]
    return [f"{before}{host}{after}" for host in hosts.split(",")]


def _is_split(url: str) -> bool:
    """Whether the parts of a URL can be told; the errors of urlsplit quote them."""
    try:
        parts = urlsplit(url)
        return parts.port != 0
    except ValueError:
        return False


def read_file(variable: str, path: Path) -> bytes:
    """The bytes of the file that a variable names; ConfigurationError when they cannot be read.

    Which never tells the path: people put there what belongs into the file.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"{variable}: {error.strerror}") from error


def variable(field: str) -> str:
    """The environment variable of a field, whose validation alias is one already."""
    return field if field.isupper() else f"{PREFIX}{field.upper()}"


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """The variables that look like ours and are none: perhaps misspelt, so not in effect."""
    known = [variable(name) for name in Settings.model_fields]
    return sorted(
        name
        for name in environment
        if name.startswith(PREFIX) and name.partition("__")[0] not in known
    )


def load(**overrides: object) -> Settings:
    """Read the environment; raises ConfigurationError naming all that is wrong."""
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
    except SettingsError as error:  # a whole group as one variable; names it, without the value
        raise ConfigurationError(str(error)) from None
    return settings
