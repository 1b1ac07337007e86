"""Calls beyond a quota wait for a moment, in order, before they are rejected."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc.aio
import pytest
from support.client import Api
from support.database import session_locked
from support.messages import sequences
from support.quotas import (
    another_tenant,
    assert_quota_error,
    errors_of,
    eventually,
    exceeds_quota,
    refusal_of,
)
from support.sessions import list_sessions

from chat_ticket.v1 import chat_message_pb2_grpc, resources_pb2
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest, WatchChatSessionRequest
from chat_ticket_svc.access import quotas as quotas_module
from chat_ticket_svc.access.quotas import QuotaEnforcer
from chat_ticket_svc.limits import Quotas
from chat_ticket_svc.rpc.aio_server import ACCEPTORS_PER_METHOD

StartWithQuotas = Callable[..., Awaitable[Api]]


async def test_all_of_2000_calls_at_once_are_answered(api: Api) -> None:
    """Of one client on one channel that has just been opened, reads and writes mixed."""
    sessions = [await api.session() for _ in range(10)]
    async with Api(api.address, api.tenant) as client:
        calls: list[Awaitable[Any]] = []
        for number in range(1000):
            session = sessions[number % len(sessions)]
            request = GetChatSessionRequest(session_id=session.id)
            calls += client.sessions.GetChatSession(request), client.message(session.id)
        assert not await errors_of(*calls)
    for session in sessions:
        assert await sequences(api, session.id) == list(range(1, 101))


@pytest.mark.parametrize(
    "quotas",
    [
        {"tenant_calls_in_flight": 1},
        {"calls_in_flight": 1},
        {"tenant_calls_per_second": 200, "tenant_burst": 5, "tenant_calls_in_flight": 1},
    ],
)
async def test_burst_is_served_in_the_order_of_coming(
    start_with_quotas: StartWithQuotas, quotas: dict[str, float]
) -> None:
    """A tenant that makes 100 calls at once, of which the quotas allow few at a time."""
    quotas = {"tenant_calls_per_second": 100_000, **quotas}
    api = await start_with_quotas(wait_seconds=10, **quotas)
    session = await api.session()
    messages = await asyncio.gather(*(api.message(session.id) for _ in range(100)))
    # gRPC hands over the calls of one moment in any order, which on a busy machine is a long one.
    # So not each place counts, but their mean. In an order of chance it would be 33.
    moved = [abs(message.sequence - place) for place, message in enumerate(messages, 1)]
    assert sum(moved) / len(moved) < ACCEPTORS_PER_METHOD


async def test_streams_wait_for_the_rate(start_with_quotas: StartWithQuotas) -> None:
    """A client that opens many streams at once gets all of them."""
    api = await start_with_quotas(wait_seconds=10, tenant_calls_per_second=200, tenant_burst=2)
    session = await api.session()
    assert not await errors_of(*(sequences(api, session.id) for _ in range(60)))


async def test_call_that_cannot_be_admitted_in_time_is_rejected_at_once(
    start_with_quotas: StartWithQuotas,
) -> None:
    """It is told when the rate will allow it, behind those that wait."""
    api = await start_with_quotas(wait_seconds=1.5, tenant_calls_per_second=1, tenant_burst=1)
    calls = [asyncio.ensure_future(list_sessions(api)) for _ in range(5)]
    errors = await errors_of(*calls)
    delays = sorted(
        assert_quota_error(
            refusal_of(error), "tenant_calls_per_second", "1", f"tenant:{api.tenant}"
        )
        for error in errors
    )
    assert len(delays) == 3
    assert min(delays) > 1.5
    assert max(delays) <= 2, "behind the one call that waits"


@pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
async def test_waiting_ends_by_half_of_the_deadline(
    start_with_quotas: StartWithQuotas, database: str, quota: str
) -> None:
    """The caller hears which quota it is, instead of DEADLINE_EXCEEDED."""
    api = await start_with_quotas(wait_seconds=60, **{quota: 1})
    session = await api.session()
    stub = chat_message_pb2_grpc.ChatMessageServiceStub(api.channel)
    request = CreateChatMessageRequest(
        session_id=session.id,
        message=resources_pb2.ChatMessage(
            role=resources_pb2.CHAT_MESSAGE_ROLE_USER, content="hello"
        ),
    )
    with session_locked(database, session.id):
        blocked = asyncio.create_task(api.message(session.id))
        await asyncio.sleep(0.1)
        with exceeds_quota(quota, 1, api if quota.startswith("tenant") else "server"):
            await stub.CreateChatMessage(
                request, metadata=[("x-tenant-id", api.tenant)], timeout=0.5
            )
        assert not blocked.done()
    await blocked


async def test_tenants_take_turns(start_with_quotas: StartWithQuotas, database: str) -> None:
    """One whose single call came last does not wait for all calls of another."""
    api = await start_with_quotas(wait_seconds=10, calls_in_flight=1)
    session = await api.session()
    order: list[str] = []

    async def call(client: Api, session_id: str) -> None:
        await client.message(session_id)
        order.append(client.tenant)

    async with another_tenant(api) as other:
        theirs = await other.session()
        with session_locked(database, session.id):
            calls = [asyncio.create_task(call(api, session.id)) for _ in range(20)]
            await asyncio.sleep(0.2)
            calls.append(asyncio.create_task(call(other, theirs.id)))
            await asyncio.sleep(0.2)
            assert not order
        await asyncio.gather(*calls)
    # Answers of two channels may overtake one another.
    assert order.index(other.tenant) <= 4


@pytest.mark.parametrize(
    ("bound", "limit", "quota"),
    [
        ("MAX_WAITING_PER_TENANT", 2, "tenant_waiting_calls"),
        ("MAX_WAITING", 2, "waiting_calls"),
        ("MAX_WAITING_BYTES_PER_TENANT", 25_000, "tenant_waiting_bytes"),
        ("MAX_WAITING_BYTES", 25_000, "waiting_bytes"),
    ],
)
async def test_number_and_size_of_waiting_calls_are_limited(
    start_with_quotas: StartWithQuotas,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    bound: str,
    limit: int,
    quota: str,
) -> None:
    """So the memory that they hold is bounded. Callers that leave make room for others."""
    monkeypatch.setattr(quotas_module, bound, limit)
    api = await start_with_quotas(wait_seconds=60, tenant_calls_in_flight=1)
    session = await api.session()
    with session_locked(database, session.id):
        blocked = asyncio.create_task(api.message(session.id))
        await asyncio.sleep(0.1)
        for _ in range(2):
            calls = [asyncio.create_task(api.message(session.id, "x" * 10_000)) for _ in range(5)]
            async with asyncio.timeout(10):
                while sum(task.done() for task in calls) < 3:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.1)
            waiting = [task for task in calls if not task.done()]
            assert len(waiting) == 2
            for task in calls:
                if task not in waiting:
                    assert f"quota {quota} exceeded" in str(task.exception())
            for task in waiting:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            await asyncio.sleep(0.1)  # a cancellation reaches the server a little later
    await blocked
    await eventually(lambda: list_sessions(api))
    codes = Counter(type(result) for result in await asyncio.gather(*calls, return_exceptions=True))
    assert codes == {grpc.aio.AioRpcError: 3, asyncio.CancelledError: 2}


async def test_stream_that_waited_is_rejected_by_the_quotas_of_streams(
    start_with_quotas: StartWithQuotas,
) -> None:
    """The streams that opened meanwhile count."""
    api = await start_with_quotas(
        wait_seconds=10, tenant_calls_per_second=20, tenant_burst=1, tenant_streams=2
    )
    session = await api.session()
    streams = [
        api.sessions.WatchChatSession(WatchChatSessionRequest(session_id=session.id))
        for _ in range(4)
    ]
    answers = await asyncio.gather(*(stream.read() for stream in streams), return_exceptions=True)
    rejected = [refusal_of(each) for each in answers if isinstance(each, BaseException)]
    assert [each.info.metadata["quota"] for each in rejected] == ["tenant_streams"] * 2


async def test_call_that_is_cancelled_while_it_is_admitted_releases_its_quota() -> None:
    """Even in the same turn of the event loop."""
    enforcer = QuotaEnforcer(Quotas(tenant_calls_in_flight=1), 1000)

    async def acquire() -> Any:
        return await enforcer.acquire_call("acme", wait_seconds=1, request_bytes=0)

    lease = await acquire()
    waiting = asyncio.create_task(acquire())
    await asyncio.sleep(0)
    with lease:
        pass
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    with await acquire():
        pass
