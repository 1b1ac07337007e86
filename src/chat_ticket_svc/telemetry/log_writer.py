"""Log output: a thread that writes to standard error, and lines that are rendered in batches."""

import asyncio
import contextlib
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


_deferred: list[tuple[Callable[..., None], str, float, dict[str, Any]]] = []


def log_deferred(method: Callable[..., None], event: str, fields: dict[str, Any]) -> None:
    """Call `method(event, **fields)` within FLUSH_INTERVAL_SECONDS, with the present timestamp.

    `method` is a structlog method such as `log.info`. This is for frequent lines: rendering and
    writing them in batches takes a third of the CPU time, because each write releases the
    interpreter lock, which gRPC's threads wait for. A killed process loses its last lines. Must
    be called within an event loop.
    """
    if not _deferred:
        asyncio.get_running_loop().call_later(FLUSH_INTERVAL_SECONDS, _flush_deferred)
    _deferred.append((method, event, time.time(), fields))


def flush_at_exit() -> None:
    if _deferred:
        _flush_deferred()
    writer.drain()


def _flush_deferred() -> None:
    deferred = _deferred.copy()
    _deferred.clear()
    LineLogger.batch = []
    try:
        for method, event, seconds, fields in deferred:
            method(event, timestamp=_isoformat(seconds), **fields)
        writer.write("".join(LineLogger.batch))
    finally:
        LineLogger.batch = None


def _isoformat(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
