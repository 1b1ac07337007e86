"""Redaction: log lines about exceptions and lines of libraries, without the values they quote.

The text of an exception may quote content, SQL parameters, URLs or credentials. A log line
therefore holds the type of each exception and where it was raised, but not its text.
"""

import json
import logging
import re
import traceback
from typing import Any

import structlog

# The name of a table or constraint. A trigger can raise an error with any text in its place.
IDENTIFIER = re.compile(r"[a-z_][a-z0-9_]*")


MAX_QUOTED_CHARACTERS = 200


def quote(value: object) -> str:
    """A value that is no secret, for one log line: escaped, and cut at MAX_QUOTED_CHARACTERS."""
    if value is None:
        return "nothing"
    # Lists are cut by their elements first, so that a large one costs no more than a small one.
    if isinstance(value, list):
        value = [str(element)[: MAX_QUOTED_CHARACTERS + 1] for element in value[:20]]
    text = value[: MAX_QUOTED_CHARACTERS + 1] if isinstance(value, str) else json.dumps(value)
    if not text.isprintable():
        text = json.dumps(text)[1:-1]
    return text if len(text) <= MAX_QUOTED_CHARACTERS else f"{text[:MAX_QUOTED_CHARACTERS]}..."


def exception_chain(error: BaseException) -> list[dict[str, Any]]:
    """An exception and its causes, the root cause first, each with its type and stack frames."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return [_describe(link) for link in chain]


def _describe(error: BaseException) -> dict[str, Any]:
    fields: dict[str, Any] = {"error": type(error).__qualname__}
    # The diagnostics of a psycopg error. Telemetry does not import psycopg.
    diagnostics = getattr(error, "diag", None)
    for name in ("sqlstate", "table_name", "constraint_name"):
        value = getattr(diagnostics, name, None)
        if value and (name == "sqlstate" or IDENTIFIER.fullmatch(value)):
            fields[name] = value
    fields["frames"] = [
        f"{frame.filename}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return fields


class _Redacted(str):
    """Replaces an argument of a library's line, and looks the same in every format."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _redact(argument: object) -> object:
    if isinstance(argument, (int, float)):
        return argument
    if isinstance(argument, BaseException):
        return _Redacted(type(argument).__qualname__)
    return _Redacted("...")


def redact_arguments(record: logging.LogRecord) -> bool:
    """A logging filter that redacts the arguments of a library's line, except numbers.

    They include the texts of exceptions, and asyncio tasks with their results.
    """
    # gRPC can log this hundreds of times for a single request, which anyone may send.
    if record.msg == "Invalid encoding on %s":
        return False
    if not isinstance(record.msg, str):
        record.msg = _redact(record.msg)
    if isinstance(record.args, tuple):
        record.args = tuple(_redact(argument) for argument in record.args)
    elif record.args:
        record.args = {name: _redact(argument) for name, argument in record.args.items()}
    return True


def redact_exc_info(
    _: Any, __: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A structlog processor that replaces a library's exception with its `exception_chain`."""
    info = line.pop("exc_info", None)
    if isinstance(info, tuple) and info[1] is not None:
        line["errors"] = exception_chain(info[1])
    return line
