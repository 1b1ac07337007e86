"""A time limit around what a task does: asyncio.timeout, at a quarter of its cost.

It is entered by every call and every write of a stream.
"""

import asyncio
from typing import Self


class TimeLimit:
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
