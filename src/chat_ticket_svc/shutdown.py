"""What makes a process shut down in order: SIGTERM, SIGINT and, on a terminal, SIGHUP."""

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from chat_ticket_svc.telemetry import logs


class ShutdownSignals:
    """Makes the first SIGTERM or SIGINT shut the process down, and ignores later ones.

    The event loop's own signal handlers begin and end with the loop. A signal that comes before or
    after must also stop the embedded PostgreSQL, so these handlers belong to the process.

    With `with_terminal`, SIGHUP does the same, unless nohup ignores it. Otherwise SIGHUP is
    ignored: operators send it to have files read again, and the server does that by itself.
    """

    def __init__(self, *, with_terminal: bool) -> None:
        self.request: Callable[[], object] = sys.exit
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
        self.request()


def run_until_shutdown(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, int]],
    shutdown: ShutdownSignals,
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run `work` in an event loop and return its exit status. A signal sets the event of `work`."""

    async def until_signalled() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        shutdown.request = lambda: loop.call_soon_threadsafe(stop.set)
        # The SystemExit of an earlier signal is lost when it is raised in an import's cleanup,
        # where Python ignores exceptions.
        if shutdown.is_requested:
            stop.set()
        loop.set_exception_handler(logs.handle_loop_exception)
        return await work(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(until_signalled())
