"""Sampling of log lines that a caller or an outage could repeat without end."""

import time
from collections import Counter


class LogSampler:
    """Lets through one line of each kind in `seconds`, and counts the others.

    The number of kinds must be bounded.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._next_at: dict[str, float] = {}
        self._omitted: Counter[str] = Counter()

    def sample(self, kind: str) -> int | None:
        """None if a line of this kind is not to be written now.

        Otherwise the number of lines that were not written since the last one.
        """
        now = time.monotonic()
        if now < self._next_at.get(kind, 0):
            self._omitted[kind] += 1
            return None
        self._next_at[kind] = now + self._seconds
        return self._omitted.pop(kind, 0)
