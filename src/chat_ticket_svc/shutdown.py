"""Orderly shutdown of a process on SIGTERM, SIGINT and, on a terminal, SIGHUP."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from chat_ticket_svc.telemetry import logs


class ShutdownSignals:
    """Shuts the process down on the first SIGTERM or SIGINT, and ignores later ones.

    The event loop's own signal handlers exist only while the loop runs. A signal before or after
    that must stop the embedded PostgreSQL too, so these handlers belong to the process.

    With `with_terminal`, SIGHUP does the same, unless nohup ignores it. Otherwise SIGHUP is
    ignored: operators send it to reload files, and the server reloads them by itself.
    """

    def __init__(self, *, with_terminal: bool) -> None:
        self.request_shutdown: Callable[[], object] = sys.exit
        self.is_requested = False
        self._signals = [signal.SIGTERM, signal.SIGINT]
        if with_terminal and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            self._signals.append(signal.SIGHUP)
        else:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in self._signals:
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        self.is_requested = True
        self.request_shutdown()


def run_until_shutdown(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, int]],
    shutdown: ShutdownSignals,
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run `work` in an event loop and return its exit status. A signal sets its event."""

    async def until_signalled() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        shutdown.request_shutdown = lambda: loop.call_soon_threadsafe(stop.set)
        # A signal during an import may have raised SystemExit in a cleanup, where Python ignores
        # exceptions.
        if shutdown.is_requested:
            stop.set()
        loop.set_exception_handler(logs.handle_loop_exception)
        return await work(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(until_signalled())
