"""Checks the settings, and shows those that differ from their defaults."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from chat_ticket_svc import config
from chat_ticket_svc.commands.check.line import OK, WARNING, Line
from chat_ticket_svc.config import Settings


async def check_settings(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[Line]:
    changed = list(_changed_settings(settings))
    yield Line(OK, "settings", "\n".ljust(23).join(changed) or "all have their defaults")
    if unknown := config.unknown_variables(environment):
        yield Line(WARNING, "settings", f"unknown, without effect: {', '.join(unknown)}")
    if settings.exposure:
        text = f"{settings.exposure}; allowed by CHAT_TICKET_ALLOW_INSECURE"
        yield Line(WARNING, "settings", text)


def _changed_settings(settings: Settings) -> Iterator[str]:
    """The settings that differ from their defaults, without secrets."""
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        field = type(settings).model_fields[name]
        variable = str(field.validation_alias or config.variable(name))
        if isinstance(value, BaseModel):
            for part in sorted(value.model_fields_set):
                yield f"{variable}__{part.upper()}={getattr(value, part)}"
        elif value != field.default:
            yield f"{variable}={_redact(variable, value)}"


def _redact(variable: str, value: Any) -> str:
    """A value without its secrets.

    Of a URL, only the scheme, the host and the path are shown. A path is shown only if it names a
    file: otherwise the variable may hold a key by mistake.
    """
    if variable.endswith("_URL"):
        parts = urlsplit(value)
        if "@" in parts.path:  # unescaped special characters have moved the password into the path
            return "***"
        user = "***@" if "@" in parts.netloc else ""
        query = "?***" if parts.query else ""
        return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
    if isinstance(value, Path) or variable == "CHAT_TICKET_JWKS":
        with contextlib.suppress(OSError, ValueError):
            return str(value) if Path(value).is_file() else "***"
        return "***"
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return "***" if "@" in text else text  # may be a URL with a password, set by mistake
