"""Many timers of the same length for the price of one.

The event loop's own cost more than all else that is done for a watcher who is told something.
"""

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")


class Timers(Generic[K]):
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
