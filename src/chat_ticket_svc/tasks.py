"""The current task of asyncio, and ending tasks."""

import asyncio
from typing import Any

# A task that has not ended by then is cancelled again.
CANCEL_SECONDS = 1.0


def current_task() -> asyncio.Task[Any]:
    """The current task, where there always is one: in a coroutine."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101 - for the type checker
    return task


async def cancel_and_wait(*tasks: asyncio.Task[Any] | None) -> None:
    """Cancel tasks, and return when they have ended, whatever their results.

    One `cancel` is not enough: `asyncio.wait_for` of Python 3.11, by which psycopg's pool waits,
    loses a cancellation that comes just when it has its result (python/cpython#86296).
    """
    known = [task for task in tasks if task is not None]
    while running := [task for task in known if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_SECONDS)
    for task in known:
        # Without this, asyncio would log that nobody has heard of its error.
        task.cancelled() or task.exception()
