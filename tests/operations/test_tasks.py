"""Ending asyncio's tasks."""

import asyncio

from chat_ticket_svc.tasks import cancel_and_wait


async def test_task_that_loses_its_cancellation_ends() -> None:
    """As psycopg's pool does when a connection comes at the moment of the cancellation."""
    arrived = asyncio.get_running_loop().create_future()

    async def wait() -> None:
        await asyncio.wait_for(arrived, 60)
        await asyncio.sleep(60)

    task = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    arrived.set_result(None)
    await asyncio.sleep(0)  # the result is on its way to the task
    async with asyncio.timeout(5):
        await cancel_and_wait(task, None)
    assert task.cancelled()


async def test_error_of_a_task_is_not_raised() -> None:
    async def fail() -> None:
        raise RuntimeError

    task = asyncio.create_task(fail())
    await cancel_and_wait(task)
    assert task.done()
