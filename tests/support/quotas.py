"""Calls that quotas reject, and the errors that they are rejected with."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio
from grpc import StatusCode

from support.client import Api, Refusal, an_id, refused
from support.database import session_locked
from support.watching import watching

SERVER = "server"


@contextlib.asynccontextmanager
async def another_tenant(api: Api) -> AsyncIterator[Api]:
    """Another tenant's client of the same server."""
    async with Api(api.address, f"another {an_id()}") as other:
        yield other


async def errors_of(*calls: Awaitable[object]) -> list[BaseException]:
    """Make the calls concurrently, and return the errors of those that fail."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    return [result for result in done if isinstance(result, BaseException)]


def live_abort_errors() -> list[grpc.aio.AbortError]:
    """The errors that ended calls and are still in memory."""
    return [each for each in gc.get_objects() if isinstance(each, grpc.aio.AbortError)]


def refusal_of(error: BaseException) -> Refusal:
    assert isinstance(error, grpc.aio.AioRpcError)
    refusal = Refusal()
    refusal.read(error)
    return refusal


def assert_quota_error(refusal: Refusal, quota: str, limit: str, subject: str) -> float:
    """The error has all details. Returns its retry delay in seconds."""
    assert refusal.code is StatusCode.RESOURCE_EXHAUSTED
    assert refusal.info.reason == "QUOTA_EXCEEDED"
    assert dict(refusal.info.metadata) == {"quota": quota, "limit": limit}
    [violation] = refusal.details["QuotaFailure"].violations
    assert violation.subject == subject
    assert violation.description == refusal.text == f"quota {quota} exceeded, limit {limit}"
    delay = refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    assert delay > 0
    return float(delay)


@contextlib.contextmanager
def exceeds_quota(quota: str, limit: float, subject: str | Api) -> Any:
    """Expects this quota to reject the call inside."""
    with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        yield refusal
    of = subject if isinstance(subject, str) else f"tenant:{subject.tenant}"
    assert_quota_error(refusal, quota, f"{limit:g}", of)


@contextlib.asynccontextmanager
async def blocked_calls(
    api: Api, database_url: str, session_id: str, count: int
) -> AsyncIterator[tuple[Refusal, list[asyncio.Task[Any]]]]:
    """`count` calls wait for a lock, one more is rejected with `refusal`. The others succeed."""
    with session_locked(database_url, session_id):
        calls = [asyncio.create_task(api.message(session_id)) for _ in range(count + 1)]
        # Which of them came last is not known.
        [first], waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = first.exception()
        assert error is not None
        yield refusal_of(error), list(waiting)
        assert not any(task.done() for task in waiting), "the calls did not hang to the end"
    await asyncio.gather(*waiting)


@contextlib.asynccontextmanager
async def open_stream(api: Api, session_id: str) -> AsyncIterator[Any]:
    """An admitted WatchChatSession stream."""
    async with watching(api, session_id) as watcher:
        await watcher.next()
        yield watcher


async def eventually(attempt: Callable[[], Awaitable[object]]) -> None:
    """Retry while a quota rejects it: a cancellation reaches the server a little later."""
    async with asyncio.timeout(10):
        while True:
            try:
                await attempt()
            except grpc.aio.AioRpcError as error:
                assert refusal_of(error).info.reason == "QUOTA_EXCEEDED"
                await asyncio.sleep(0.02)
            else:
                return
