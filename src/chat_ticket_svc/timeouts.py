"""Timeouts that cost less than asyncio's own, for every call and every stream write."""

import asyncio
from collections.abc import Callable
from typing import Generic, Self, TypeVar

K = TypeVar("K")


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
        loop = asyncio.get_running_loop()
        self._deadlines[key] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._expire)

    def stop(self, key: K) -> None:
        """Does nothing if the key has expired or was never started."""
        self._deadlines.pop(key, None)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        while self._deadlines:
            key, deadline = next(iter(self._deadlines.items()))
            if deadline > loop.time():
                self._timer = loop.call_at(deadline, self._expire)
                return
            del self._deadlines[key]
            self._on_timeout(key)
        self._timer = None


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
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - for the type checker: a timeout cancels a task
        self._task = task
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
