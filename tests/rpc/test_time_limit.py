"""What a time limit does to the task that is within it."""

import asyncio

import pytest

from chat_ticket_svc.timeouts import Timeout


async def test_what_takes_longer_ends_with_timeout_error() -> None:
    """And the task goes on as if it had never been cancelled."""
    with pytest.raises(TimeoutError), Timeout(0.01):
        await asyncio.sleep(10)
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()
    await asyncio.sleep(0)


async def test_what_is_done_in_time_is_left_alone() -> None:
    """Also when the time has passed since."""
    with Timeout(0.01):
        pass
    await asyncio.sleep(0.03)


async def test_the_outer_of_two_ends_the_outer_block() -> None:
    """The inner one, which has time left, is not what has ended."""
    ended = []

    async def inner() -> None:
        try:
            with Timeout(10):
                await asyncio.sleep(10)
        except TimeoutError:
            ended.append("inner")

    with pytest.raises(TimeoutError), Timeout(0.01):
        await inner()
    assert not ended


async def test_cancelled_by_somebody_else_stays_cancelled() -> None:
    """A caller that leaves at that very moment is not told of a time limit."""

    async def limited() -> None:
        limit = Timeout(10)
        with limit:
            asyncio.get_running_loop().call_soon(task.cancel)
            asyncio.get_running_loop().call_soon(limit._expire)
            await asyncio.sleep(10)

    task = asyncio.create_task(limited())
    with pytest.raises(asyncio.CancelledError):
        await task
