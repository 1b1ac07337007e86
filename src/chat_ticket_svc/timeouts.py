"""Timeouts that cost less than asyncio's own, for what every call and every stream write needs."""

import asyncio
from collections.abc import Callable
from typing import Generic, Self, TypeVar

K = TypeVar("K")


class TimeoutQueue(Generic[K]):
    """Calls `end` with each key that was started `seconds` ago and not stopped since.

    `end` may start it again.
    """

    def __init__(self, seconds: float, end: Callable[[K], object]):
        self.seconds = seconds
        self._end = end
        # In the order in which they were started, which is the one in which they end.
        self._ends: dict[K, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __contains__(self, key: K) -> bool:
        return key in self._ends

    def start(self, key: K) -> None:
        loop = asyncio.get_running_loop()
        self._ends[key] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_later(self.seconds, self._wake)

    def stop(self, key: K) -> None:
        """Does nothing when it has ended."""
        self._ends.pop(key, None)

    def _wake(self) -> None:
        loop = asyncio.get_running_loop()
        while self._ends:
            key, at = next(iter(self._ends.items()))
            if at > loop.time():
                self._timer = loop.call_at(at, self._wake)
                return
            del self._ends[key]
            self._end(key)
        self._timer = None


class Timeout:
    """Raises TimeoutError out of its block after some seconds. Not to be entered twice."""

    __slots__ = ("_expired", "_seconds", "_task", "_timer")

    _task: asyncio.Task[object]
    _timer: asyncio.TimerHandle

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._expired = False

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None  # noqa: S101 - for the type checker: limits are for tasks
        self._task = task
        self._timer = loop.call_later(self._seconds, self._expire)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, _: object) -> None:
        self._timer.cancel()
        # Cancelled by somebody else as well, it stays cancelled.
        if self._expired and not self._task.uncancel() and kind is asyncio.CancelledError:
            raise TimeoutError from error  # type: ignore[misc]

    def _expire(self) -> None:
        self._expired = True
        self._task.cancel()
