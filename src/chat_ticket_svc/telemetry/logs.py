"""What the process logs, in one form for our lines and those of the libraries.

Lines hold ids, sizes, codes, durations and places in the code, and never content, SQL parameters,
URLs or credentials. An exception's text may quote any of those, so it is left out: `story` tells
the kind of each exception and where it was raised.
"""

import asyncio
import atexit
import contextlib
import logging
import os
import re
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

import structlog

from chat_ticket_svc.config import Settings

log = structlog.get_logger()

# How long a line may wait for others.
FLUSH_INTERVAL_SECONDS = 0.02

# What may wait to be written, in characters, and for how long at the end.
MAX_BUFFERED_CHARACTERS = 4_000_000
FINISH_SECONDS = 1.0
STANDARD_ERROR = 2

# A name in a schema; a trigger may raise an error with any text in the place of one.
NAME = re.compile(r"[a-z_][a-z0-9_]*")


def exception_chain(error: BaseException) -> list[dict[str, Any]]:
    """What happened, in the order it happened: the first is the root."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.insert(0, each)
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
    return [_told(each) for each in chain]


def _told(error: BaseException) -> dict[str, Any]:
    told: dict[str, Any] = {"error": type(error).__qualname__}
    diagnosis = getattr(error, "diag", None)  # of psycopg, which has no room here
    for name in ("sqlstate", "table_name", "constraint_name"):
        value = getattr(diagnosis, name, None)
        if value and (name == "sqlstate" or NAME.fullmatch(value)):
            told[name] = value
    told["frames"] = [
        f"{frame.filename}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return told


def handle_loop_exception(_: object, context: dict[str, Any]) -> None:
    """The event loop's exception handler; its own would print the exception's text."""
    # Behind the name of a callback are its arguments.
    about = re.match(r"[\w .-]*", context["message"])
    _failed("error in the background", context.get("exception"), about=about and about[0])


def _failed(event: str, error: BaseException | None, **details: Any) -> None:
    log.error(event, errors=[] if error is None else exception_chain(error), **details)


def install_excepthooks() -> None:
    """Tell what nobody catches like all else; Python itself would print the exception's text."""
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=sys.stderr))
    sys.excepthook = lambda _, error, __: _failed("unexpected error", error)
    sys.unraisablehook = lambda raised: _failed("unexpected error", raised.exc_value)
    threading.excepthook = lambda raised: _failed("unexpected error", raised.exc_value)


def configure(settings: Settings) -> None:
    for_people = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    renderer = (
        structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.MaybeTimeStamper(fmt="iso"),
    ]
    if settings.workers > 1:
        common.append(_add_pid)
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=_LineLogger,
        cache_logger_on_first_use=True,
    )
    _output.start()
    atexit.register(_finish)
    handler = logging.StreamHandler(_output)
    handler.addFilter(_redact_arguments)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name, _redact_exc_info],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    # The libraries' own DEBUG and INFO quote what they handle.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))


class _StderrWriter:
    """Writes to the standard error, from a thread of its own, once it was started.

    Nobody has to wait for who reads it, and may have stopped to, or gone: then lines are left out,
    and their number is told when there is room again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._texts: list[str] = []
        self._waiting = 0  # characters, of what is being written too
        self._lost = 0  # lines

    def start(self) -> None:
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str) -> None:
        with self._changed:
            if self._waiting > MAX_BUFFERED_CHARACTERS:
                self._lost += text.count("\n")
                return
            self._texts.append(text)
            self._waiting += len(text)
            self._changed.notify_all()

    def flush(self) -> None:
        """Does nothing: what libraries write goes the same way. See `finish`."""

    def finish(self) -> None:
        """Wait until all is written, for FINISH_SECONDS at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, FINISH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._texts)
                text = "".join(self._texts)
                self._texts.clear()
                lost, self._lost = self._lost, 0
            # Not by sys.stderr, for whose lock the interpreter would wait at its end.
            data = text.encode(errors="replace")
            with contextlib.suppress(OSError):  # nobody reads it any more
                while data:
                    try:
                        data = data[os.write(STANDARD_ERROR, data) :]
                    except BlockingIOError:  # as whoever shares the terminal or pipe may want it
                        select.select([], [STANDARD_ERROR], [])
            with self._changed:
                self._waiting -= len(text)
                self._changed.notify_all()
            if lost:
                log.warning("nobody read the log: lines were left out", lines=lost)


_output = _StderrWriter()


class _LineLogger:
    """Where structlog sends lines: those of `_flush_deferred` go on together."""

    gathered: ClassVar[list[str] | None] = None

    def __init__(self, *_: object):
        pass

    def msg(self, line: str) -> None:
        if self.gathered is None:
            _output.write(f"{line}\n")
        else:
            self.gathered.append(f"{line}\n")

    debug = info = warning = error = critical = msg


_deferred: list[tuple[Callable[..., None], str, float, dict[str, Any]]] = []


def log_deferred(tell: Callable[..., None], event: str, details: dict[str, Any]) -> None:
    """Have `tell(event, **details)` make a line some milliseconds later, with the time of now.

    For lines of which there are many: made and written together they cost a third of the CPU, as
    to write is to let go of the interpreter, which gRPC's threads wait for. A process that is
    killed loses those of its last moment. To be called within an event loop.
    """
    if not _deferred:
        asyncio.get_running_loop().call_later(FLUSH_INTERVAL_SECONDS, _flush_deferred)
    _deferred.append((tell, event, time.time(), details))


def _finish() -> None:
    if _deferred:
        _flush_deferred()
    _output.finish()


def _flush_deferred() -> None:
    kept = _deferred.copy()
    _deferred.clear()
    _LineLogger.gathered = []
    try:
        for tell, event, seconds, details in kept:
            tell(event, timestamp=_iso(seconds), **details)
        _output.write("".join(_LineLogger.gathered))
    finally:
        _LineLogger.gathered = None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _add_pid(_: Any, __: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**line, "pid": os.getpid()}


class _Redacted(str):
    """Stands for an argument of a library's line, however the line spells it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _redacted(argument: object) -> object:
    if isinstance(argument, (int, float)):
        return argument
    if isinstance(argument, BaseException):
        return _Redacted(type(argument).__qualname__)
    return _Redacted("...")


def _redact_arguments(record: logging.LogRecord) -> bool:
    """A library's line without its arguments: texts of exceptions, tasks with their results."""
    if record.msg == "Invalid encoding on %s":  # gRPC's: hundreds for one request of anybody's
        return False
    if not isinstance(record.msg, str):
        record.msg = _redacted(record.msg)
    if isinstance(record.args, tuple):
        record.args = tuple(_redacted(each) for each in record.args)
    elif record.args:
        record.args = {key: _redacted(each) for key, each in record.args.items()}
    return True


def _redact_exc_info(
    _: Any, __: str, line: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """A library's line about an exception, without the exception's text."""
    info = line.pop("exc_info", None)
    if isinstance(info, tuple) and info[1] is not None:
        line["errors"] = exception_chain(info[1])
    return line
