"""One line of the output of `check`, and how a check makes it."""

import asyncio
from collections.abc import Awaitable
from typing import NamedTuple

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.errors import DomainError

TIMEOUT_SECONDS = 5  # of each check

OK, WARNING, FAILED = "ok", "warning", "FAILED"


class Line(NamedTuple):
    """One line of the output."""

    state: str
    subject: str
    text: str


class CheckFailed(Exception):  # noqa: N818 - its text is the line to print
    """A check that failed."""


async def run_check(subject: str, check: Awaitable[Line]) -> Line:
    """The line that `check` returns, or a FAILED line with its error."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await check
    except TimeoutError:
        return Line(FAILED, subject, f"no response within {TIMEOUT_SECONDS} seconds")
    except (CheckFailed, ConfigurationError, DomainError) as error:
        return Line(FAILED, subject, str(error))
