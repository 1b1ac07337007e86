"""Says on the terminal what a migration waits for, who waits for it, and how far an index is."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from tqdm import tqdm

from chat_ticket_svc.store.migration_progress import Activity, IndexBuild

DEFAULT_COLUMNS, DEFAULT_ROWS = 80, 24


class MigrationReport:
    """Writes to standard error. `close` removes the bar."""

    def __init__(self) -> None:
        self.file = ""  # the migration that was begun last
        self._last: list[str] = []
        self._said: set[str] = set()
        self._bar: tqdm[NoReturn] | None = None
        self._bar_of = ("", "")

    def show(self, activities: list[Activity]) -> None:
        """Say once what has lasted since the last call, and move the bar."""
        now = [line for activity in activities for line in self._lines(activity)]
        for line in now:
            if line in self._last and line not in self._said:
                self._said.add(line)
                self._say(line)
        self._last = now
        self._show_index(next((a.index_build for a in activities if a.index_build), None))

    def say_waits_for_run(self, process: str) -> None:
        """Say that another run goes first."""
        self._say(f"waits for another run, of process {process}")

    def close(self) -> None:
        self._show_index(None)

    def _say(self, line: str) -> None:
        tqdm.write(f"chat-ticket-svc: {line}", file=sys.stderr)

    def _lines(self, activity: Activity) -> Iterator[str]:
        lock = "another run, of" if activity.waits_for_migration else "a lock of"
        for blocker in activity.blockers:
            yield f"waits for {lock} process {blocker}"
        if activity.exclusive:
            yield f"{self.file}: reads and writes of {', '.join(activity.exclusive)} wait for it"
        if activity.shared:
            yield f"{self.file}: writes of {', '.join(activity.shared)} wait for it"

    def _show_index(self, index: IndexBuild | None) -> None:
        if self._bar is not None and (index is None or self._bar_of != index[:2]):
            self._bar.close()
            self._bar = None
        if index is None:
            return
        if self._bar is None:
            self._bar_of = (index.table, index.phase)
            self._bar = tqdm(
                desc=f"index of {index.table}, {index.phase}",
                bar_format="{desc}: {percentage:3.0f}% {bar} {elapsed}",
                disable=None,
                leave=False,
                **_bar_size(),
            )
        self._bar.total = index.total
        self._bar.n = index.done
        self._bar.refresh()


def _bar_size() -> dict[str, Any]:
    """The size for a bar on a terminal that has none. Otherwise tqdm takes the terminal's."""
    with contextlib.suppress(OSError):  # not a terminal: no bar is shown
        if 0 in os.get_terminal_size(sys.stderr.fileno()):
            return {"ncols": DEFAULT_COLUMNS, "nrows": DEFAULT_ROWS}
    return {}
