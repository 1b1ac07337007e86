"""Every setting of the service, read from the environment.

Frozen once read; all that is wrong is reported at once, without the values, some of which are
secrets. The README lists the same settings.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

# A comma-separated list in the environment.
CommaSeparated = Annotated[tuple[str, ...], NoDecode]

KIB = 1024
MIB = 1024 * KIB


class ConfigurationError(Exception):
    """The settings are wrong: one line each."""


class Limits(BaseModel):
    """What a request may hold. Numbers of characters where nothing else is said."""

    model_config = ConfigDict(frozen=True)

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


class Settings(BaseSettings):
    """The settings of one server process; each is the environment variable of the same name."""

    model_config = SettingsConfigDict(
        env_prefix="CHAT_TICKET_",
        env_nested_delimiter="__",
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
    reflection: bool = True
    unary_timeout_seconds: float = Field(default=10, gt=0)
    drain_seconds: float = Field(default=10, ge=0)

    # Streams
    heartbeat_seconds: float = Field(default=15, gt=0)
    slow_reader_seconds: float = Field(default=30, gt=0)
    poll_seconds: float = Field(default=2, gt=0)

    # Attachments
    attachment_url_check: bool = True
    attachment_url_schemes: CommaSeparated = ("https",)
    attachment_url_allowed_hosts: CommaSeparated = ()

    limits: Limits = Limits()
    log_format: Literal["auto", "json", "console"] = "auto"

    @field_validator("database_url", "database_listen_url", "migrate_database_url")
    @classmethod
    def _a_url(cls, value: str) -> str:
        if value and not value.startswith(("postgres://", "postgresql://")):
            raise ValueError("is not a postgresql:// URL")
        return value

    @field_validator("attachment_url_schemes", "attachment_url_allowed_hosts", mode="before")
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

    @property
    def listen_url(self) -> str:
        """Where LISTEN runs: past a pooler, which would lose it."""
        return self.database_listen_url or self.database_url

    @property
    def migrate_url(self) -> str:
        return self.migrate_database_url or self.database_url


def load(**overrides: object) -> Settings:
    """Read the environment; raises ConfigurationError naming all that is wrong."""
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        prefix = Settings.model_config["env_prefix"]
        lines = []
        for problem in error.errors(include_input=False, include_url=False):
            name = "__".join(str(part) for part in problem["loc"])
            name = name if name.isupper() else f"{prefix}{name.upper()}"
            lines.append(f"{name}: {problem['msg']}")
        raise ConfigurationError("\n".join(lines)) from None
    return settings
