"""Quotas: each limit is enforced, and one tenant cannot use up what another needs.

The rates in these tests are low, so that no rate is regained while a test runs.
"""

import asyncio
import contextlib
import gc
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from support.client import Api, an_id, refused
from support.database import session_locked
from support.messages import read_rest, sequences, session_with_messages
from support.quotas import (
    SERVER,
    another_tenant,
    assert_quota_error,
    blocked_calls,
    errors_of,
    eventually,
    exceeds_quota,
    live_abort_errors,
    open_stream,
)
from support.sessions import list_sessions
from support.watching import watching

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, SearchChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    WatchChatSessionRequest,
)
from chat_ticket_svc.access.quotas import (
    PRUNE_THRESHOLD_TENANTS,
    QuotaEnforcer,
)
from chat_ticket_svc.errors import QuotaExceededError
from chat_ticket_svc.limits import MIB, Quotas
from chat_ticket_svc.store import search, session_changes


class TestConnections:
    @pytest.mark.parametrize("pool_size", [2, 5])
    async def test_blocked_tenant_leaves_connections_to_others(
        self, start_server: Any, database: str, pool_size: int
    ) -> None:
        """However many calls of one tenant wait for a lock, those of another are answered."""
        api = await start_server(database, pool_size=pool_size, lock_timeout_ms=9000)
        session = await api.session()
        async with another_tenant(api) as other:
            with session_locked(database, session.id):
                calls = [asyncio.create_task(api.message(session.id)) for _ in range(2 * pool_size)]
                await asyncio.sleep(0.3)
                async with asyncio.timeout(1):
                    for _ in range(10):
                        await list_sessions(other)
                assert not any(task.done() for task in calls)
            assert not await errors_of(*calls)

    async def test_tenants_share_the_pool_queue_fairly(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """A full queue rejects a tenant that has its share, and admits one that has less."""
        api = await start_server(fresh_database, pool_size=2, lock_timeout_ms=9000)
        async with contextlib.AsyncExitStack() as stack:
            tenants = [await stack.enter_async_context(another_tenant(api)) for _ in range(5)]
            # Two sessions each, as calls on one session take turns before they enter the queue.
            sessions = [(tenant, (await tenant.session()).id) for tenant in tenants * 2]
            free = await tenants[0].session()
            await api.session()
            with session_locked(fresh_database, *(session_id for _, session_id in sessions)):
                waiting = [
                    asyncio.create_task(tenant.message(session_id))
                    for tenant, session_id in sessions
                ]
                await asyncio.sleep(0.5)
                assert not any(task.done() for task in waiting), "ten places are theirs"
                with refused(StatusCode.RESOURCE_EXHAUSTED, "POOL_QUEUE_FULL"):
                    await tenants[0].message(free.id, "x" * 9000)
                newcomer = asyncio.create_task(api.session())
                await asyncio.sleep(0.2)
                assert not newcomer.done()
            assert (await newcomer).id
            await asyncio.gather(*waiting, return_exceptions=True)


class TestFairShares:
    """One tenant cannot use up the resources within the process that another waits for."""

    async def hang(self, monkeypatch: pytest.MonkeyPatch, module: Any, api: Api) -> None:
        """Make this tenant's reads by `module.page` block for ever."""
        page = module.page

        async def hanging(db: Any, tenant_id: str, *arguments: Any, **named: Any) -> Any:
            if tenant_id == api.tenant:
                await asyncio.Event().wait()
            return await page(db, tenant_id, *arguments, **named)

        monkeypatch.setattr(module, "page", hanging)

    async def test_searches(
        self, start_with_quotas: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many searches of one tenant block, those of another are answered."""
        api = await start_with_quotas()
        await self.hang(monkeypatch, search, api)
        request = SearchChatMessagesRequest(query="hello")
        hanging = [api.messages.SearchChatMessages(request) for _ in range(20)]
        await list_sessions(api)
        async with another_tenant(api) as other, asyncio.timeout(5):
            await other.messages.SearchChatMessages(request)
        for call in hanging:
            call.cancel()

    async def test_reads_of_watchers(
        self, start_with_quotas: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many watchers of one tenant block, those of another receive events."""
        api = await start_with_quotas()
        await self.hang(monkeypatch, session_changes, api)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                watcher = await stack.enter_async_context(watching(api, an_id()))
                task = asyncio.create_task(watcher.next())
                stack.callback(task.cancel)
            await list_sessions(api)
            async with another_tenant(api) as other, asyncio.timeout(5):
                session = await other.session()
                async with watching(other, session.id) as watcher:
                    await watcher.next()


class TestCalls:
    async def test_tenant_calls_in_flight(
        self, start_with_quotas: Callable[..., Awaitable[Api]], database: str
    ) -> None:
        """A tenant whose calls block is rejected until they end. Other tenants are not affected."""
        api = await start_with_quotas(tenant_calls_in_flight=2)
        session = await api.session()
        async with (
            another_tenant(api) as other,
            blocked_calls(api, database, session.id, 2) as (refusal, _),
        ):
            assert_quota_error(refusal, "tenant_calls_in_flight", "2", f"tenant:{api.tenant}")
            with exceeds_quota("tenant_calls_in_flight", 2, api):
                await list_sessions(api)
            await list_sessions(other)
            assert await sequences(api, session.id) == [], "a stream is no call"
        assert not await errors_of(list_sessions(api), list_sessions(api))

    async def test_calls_in_flight_of_all_tenants(
        self, start_with_quotas: Callable[..., Awaitable[Api]], database: str
    ) -> None:
        """The limit of the server applies to all tenants, but not to health checks."""
        api = await start_with_quotas(calls_in_flight=2)
        session = await api.session()
        async with (
            another_tenant(api) as other,
            blocked_calls(api, database, session.id, 2) as (refusal, _),
        ):
            assert_quota_error(refusal, "calls_in_flight", "2", SERVER)
            for each in (api, other):
                with exceeds_quota("calls_in_flight", 2, SERVER):
                    await list_sessions(each)
            health = await api.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with another_tenant(api) as other:
            assert not await errors_of(list_sessions(api), list_sessions(other))

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_quota_is_released_once_however_a_call_ends(
        self, start_with_quotas: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """By success, an error, a deadline, a cancellation or malformed bytes."""
        api = await start_with_quotas(**{quota: 1})
        subject = SERVER if quota == "calls_in_flight" else api
        session = await api.session()
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        delete = DeleteChatSessionRequest(session_id=session.id)
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"

        async def exactly_one_is_admitted() -> None:
            await eventually(lambda: list_sessions(api))
            async with blocked_calls(api, database, session.id, 1):
                with exceeds_quota(quota, 1, subject):
                    await list_sessions(api)

        await exactly_one_is_admitted()
        with refused(StatusCode.NOT_FOUND):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
        await exactly_one_is_admitted()
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.channel.unary_unary(method)(b"\xff\xff", metadata=metadata)
        await exactly_one_is_admitted()
        with session_locked(database, session.id):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DeleteChatSession(delete, metadata=metadata, timeout=0.2)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: list_sessions(api))
            leaving = api.sessions.DeleteChatSession(delete)
            await asyncio.sleep(0.1)
            leaving.cancel()
            await eventually(lambda: list_sessions(api))
        await exactly_one_is_admitted()


class TestStreams:
    async def test_tenant_streams(self, start_with_quotas: Callable[..., Awaitable[Api]]) -> None:
        """List and watch streams of all sessions of a tenant count together."""
        api = await start_with_quotas(tenant_streams=2)
        sessions = [await api.session() for _ in range(3)]
        async with (
            open_stream(api, sessions[0].id),
            open_stream(api, sessions[1].id),
        ):
            for attempt in (api.sessions.WatchChatSession, api.messages.ListChatMessages):
                with exceeds_quota("tenant_streams", 2, api):
                    await read_rest(attempt(WatchChatSessionRequest(session_id=sessions[2].id)))
            await list_sessions(api)
            async with another_tenant(api) as other:
                session = await other.session()
                async with (
                    open_stream(other, session.id),
                    open_stream(other, session.id),
                ):
                    pass
        await eventually(lambda: sequences(api, sessions[2].id))

    async def test_session_streams(self, start_with_quotas: Callable[..., Awaitable[Api]]) -> None:
        """The case of a session id does not matter. Another tenant's session is a different one."""
        api = await start_with_quotas(session_streams=2)
        session, second = await api.session(), await api.session()
        async with (
            open_stream(api, session.id),
            open_stream(api, session.id.upper()),
        ):
            for spelled in (session.id, session.id.upper(), session.id.title()):
                with exceeds_quota("session_streams", 2, api):
                    await sequences(api, spelled)
            async with open_stream(api, second.id), another_tenant(api) as other:
                await other.session(id=session.id)
                async with (
                    open_stream(other, session.id),
                    open_stream(other, session.id),
                ):
                    with exceeds_quota("session_streams", 2, other):
                        await sequences(other, session.id)

    async def test_streams_of_all_tenants(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """The limit of the server applies to all tenants, but not to unary calls."""
        api = await start_with_quotas(streams=2)
        session = await api.session()
        async with another_tenant(api) as other, open_stream(api, session.id):
            theirs = await other.session()
            async with open_stream(other, theirs.id):
                for each, session_id in ((api, session.id), (other, theirs.id)):
                    with exceeds_quota("streams", 2, SERVER):
                        await sequences(each, session_id)
                    await list_sessions(each)
            await eventually(lambda: sequences(api, session.id))

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_quota_is_released_once_however_a_stream_ends(
        self, start_with_quotas: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """By completion, a cancellation, an error, the end of its session or malformed bytes."""
        api = await start_with_quotas(**{quota: 1})
        subject = SERVER if quota == "streams" else api
        session_id = (await api.session()).id
        await api.message(session_id)
        other_id = (await api.session()).id
        metadata = [("x-tenant-id", api.tenant)]
        method = "/chat_ticket.v1.ChatSessionService/WatchChatSession"

        async def exactly_one_is_admitted(of: str = session_id) -> None:
            async def open_another() -> None:
                async with open_stream(api, of):
                    with exceeds_quota(quota, 1, subject):
                        await sequences(api, of)

            await eventually(open_another)

        await exactly_one_is_admitted()  # which ends as its caller leaves
        await exactly_one_is_admitted()
        await eventually(lambda: sequences(api, session_id, limit=1))
        await exactly_one_is_admitted()
        await eventually(lambda: sequences(api, session_id, limit=1))
        for wrong in (an_id(), ""):
            with refused(StatusCode.NOT_FOUND if wrong else StatusCode.INVALID_ARGUMENT):
                await sequences(api, wrong)
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.channel.unary_stream(method)(b"\xff\xff", metadata=metadata).read()
        await exactly_one_is_admitted()
        await eventually(lambda: sequences(api, session_id, limit=1))
        async with open_stream(api, other_id) as watcher:
            await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=other_id))
            await watcher.end()
        await exactly_one_is_admitted()

    async def test_quotas_of_a_slow_reader_are_released(
        self, start_server: Any, database: str
    ) -> None:
        """As soon as the server ends the stream, even if the caller has not noticed."""
        quotas = {"tenant_streams": 1, "session_streams": 1, "streams": 1}
        api = await start_server(database, quotas=quotas, stream_write_timeout_seconds=0.3)
        session_id = await session_with_messages(api, 5000, "x" * 2000)
        slow = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        await slow.read()
        with exceeds_quota("tenant_streams", 1, api):
            await sequences(api, session_id)
        await eventually(lambda: sequences(api, session_id, limit=1))
        with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
            await read_rest(slow)
        await eventually(lambda: sequences(api, session_id, limit=1))


class TestMemory:
    """Mostly of the counters alone, because thousands of calls through a channel would be slow."""

    def quotas(self, *, calls_per_second: float = 1_000_000, **limits: float) -> QuotaEnforcer:
        return QuotaEnforcer(Quotas.model_validate(limits), calls_per_second)

    async def call(self, quotas: QuotaEnforcer, tenant_id: str) -> AbstractContextManager[None]:
        return await quotas.acquire_call(tenant_id, wait_seconds=0, request_bytes=0)

    async def stream(self, quotas: QuotaEnforcer, tenant_id: str) -> AbstractContextManager[None]:
        return await quotas.acquire_stream(tenant_id, an_id(), wait_seconds=0, request_bytes=0)

    async def many(self, quotas: QuotaEnforcer, count: int = 10 * PRUNE_THRESHOLD_TENANTS) -> None:
        for n in range(count):
            with await self.call(quotas, f"{an_id()} {n}"):
                pass

    async def test_idle_tenants_are_pruned(self) -> None:
        """Memory does not grow with the number of tenants that have ever called."""
        quotas = self.quotas()
        await self.many(quotas)
        assert len(quotas._usages) <= 2 * PRUNE_THRESHOLD_TENANTS

    async def test_active_tenants_are_not_pruned(self) -> None:
        """A call or stream in progress stays counted, whoever else calls."""
        quotas = self.quotas(tenant_calls_in_flight=1, tenant_streams=1)
        with await self.call(quotas, "calls"), await self.stream(quotas, "streams"):
            await self.many(quotas)
            with pytest.raises(QuotaExceededError):
                await self.call(quotas, "calls")
            with pytest.raises(QuotaExceededError):
                await self.stream(quotas, "streams")
        await self.many(quotas)
        assert not {"calls", "streams"} & quotas._usages.keys()

    async def test_tenants_with_a_used_rate_are_not_pruned(self) -> None:
        """Pruning does not grant a new burst."""
        quotas = self.quotas(calls_per_second=0.1, tenant_burst=1)
        with await self.call(quotas, "spent"):
            pass
        await self.many(quotas)
        with pytest.raises(QuotaExceededError):
            await self.call(quotas, "spent")

    async def test_rejected_calls_leave_no_reference_cycles(
        self, start_with_quotas: Callable[..., Awaitable[Api]]
    ) -> None:
        """The garbage collector would stop all calls after a flood."""
        api = await start_with_quotas(tenant_calls_per_second=0.1, tenant_burst=3)
        await list_sessions(api)
        gc.collect()
        gc.disable()
        try:
            for missing in (
                api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id())),
                sequences(api, an_id()),
            ):
                with refused(StatusCode.NOT_FOUND):
                    await missing
            assert len(await errors_of(*(list_sessions(api) for _ in range(10)))) == 10
            assert len(await errors_of(*(sequences(api, an_id()) for _ in range(10)))) == 10

            async with asyncio.timeout(10):  # the latest may be on their way still
                while len(live_abort_errors()) >= 5:
                    await asyncio.sleep(0.1)
        finally:
            gc.enable()

    async def test_last_call_of_a_method_is_not_kept_in_memory(self, api: Api) -> None:
        """Not even if the method is never called again."""
        for _ in range(2):
            with refused(StatusCode.NOT_FOUND):
                await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
        async with asyncio.timeout(10):
            while gc.collect() or live_abort_errors():
                await asyncio.sleep(0.1)


class TestSizes:
    """gRPC itself rejects these calls, so the errors carry no details."""

    async def test_message_over_4_mib(self, api: Api) -> None:
        """It is rejected unparsed. A slightly smaller one only violates the limit of its field."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.message(session.id, "x" * (4 * MIB - 1000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.message(session.id, "x" * 4 * MIB)
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert await sequences(api, session.id) == []

    @pytest.mark.parametrize("size", [7000, 9000])
    async def test_metadata_over_8_kib(self, api: Api, size: int) -> None:
        """It is always rejected. Metadata within the limit never are."""
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant), ("x-anything", "x" * size)]

        async def code() -> StatusCode:
            call = stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)
            return await call.code()  # type: ignore[no-any-return]

        expected = StatusCode.OK if size < 8192 else StatusCode.RESOURCE_EXHAUSTED
        assert await asyncio.gather(*(code() for _ in range(10))) == [expected] * 10
