"""Log output: a thread that writes to standard error, and lines that are rendered in batches."""

import asyncio
import contextlib
import functools
import json
import logging
import os
import select
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, ClassVar

import structlog

log = structlog.get_logger()

FLUSH_INTERVAL_SECONDS = 0.02

MAX_BUFFERED_CHARACTERS = 4_000_000
# How long the exit of the process waits for buffered lines to be written.
EXIT_FLUSH_SECONDS = 1.0
STANDARD_ERROR = 2


class StderrWriter:
    """Buffers text and writes it to standard error on a thread of its own, once started.

    Logging never blocks, even if the reader of standard error has stopped reading or has gone.
    Lines beyond MAX_BUFFERED_CHARACTERS are dropped. Their number is logged when the buffer has
    room again.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._buffer: list[str] = []
        self._pending_characters = 0  # includes those of the current write
        self._dropped_lines = 0

    def start(self) -> None:
        threading.Thread(target=self._run, name="log", daemon=True).start()

    def write(self, text: str) -> None:
        with self._changed:
            if self._pending_characters > MAX_BUFFERED_CHARACTERS:
                self._dropped_lines += text.count("\n")
                return
            self._buffer.append(text)
            self._pending_characters += len(text)
            self._changed.notify_all()

    def flush(self) -> None:
        """Does nothing, because logging.StreamHandler calls it after each line. See `drain`."""

    def drain(self) -> None:
        """Wait until everything is written, for at most EXIT_FLUSH_SECONDS."""
        with self._changed:
            self._changed.wait_for(lambda: not self._pending_characters, EXIT_FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._buffer)
                text = "".join(self._buffer)
                self._buffer.clear()
                dropped_lines, self._dropped_lines = self._dropped_lines, 0
            # Not through sys.stderr: the interpreter would wait for its lock at exit.
            data = text.encode(errors="replace")
            with contextlib.suppress(OSError):  # the reader has gone
                while data:
                    try:
                        data = data[os.write(STANDARD_ERROR, data) :]
                    except BlockingIOError:
                        # A process that shares the terminal or pipe has made it non-blocking.
                        select.select([], [STANDARD_ERROR], [])
            with self._changed:
                self._pending_characters -= len(text)
                self._changed.notify_all()
            if dropped_lines:
                log.warning("log lines dropped, standard error was not read", lines=dropped_lines)


writer = StderrWriter()


class LineLogger:
    """The logger that structlog passes rendered lines to."""

    # Collects the lines of a batch of deferred lines, which are written together.
    batch: ClassVar[list[str] | None] = None

    def __init__(self, *_: object):
        pass

    def msg(self, line: str) -> None:
        if self.batch is None:
            writer.write(f"{line}\n")
        else:
            self.batch.append(f"{line}\n")

    debug = info = warning = error = critical = msg


class AccessLogger:
    """Logs the lines about calls, which are by far the most frequent ones.

    It makes a line and writes it within FLUSH_INTERVAL_SECONDS, together with others. That takes a
    third of the CPU time, because each write releases the interpreter lock, which gRPC's threads
    wait for. A killed process loses its last lines.

    In JSON it makes the lines itself, the same as structlog's with its processors, which take four
    times as long.
    """

    def __init__(self) -> None:
        self._lines: list[tuple[str, str, float, dict[str, Any]]] = []
        self._min_level = 0
        self._encode: Callable[[dict[str, Any]], str] | None = None
        self._common_fields: dict[str, Any] = {}

    def configure(self, *, min_level: int, json_lines: bool, common_fields: dict[str, Any]) -> None:
        """`common_fields` end each line."""
        self._min_level = min_level
        self._encode = json.JSONEncoder().encode if json_lines else None
        self._common_fields = common_fields

    def is_enabled_for(self, level: str) -> bool:
        return logging.getLevelNamesMapping()[level.upper()] >= self._min_level

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Log a line with the present timestamp. Must be called within an event loop.

        `level` must be enabled.
        """
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_INTERVAL_SECONDS, self.flush)
        self._lines.append((level, event, time.time(), fields))

    def flush(self) -> None:
        lines = self._lines.copy()
        self._lines.clear()
        encode = self._encode
        if encode is not None:
            writer.write(
                "".join(
                    [
                        encode(
                            {
                                "timestamp": _isoformat(seconds),
                                **fields,
                                "event": event,
                                "level": level,
                                **self._common_fields,
                            }
                        )
                        + "\n"
                        for level, event, seconds, fields in lines
                    ]
                )
            )
            return
        LineLogger.batch = []
        try:
            for level, event, seconds, fields in lines:
                getattr(log, level)(event, timestamp=_isoformat(seconds), **fields)
            writer.write("".join(LineLogger.batch))
        finally:
            LineLogger.batch = None


access_log = AccessLogger()


def flush_at_exit() -> None:
    access_log.flush()
    writer.drain()


def _isoformat(seconds: float) -> str:
    """As datetime's, without an object for each line."""
    whole = int(seconds)
    microseconds = round((seconds - whole) * 1_000_000)
    if microseconds == 1_000_000:
        whole, microseconds = whole + 1, 0
    return f"{_second(whole)}.{microseconds:06}Z" if microseconds else f"{_second(whole)}Z"


@functools.lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
