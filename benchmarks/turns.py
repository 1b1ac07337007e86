"""Runs several functions in turns, of which one works at any time."""

import contextlib
import contextvars
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Generic, TypeVar

T = TypeVar("T")

# A function that works until it calls its argument, which returns when it has the turn again.
Work = Callable[[Callable[[], None]], T]


def run_in_turns(works: Sequence[Work[T]]) -> list[T]:
    """Let each work until it pauses, in a new order each time, until all have returned.

    When one raises an error, the others are told by a CancelledError where they have paused, and
    the error is raised after they have ended.
    """
    generator = random.Random(1)  # noqa: S311 - the same orders in every run
    workers = [_Worker(work) for work in works]
    with contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.cancel)
        while waiting := [worker for worker in workers if not worker.result.done()]:
            for worker in generator.sample(waiting, len(waiting)):
                worker.give_turn()
                if worker.result.done():
                    worker.result.result()
    return [worker.result.result() for worker in workers]


class _Worker(Generic[T]):
    """A thread that works only while it has the turn."""

    def __init__(self, work: Work[T]):
        self.result: Future[T] = Future()
        self._work = work
        self._has_turn = threading.Semaphore(0)
        self._has_paused = threading.Semaphore(0)
        self._is_cancelled = False
        # With the caller's context, as if it were called.
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=[self._run])
        self._thread.start()

    def give_turn(self) -> None:
        """Return when it has paused or ended."""
        self._has_turn.release()
        self._has_paused.acquire()

    def cancel(self) -> None:
        """End it at its pause, and return when it has ended."""
        self._is_cancelled = True
        self._has_turn.release()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._wait_for_turn()
            self.result.set_result(self._work(self._pause))
        except BaseException as error:
            self.result.set_exception(error)
        self._has_paused.release()

    def _pause(self) -> None:
        self._has_paused.release()
        self._wait_for_turn()

    def _wait_for_turn(self) -> None:
        self._has_turn.acquire()
        if self._is_cancelled:
            raise CancelledError
