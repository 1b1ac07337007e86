"""Calls per second: the rate of a tenant, and the calls that no tenant pays for."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.client import Api, an_id, refused
from support.messages import sequences
from support.quotas import (
    SERVER,
    another_tenant,
    assert_quota_error,
    blocked_calls,
    errors_of,
    eventually,
    exceeds_quota,
    open_stream,
    refusal_of,
)
from support.sessions import list_sessions

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_session_pb2 import (
    ListChatSessionsRequest,
    WatchChatSessionRequest,
)
from chat_ticket_svc.access import quotas as quotas_module
from chat_ticket_svc.access.quotas import (
    REJECTION_DELAY_SECONDS,
    UNAUTHENTICATED_STREAMS_PER_METHOD,
)
from chat_ticket_svc.commands.token import development_settings, sign_token


class TestRate:
    async def test_rejection_after_the_burst_has_a_retry_delay(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """After the delay exactly one more call is admitted."""
        api = await start_with_quotas(tenant_calls_per_second=1.25, tenant_burst=3)
        errors = await errors_of(*(list_sessions(api) for _ in range(5)))
        assert len(errors) == 2
        subject = f"tenant:{api.tenant}"
        delays = [
            assert_quota_error(refusal_of(error), "tenant_calls_per_second", "1.25", subject)
            for error in errors
        ]
        assert max(delays) <= 0.8, "no longer than a turn takes"
        async with another_tenant(api) as other:
            assert not await errors_of(*(list_sessions(other) for _ in range(3))), (
                "has a rate of its own"
            )
        await asyncio.sleep(max(delays))
        await list_sessions(api)
        with exceeds_quota("tenant_calls_per_second", 1.25, api):
            await list_sessions(api)

    async def test_idle_tenant_regains_no_more_than_the_burst(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """However long a tenant is idle, it can make only a burst of calls at once."""
        api = await start_with_quotas(tenant_calls_per_second=4, tenant_burst=2)
        assert not await errors_of(list_sessions(api), list_sessions(api))
        await asyncio.sleep(1)
        assert len(await errors_of(*(list_sessions(api) for _ in range(6)))) == 4

    async def test_rejected_calls_do_not_count(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """A caller that keeps retrying waits no longer than one that waits."""
        api = await start_with_quotas(tenant_calls_per_second=1.25, tenant_burst=1)
        await list_sessions(api)
        errors = await errors_of(*(list_sessions(api) for _ in range(20)))
        assert len(errors) == 20
        delays = [refusal_of(e).details["RetryInfo"].retry_delay.ToMilliseconds() for e in errors]
        assert max(delays) <= 800
        await asyncio.sleep(max(delays) / 1000)
        await list_sessions(api)

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_calls_rejected_by_another_quota_do_not_count(
        self, start_with_quotas: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """They do not use up the rate."""
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with blocked_calls(api, database, session.id, 1):
            assert len(await errors_of(*(list_sessions(api) for _ in range(5)))) == 5
        await list_sessions(api)
        await list_sessions(api)
        with exceeds_quota("tenant_calls_per_second", 0.1, api):
            await list_sessions(api)

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_streams_rejected_by_another_quota_do_not_count(
        self, start_with_quotas: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """They do not use up the rate."""
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with open_stream(api, session.id):
            assert len(await errors_of(*(sequences(api, session.id) for _ in range(5)))) == 5
            await list_sessions(api)
            await list_sessions(api)
            with exceeds_quota("tenant_calls_per_second", 0.1, api):
                await list_sessions(api)

    async def test_opening_a_stream_counts_as_a_call(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """Streams and calls share the rate. A stream counts only when it opens."""
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=4)
        session = await api.session()
        assert await sequences(api, session.id) == []
        async with open_stream(api, session.id) as watcher:
            assert (await api.message(session.id)).sequence == 1
            await watcher.until_revision(1)
            with exceeds_quota("tenant_calls_per_second", 0.1, api):
                await list_sessions(api)
            with exceeds_quota("tenant_calls_per_second", 0.1, api):
                await sequences(api, session.id)


class TestDelayedRejections:
    async def test_rejections_are_delayed(
        self, start_with_quotas: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Briefly. Admitted calls and other tenants are not delayed."""
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=1)
        loop = asyncio.get_running_loop()
        await list_sessions(api)
        for attempt in (list_sessions(api), sequences(api, an_id())):
            began = loop.time()
            with exceeds_quota("tenant_calls_per_second", 0.1, api):
                await attempt
            assert loop.time() - began >= REJECTION_DELAY_SECONDS / 2
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        async with another_tenant(api) as other:
            async with asyncio.timeout(10):
                await list_sessions(other)

    @pytest.mark.parametrize(
        "bound", ["MAX_DELAYED_REJECTIONS_PER_TENANT", "MAX_DELAYED_REJECTIONS"]
    )
    async def test_number_of_delayed_rejections_is_limited(
        self,
        start_with_quotas: Callable[..., Awaitable[Api]],
        monkeypatch: pytest.MonkeyPatch,
        bound: str,
    ) -> None:
        """Further rejections are immediate, so that the memory they hold is bounded."""
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        monkeypatch.setattr(quotas_module, bound, 2)
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=1)
        await list_sessions(api)
        for _ in range(2):  # those that left have made room
            calls = [asyncio.create_task(list_sessions(api)) for _ in range(5)]
            async with asyncio.timeout(10):
                while sum(task.done() for task in calls) < 3:
                    await asyncio.sleep(0.02)
            await asyncio.sleep(0.1)
            waiting = [task for task in calls if not task.done()]
            assert len(waiting) == 2
            for task in waiting:
                task.cancel()
            await asyncio.gather(*calls, return_exceptions=True)

    async def test_rejection_comes_before_the_deadline(
        self, start_with_quotas: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It has more information than DEADLINE_EXCEEDED."""
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=1)
        await list_sessions(api)
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        with exceeds_quota("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata, timeout=1)


class TestUnauthenticatedMethods:
    async def test_streams_are_limited_per_method_and_do_not_count_for_tenants(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """An unauthenticated caller can use up the streams of one method, and nothing else."""
        api = await start_with_quotas(streams=1, calls_in_flight=1)
        session = await api.session()
        reflection = reflection_pb2_grpc.ServerReflectionStub(api.channel)  # type: ignore[no-untyped-call]

        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            await asyncio.Event().wait()  # the stream stays open

        async def watch() -> Any:
            stream = api.health.Watch(health_pb2.HealthCheckRequest())
            await stream.read()
            return stream

        async def reflect() -> Any:
            # Not by `write`: it fails without the status if the refusal comes first.
            stream = reflection.ServerReflectionInfo(requests())
            if await stream.read() is grpc.aio.EOF:
                await stream.wait_for_connection()  # raises why it has ended
            return stream

        for one_more, still in ((watch, reflect), (reflect, watch)):
            streams = [await one_more() for _ in range(UNAUTHENTICATED_STREAMS_PER_METHOD)]
            with exceeds_quota("open_streams", UNAUTHENTICATED_STREAMS_PER_METHOD, SERVER):
                await one_more()
            (await still()).cancel()
            await api.health.Check(health_pb2.HealthCheckRequest())
            await list_sessions(api)
            async with open_stream(api, session.id):
                pass
            for stream in streams:
                stream.cancel()

            async def again(one_more: Callable[[], Awaitable[Any]] = one_more) -> None:
                (await one_more()).cancel()

            await eventually(again)


class TestUnauthorizedCallers:
    async def test_calls_that_are_not_authorized_do_not_count(
        self, start_server: Any, database: str, tmp_path: Path
    ) -> None:
        """They do not use up the quotas of the tenant that they name."""
        api = await start_server(
            database,
            auth="jwt",
            quotas={"tenant_calls_per_second": 0.1, "tenant_burst": 2, "tenant_streams": 1},
            **development_settings(tmp_path),
        )
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)

        def bearer(tenant: str, permissions: list[str]) -> list[tuple[str, str]]:
            token = sign_token(tmp_path, tenants=[tenant], permissions=permissions, seconds=60)
            return [("x-tenant-id", api.tenant), ("authorization", f"Bearer {token}")]

        watched = WatchChatSessionRequest(session_id=an_id())
        for metadata, code in (
            ([("x-tenant-id", api.tenant)], StatusCode.UNAUTHENTICATED),
            (
                [("x-tenant-id", api.tenant), ("authorization", "Bearer x")],
                StatusCode.UNAUTHENTICATED,
            ),
            (bearer("another", ["read"]), StatusCode.PERMISSION_DENIED),
            (bearer(api.tenant, ["write"]), StatusCode.PERMISSION_DENIED),
        ):
            for _ in range(3):
                with refused(code):
                    await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)
                with refused(code):
                    await stub.WatchChatSession(watched, metadata=metadata).read()
        metadata = bearer(api.tenant, ["read"])
        await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)
        with refused(StatusCode.NOT_FOUND):
            await stub.WatchChatSession(watched, metadata=metadata).read()
        with exceeds_quota("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)


class TestFlood:
    async def test_flooding_tenant_is_limited_and_another_is_not(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """30 fast callers get exactly their rate, and every acknowledged write is stored."""
        api = await start_with_quotas(tenant_calls_per_second=20, tenant_burst=50)
        loop = asyncio.get_running_loop()
        flooded, began = await api.session(), loop.time()
        accepted: list[int] = []
        flood_errors: list[BaseException] = []
        over = asyncio.Event()

        async def caller() -> None:
            while not over.is_set():
                try:
                    accepted.append((await api.message(flooded.id)).sequence)
                except grpc.aio.AioRpcError as error:
                    flood_errors.append(error)

        async with another_tenant(api) as other, asyncio.TaskGroup() as group:
            for _ in range(30):
                group.create_task(caller())
            session = await other.session()
            theirs = [(await other.message(session.id)).sequence for _ in range(30)]
            await asyncio.sleep(1)
            theirs += [(await other.message(session.id)).sequence for _ in range(10)]
            over.set()
            assert await sequences(other, session.id) == theirs == list(range(1, 41))
        allowed = 50 + 20 * (loop.time() - began)
        assert 50 <= len(accepted) <= allowed
        assert len(flood_errors) > 2 * len(accepted)
        assert {refusal_of(e).info.metadata["quota"] for e in flood_errors} == {
            "tenant_calls_per_second"
        }
        await asyncio.sleep(0.1)  # in which a turn or two are given back
        assert await sequences(api, flooded.id) == sorted(accepted)
