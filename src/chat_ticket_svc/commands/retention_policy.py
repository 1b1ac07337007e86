"""The file of `expire --policy`: for how long tenants keep sessions that nobody changes.

[default]            # of tenants that have no table of their own; without it they keep all
older_than = "400d"
status = ["archived", "resolved"]

[tenants.acme]
older_than = "90d"   # without `status`, of any status
"""

import re
import tomllib
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from chat_ticket_svc.access.credential import TENANT_ID
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store.retention import Rule

DURATION = re.compile(r"0*([0-9]{1,6})([dh])")
LONGEST = timedelta(days=36_500)


class Policy(NamedTuple):
    """The rules of tenants by their ids, and of the others, if they have one."""

    default: Rule | None
    tenants: dict[str, Rule]


def parse_duration(text: object) -> timedelta:
    """The duration of a text such as 400d or 36h. Raises ValueError."""
    match = DURATION.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError("must be a number of days or hours, such as 400d or 36h")
    duration = timedelta(**{{"d": "days", "h": "hours"}[match[2]]: int(match[1])})
    if not timedelta() < duration <= LONGEST:
        raise ValueError(f"must be longer than 0, and at most {LONGEST.days}d")
    return duration


def _require_tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise ValueError("must be a tenant id: 1 to 255 printable ASCII characters")
    return text


class _Rule(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(extra="forbid")

    older_than: Annotated[timedelta, BeforeValidator(parse_duration)]
    status: list[Literal["active", "resolved", "archived"]] | None = Field(None, min_length=1)

    def rule(self) -> Rule:
        return Rule(self.older_than, None if self.status is None else list(self.status))


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    default: _Rule | None = None
    tenants: dict[Annotated[str, BeforeValidator(_require_tenant_id)], _Rule] = {}


def _message(problem: ErrorDetails) -> str:
    if problem["type"] in ("model_type", "dict_type"):
        return "must be a table"  # and not, as pydantic has it, an instance of a class
    return problem["msg"].removeprefix("Value error, ")


def load(path: Path) -> Policy:
    """Read the file. Raises ConfigurationError with a line for each problem in it."""
    try:
        file = _File.model_validate(tomllib.loads(path.read_bytes().decode()))
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValidationError as error:
        raise ConfigurationError(
            "\n".join(
                f"{path}: {'.'.join(map(str, problem['loc']))}: {_message(problem)}"
                for problem in error.errors(include_input=False, include_url=False)
            )
        ) from error
    except ValueError as error:  # neither UTF-8 nor TOML
        raise ConfigurationError(f"{path}: {error}") from error
    except RecursionError as error:
        raise ConfigurationError(f"{path}: too deeply nested") from error
    if file.default is None and not file.tenants:
        raise ConfigurationError(f"{path}: must have a [default] or a [tenants.ID]")
    default = None if file.default is None else file.default.rule()
    return Policy(default, {tenant_id: rule.rule() for tenant_id, rule in file.tenants.items()})
