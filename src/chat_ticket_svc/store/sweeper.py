"""Work on old rows that every process does from time to time."""

import asyncio
import random
from collections.abc import Awaitable, Callable

from chat_ticket_svc.store.connection_errors import cause
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry.repeats import RepeatedWarnings


class Sweeper:
    """Calls `sweep` about every `seconds`, and again at once as long as it returns True.

    `failure` is what the log says when it raises.
    """

    def __init__(self, seconds: float, sweep: Callable[[], Awaitable[bool]], failure: str):
        self._seconds = seconds
        self._sweep = sweep
        self._failure = failure
        self._warnings = RepeatedWarnings()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        await cancel_and_wait(self._task)

    async def _run(self) -> None:
        while True:
            # The jitter keeps processes that started together from sweeping together.
            await asyncio.sleep(self._seconds * random.uniform(0.8, 1.2))  # noqa: S311 - jitter
            try:
                while await self._sweep():
                    pass
            except Exception as error:  # any error: the next sweep may work
                self._warnings.warn(self._failure, cause(error))
