"""Counts repeated log lines, so that a failure that lasts is not logged every second."""

import time
from collections.abc import Callable, Hashable

import structlog

log = structlog.get_logger()

INTERVAL_SECONDS = 60


class RepeatCounter:
    """Lets the first of equal log lines pass, then one in INTERVAL_SECONDS with a count.

    It keeps an entry for each different line, so lines must not contain ids or texts of callers.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._logged_at: dict[Hashable, float] = {}
        self._held_back: dict[Hashable, int] = {}

    def count(self, line: Hashable) -> int | None:
        """How many equal lines were held back since the last one; None to hold this one back."""
        now = self._clock()
        if line in self._logged_at and now < self._logged_at[line] + INTERVAL_SECONDS:
            self._held_back[line] = self._held_back.get(line, 0) + 1
            return None
        self._logged_at[line] = now
        return self._held_back.pop(line, 0)


class RepeatedWarnings:
    """Logs warnings. While one repeats, logs it once a minute, with the number of repeats."""

    def __init__(self) -> None:
        self._repeats = RepeatCounter()

    def warn(self, event: str, problem: str) -> None:
        repeats = self._repeats.count((event, problem))
        if repeats is not None:
            log.warning(event, problem=problem, **({"repeats": repeats} if repeats else {}))
