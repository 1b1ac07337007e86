"""Log configuration: one format for the service's own lines and for those of libraries.

Lines hold ids, sizes, codes, durations and source locations. They never hold content, SQL
parameters, URLs or credentials. See redaction.py.
"""

import atexit
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import structlog

from chat_ticket_svc.config import Settings
from chat_ticket_svc.telemetry import log_writer
from chat_ticket_svc.telemetry.redaction import exception_chain, redact_arguments, redact_exc_info
from chat_ticket_svc.telemetry.repeats import RepeatCounter

log = structlog.get_logger()

REPETITIVE_LOGGERS = {"psycopg.pool"}


def configure(settings: Settings) -> None:
    use_console = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    renderer = (
        structlog.dev.ConsoleRenderer() if use_console else structlog.processors.JSONRenderer()
    )
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.MaybeTimeStamper(fmt="iso"),
    ]
    process_fields = {"pid": os.getpid()} if settings.workers > 1 else {}
    if process_fields:
        common.append(_add_fields(process_fields))
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=log_writer.LineLogger,
        cache_logger_on_first_use=True,
    )
    log_writer.access_log.configure(
        min_level=level, json_lines=not use_console, common_fields=process_fields
    )
    log_writer.writer.start()
    atexit.register(log_writer.flush_at_exit)
    handler = logging.StreamHandler(log_writer.writer)
    handler.addFilter(redact_arguments)
    handler.addFilter(_hold_back_repeats())
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name, redact_exc_info],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    # The DEBUG and INFO lines of libraries quote the data that they handle.
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING))


def _hold_back_repeats() -> Callable[[logging.LogRecord], bool]:
    """A logging filter for libraries that warn of each attempt while something is away."""
    counter = RepeatCounter()

    def is_logged(record: logging.LogRecord) -> bool:
        if record.name not in REPETITIVE_LOGGERS:
            return True
        repeats = counter.count((record.name, record.msg))
        if repeats:
            record.msg = f"{record.msg} ({repeats} times more since it was last logged)"
        return repeats is not None

    return is_logged


def install_excepthooks() -> None:
    """Log uncaught exceptions without their texts, which Python's own hooks would print."""
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=sys.stderr))
    sys.excepthook = lambda _, error, __: _log_exception("unexpected error", error)
    sys.unraisablehook = lambda hook: _log_exception("unexpected error", hook.exc_value)
    threading.excepthook = lambda hook: _log_exception("unexpected error", hook.exc_value)


def handle_loop_exception(_: object, context: dict[str, Any]) -> None:
    """The event loop's exception handler. The default one would print the exception's text."""
    # The message may go on with the arguments of a callback. The words before them are safe.
    about = re.match(r"[\w .-]*", context["message"])
    error = context.get("exception")
    _log_exception("error in the background", error, about=about and about[0])


def _log_exception(event: str, error: BaseException | None, **fields: Any) -> None:
    log.error(event, errors=[] if error is None else exception_chain(error), **fields)


def _add_fields(fields: dict[str, Any]) -> structlog.typing.Processor:
    return lambda _, __, line: {**line, **fields}
