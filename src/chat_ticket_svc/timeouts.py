"""Timeouts that cost less than asyncio's own, for every call and every stream write."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from chat_ticket_svc.tasks import current_task

K = TypeVar("K")

# Most calls have ended by then.
SWEEP_SECONDS = 0.05


class TimeoutQueue(Generic[K]):
    """Calls `on_timeout` for each key `seconds` after its start, unless it was stopped before.

    All keys share one timeout and one timer. `on_timeout` may start its key again.
    """

    def __init__(self, seconds: float, on_timeout: Callable[[K], object]):
        self.seconds = seconds
        self._on_timeout = on_timeout
        # All timeouts are equally long, so the keys expire in the order of their insertion.
        self._deadlines: dict[K, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, key: K) -> bool:
        return key in self._deadlines

    def start(self, key: K) -> None:
        self._deadlines[key] = time.monotonic() + self.seconds
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self.seconds, self._expire)

    def stop(self, key: K) -> None:
        """Does nothing if the key has expired or was never started."""
        self._deadlines.pop(key, None)

    def _expire(self) -> None:
        while self._deadlines:
            key, deadline = next(iter(self._deadlines.items()))
            if (remaining := deadline - time.monotonic()) > 0:
                self._timer = asyncio.get_running_loop().call_later(remaining, self._expire)
                return
            del self._deadlines[key]
            self._on_timeout(key)
        self._timer = None


class TimeoutSweep:
    """Cancels tasks that take longer than their timeout, each its own.

    Most tasks end soon. They get no timer: one sweep at a time sets timers for those that have not
    ended SWEEP_SECONDS after it was scheduled. Each task has one timeout at a time.
    """

    def __init__(self) -> None:
        self._deadlines: dict[asyncio.Task[Any], float] = {}  # of those that have no timer yet
        self._timers: dict[asyncio.Task[Any], asyncio.TimerHandle] = {}
        self._expired: set[asyncio.Task[Any]] = set()
        self._is_scheduled = False

    def start(self, task: asyncio.Task[Any], seconds: float) -> None:
        loop = task.get_loop()
        if seconds < SWEEP_SECONDS:
            self._timers[task] = loop.call_later(seconds, self._expire, task)
            return
        self._deadlines[task] = loop.time() + seconds
        if not self._is_scheduled:
            self._is_scheduled = True
            loop.call_later(SWEEP_SECONDS, self._sweep)

    def stop(self, task: asyncio.Task[Any]) -> bool:
        """End the task's timeout. Returns whether its CancelledError, if it has one, is due to it.

        If something else cancelled the task as well, it is not.
        """
        if self._deadlines.pop(task, None) is not None:
            return False
        if (timer := self._timers.pop(task, None)) is not None:
            timer.cancel()
            return False
        if task in self._expired:
            self._expired.remove(task)
            return not task.uncancel()
        return False

    def _sweep(self) -> None:
        self._is_scheduled = False
        for task, deadline in self._deadlines.items():
            self._timers[task] = task.get_loop().call_at(deadline, self._expire, task)
        self._deadlines.clear()

    def _expire(self, task: asyncio.Task[Any]) -> None:
        del self._timers[task]
        self._expired.add(task)
        task.cancel()


class Timeout:
    """A block that raises TimeoutError after some seconds. Enter each instance only once."""

    __slots__ = ("_expired", "_seconds", "_task", "_timer")

    _task: asyncio.Task[object]
    _timer: asyncio.TimerHandle

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._task = current_task()
        self._timer = loop.call_later(self._seconds, self._expire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        self._timer.cancel()
        # If something else cancelled the task as well, the task stays cancelled.
        if self._expired and not self._task.uncancel() and kind is asyncio.CancelledError:
            raise TimeoutError from error  # type: ignore[misc]

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()
