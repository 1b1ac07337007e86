"""Timeouts of one task, and a queue of many timeouts of the same length."""

import asyncio
import time

import pytest

from chat_ticket_svc import timeouts
from chat_ticket_svc.tasks import current_task
from chat_ticket_svc.timeouts import Timeout, TimeoutQueue, TimeoutSweep

SECONDS = 0.2


class TestTimeout:
    async def test_slow_block_ends_with_timeout_error(self) -> None:
        """Afterwards the task runs on as if it had never been cancelled."""
        with pytest.raises(TimeoutError), Timeout(0.01):
            await asyncio.sleep(10)
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        await asyncio.sleep(0)

    async def test_block_that_ends_in_time_is_not_disturbed(self) -> None:
        """Not even when the timeout would have expired since."""
        with Timeout(0.01):
            pass
        await asyncio.sleep(0.03)

    async def test_outer_timeout_ends_the_outer_block(self) -> None:
        """The inner timeout, which has time left, does not raise."""
        expired = []

        async def inner() -> None:
            try:
                with Timeout(10):
                    await asyncio.sleep(10)
            except TimeoutError:
                expired.append("inner")

        with pytest.raises(TimeoutError), Timeout(0.01):
            await inner()
        assert not expired

    async def test_task_cancelled_at_the_same_moment_stays_cancelled(self) -> None:
        """A caller that leaves as the timeout expires causes a cancellation, not a timeout."""

        async def limited() -> None:
            timeout = Timeout(10)
            with timeout:
                asyncio.get_running_loop().call_soon(task.cancel)
                asyncio.get_running_loop().call_soon(timeout._expire)
                await asyncio.sleep(10)

        task = asyncio.create_task(limited())
        with pytest.raises(asyncio.CancelledError):
            await task


class Expirations:
    """Which keys have expired, and how long after the start of the test."""

    def __init__(self) -> None:
        self.start = asyncio.get_running_loop().time()
        self.after: dict[str, float] = {}

    def __call__(self, key: str) -> None:
        assert key not in self.after
        self.after[key] = asyncio.get_running_loop().time() - self.start


class TestTimeoutQueue:
    @pytest.fixture
    async def expirations(self) -> Expirations:
        return Expirations()

    async def test_each_key_expires_at_its_time(self, expirations: Expirations) -> None:
        """Keys expire in the order of their starts, and none expires early."""
        timeouts = TimeoutQueue[str](SECONDS, expirations)
        for key in ("a", "b", "c"):
            timeouts.start(key)
            await asyncio.sleep(SECONDS / 4)
        await asyncio.sleep(SECONDS * 1.5)
        assert list(expirations.after) == ["a", "b", "c"]
        for number, after in enumerate(expirations.after.values()):
            assert 0 <= after - SECONDS - number * SECONDS / 4 < SECONDS
        assert "a" not in timeouts

    async def test_stopped_key_does_not_expire(self, expirations: Expirations) -> None:
        """A key that was started later, or started again, still expires at its time."""
        timeouts = TimeoutQueue[str](SECONDS, expirations)
        timeouts.start("a")
        timeouts.start("b")
        await asyncio.sleep(SECONDS / 2)
        timeouts.stop("a")
        timeouts.stop("b")
        timeouts.start("b")
        assert "a" not in timeouts
        assert "b" in timeouts
        await asyncio.sleep(SECONDS * 1.5)
        assert list(expirations.after) == ["b"]
        assert expirations.after["b"] > SECONDS * 1.4

    async def test_queue_runs_again_after_all_keys_have_expired(
        self, expirations: Expirations
    ) -> None:
        """Stopping an expired key does nothing."""
        timeouts = TimeoutQueue[str](SECONDS, expirations)
        timeouts.start("a")
        await asyncio.sleep(SECONDS * 1.5)
        timeouts.stop("a")
        await asyncio.sleep(SECONDS * 2)
        timeouts.start("b")
        await asyncio.sleep(SECONDS * 1.5)
        assert list(expirations.after) == ["a", "b"]


class TestTimeoutSweep:
    """The timeouts of calls, most of which end before any timer is set."""

    @pytest.mark.parametrize("seconds", [0.01, 2 * timeouts.SWEEP_SECONDS])
    async def test_slow_task_is_cancelled_at_its_time(self, seconds: float) -> None:
        """Afterwards it runs on as if it had never been cancelled."""
        sweep = TimeoutSweep()
        task = current_task()
        started_at = time.monotonic()
        sweep.start(task, seconds)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(10)
        assert sweep.stop(task)
        assert time.monotonic() - started_at >= seconds
        assert not task.cancelling()
        await asyncio.sleep(0)

    @pytest.mark.parametrize("seconds", [0.01, 2 * timeouts.SWEEP_SECONDS])
    async def test_stopped_timeout_does_nothing(self, seconds: float) -> None:
        sweep = TimeoutSweep()
        sweep.start(current_task(), seconds)
        assert not sweep.stop(current_task())
        assert not sweep.stop(current_task()), "it may be stopped twice"
        await asyncio.sleep(1.5 * seconds)

    async def test_task_cancelled_at_the_same_moment_stays_cancelled(self) -> None:
        sweep = TimeoutSweep()
        is_timeout = []

        async def limited() -> None:
            sweep.start(current_task(), 0.01)
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                is_timeout.append(sweep.stop(current_task()))
                raise

        task = asyncio.create_task(limited())
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(task.cancel)
        asyncio.get_running_loop().call_soon(sweep._expire, task)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert is_timeout == [False]
