"""Many timers of the same length."""

import asyncio

import pytest

from chat_ticket_svc.timeouts import TimeoutQueue

SECONDS = 0.2


class Ended:
    """What has ended, and how long after the start of the test."""

    def __init__(self) -> None:
        self.start = asyncio.get_running_loop().time()
        self.after: dict[str, float] = {}

    def __call__(self, key: str) -> None:
        assert key not in self.after
        self.after[key] = asyncio.get_running_loop().time() - self.start


@pytest.fixture
async def ended() -> Ended:
    return Ended()


async def test_each_ends_at_its_time(ended: Ended) -> None:
    """In the order of their starts, none early."""
    timers = TimeoutQueue[str](SECONDS, ended)
    for key in ("a", "b", "c"):
        timers.start(key)
        await asyncio.sleep(SECONDS / 4)
    await asyncio.sleep(SECONDS * 1.5)
    assert list(ended.after) == ["a", "b", "c"]
    for number, after in enumerate(ended.after.values()):
        assert 0 <= after - SECONDS - number * SECONDS / 4 < SECONDS
    assert "a" not in timers


async def test_stopped_does_not_end(ended: Ended) -> None:
    """Nor does it keep one that was started later, or again, from ending at its time."""
    timers = TimeoutQueue[str](SECONDS, ended)
    timers.start("a")
    timers.start("b")
    await asyncio.sleep(SECONDS / 2)
    timers.stop("a")
    timers.stop("b")
    timers.start("b")
    assert "a" not in timers
    assert "b" in timers
    await asyncio.sleep(SECONDS * 1.5)
    assert list(ended.after) == ["b"]
    assert ended.after["b"] > SECONDS * 1.4


async def test_starts_again_after_all_have_ended(ended: Ended) -> None:
    """Stopping what has ended does nothing."""
    timers = TimeoutQueue[str](SECONDS, ended)
    timers.start("a")
    await asyncio.sleep(SECONDS * 1.5)
    timers.stop("a")
    await asyncio.sleep(SECONDS * 2)
    timers.start("b")
    await asyncio.sleep(SECONDS * 1.5)
    assert list(ended.after) == ["a", "b"]
