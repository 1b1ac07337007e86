"""Quotas: each limit is enforced, and one tenant cannot use up what another needs.

The rates in these tests are low, so that no rate is regained while a test runs.
"""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.client import Api, Refusal, an_id, refused
from test_errors import locked
from test_list_messages import filled, rest_of, sequences
from test_watch import watching

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1.chat_message_pb2 import ListChatMessagesRequest, SearchChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    WatchChatSessionRequest,
)
from chat_ticket_svc import config
from chat_ticket_svc.access import quotas as quotas_module
from chat_ticket_svc.access.quotas import (
    PRUNE_THRESHOLD_TENANTS,
    REJECTION_DELAY_SECONDS,
    UNAUTHENTICATED_STREAMS_PER_METHOD,
    Quotas,
)
from chat_ticket_svc.commands.token import development_settings, sign_token
from chat_ticket_svc.errors import QuotaExceededError
from chat_ticket_svc.store import search, session_changes

SERVER = "server"


@pytest.fixture(autouse=True)
def fast_shutdown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that drain without notice, because no caller is left."""
    monkeypatch.setattr("chat_ticket_svc.server.DRAIN_NOTICE_SECONDS", 0)


@pytest.fixture
def start(start_server: Any, database: str) -> Callable[..., Awaitable[Api]]:
    """`await start(**quotas)`: a client of a server of the test's own, which has these quotas."""

    async def start(**quotas: float) -> Api:
        # Longer than any test holds a lock.
        return await start_server(database, quotas=quotas, lock_timeout_ms=9000)  # type: ignore[no-any-return]

    return start


@contextlib.asynccontextmanager
async def another(api: Api) -> AsyncIterator[Api]:
    """Another tenant's client of the same server."""
    async with Api(api.address, f"another {an_id()}") as other:
        yield other


async def call(api: Api) -> None:
    await api.sessions.ListChatSessions(ListChatSessionsRequest())


async def results(*calls: Awaitable[object]) -> list[BaseException]:
    """Make the calls concurrently, and return the errors of those that fail."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    return [result for result in done if isinstance(result, BaseException)]


def live_abort_errors() -> list[grpc.aio.AbortError]:
    """The errors that ended calls and are still in memory."""
    return [each for each in gc.get_objects() if isinstance(each, grpc.aio.AbortError)]


def read(error: BaseException) -> Refusal:
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
def exceeds(quota: str, limit: float, subject: str | Api) -> Any:
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
    with locked(database_url, session_id):
        calls = [asyncio.create_task(api.message(session_id)) for _ in range(count + 1)]
        # Which of them came last is not known.
        [first], waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        error = first.exception()
        assert error is not None
        yield read(error), list(waiting)
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
                assert read(error).info.reason == "QUOTA_EXCEEDED"
                await asyncio.sleep(0.02)
            else:
                return


class TestRate:
    async def test_rejection_after_the_burst_tells_the_retry_delay(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """After the delay exactly one more call is admitted."""
        api = await start(tenant_calls_per_second=1.25, tenant_burst=3)
        errors = await results(*(call(api) for _ in range(5)))
        assert len(errors) == 2
        subject = f"tenant:{api.tenant}"
        told = [
            assert_quota_error(read(error), "tenant_calls_per_second", "1.25", subject)
            for error in errors
        ]
        assert max(told) <= 0.8, "no longer than a turn takes"
        async with another(api) as other:
            assert not await results(*(call(other) for _ in range(3))), "has a rate of its own"
        await asyncio.sleep(max(told))
        await call(api)
        with exceeds("tenant_calls_per_second", 1.25, api):
            await call(api)

    async def test_idle_tenant_regains_no_more_than_the_burst(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """However long a tenant is idle, it can make only a burst of calls at once."""
        api = await start(tenant_calls_per_second=4, tenant_burst=2)
        assert not await results(call(api), call(api))
        await asyncio.sleep(1)
        assert len(await results(*(call(api) for _ in range(6)))) == 4

    async def test_rejected_calls_do_not_count(self, start: Callable[..., Awaitable[Api]]) -> None:
        """A caller that keeps retrying waits no longer than one that waits."""
        api = await start(tenant_calls_per_second=1.25, tenant_burst=1)
        await call(api)
        errors = await results(*(call(api) for _ in range(20)))
        assert len(errors) == 20
        delays = [read(e).details["RetryInfo"].retry_delay.ToMilliseconds() for e in errors]
        assert max(delays) <= 800
        await asyncio.sleep(max(delays) / 1000)
        await call(api)

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_calls_rejected_by_another_quota_do_not_count(
        self, start: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """They do not use up the rate."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with blocked_calls(api, database, session.id, 1):
            assert len(await results(*(call(api) for _ in range(5)))) == 5
        await call(api)
        await call(api)
        with exceeds("tenant_calls_per_second", 0.1, api):
            await call(api)

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_streams_rejected_by_another_quota_do_not_count(
        self, start: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """They do not use up the rate."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with open_stream(api, session.id):
            assert len(await results(*(sequences(api, session.id) for _ in range(5)))) == 5
            await call(api)
            await call(api)
            with exceeds("tenant_calls_per_second", 0.1, api):
                await call(api)

    async def test_opening_a_stream_counts_as_a_call(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """Streams and calls share the rate. A stream counts only when it opens."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4)
        session = await api.session()
        assert await sequences(api, session.id) == []
        async with open_stream(api, session.id) as watcher:
            assert (await api.message(session.id)).sequence == 1
            await watcher.until_revision(1)
            with exceeds("tenant_calls_per_second", 0.1, api):
                await call(api)
            with exceeds("tenant_calls_per_second", 0.1, api):
                await sequences(api, session.id)


class TestDelayedRejections:
    async def test_rejections_are_delayed(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Briefly. Admitted calls and other tenants are not delayed."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=1)
        loop = asyncio.get_running_loop()
        await call(api)
        for attempt in (call(api), sequences(api, an_id())):
            began = loop.time()
            with exceeds("tenant_calls_per_second", 0.1, api):
                await attempt
            assert loop.time() - began >= REJECTION_DELAY_SECONDS / 2
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        async with another(api) as other:
            async with asyncio.timeout(10):
                await call(other)

    @pytest.mark.parametrize(
        "bound", ["MAX_DELAYED_REJECTIONS_PER_TENANT", "MAX_DELAYED_REJECTIONS"]
    )
    async def test_number_of_delayed_rejections_is_limited(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch, bound: str
    ) -> None:
        """Further rejections are immediate, so that the memory they hold is bounded."""
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        monkeypatch.setattr(quotas_module, bound, 2)
        api = await start(tenant_calls_per_second=0.1, tenant_burst=1)
        await call(api)
        for _ in range(2):  # those that left have made room
            calls = [asyncio.create_task(call(api)) for _ in range(5)]
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
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It tells the caller more than DEADLINE_EXCEEDED would."""
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        api = await start(tenant_calls_per_second=0.1, tenant_burst=1)
        await call(api)
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        with exceeds("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata, timeout=1)


class TestConnections:
    @pytest.mark.parametrize("pool_size", [2, 5])
    async def test_blocked_tenant_leaves_connections_to_others(
        self, start_server: Any, database: str, pool_size: int
    ) -> None:
        """However many calls of one tenant wait for a lock, those of another are answered."""
        api = await start_server(database, pool_size=pool_size, lock_timeout_ms=9000)
        session = await api.session()
        async with another(api) as other:
            with locked(database, session.id):
                calls = [asyncio.create_task(api.message(session.id)) for _ in range(2 * pool_size)]
                await asyncio.sleep(0.3)
                async with asyncio.timeout(1):
                    for _ in range(10):
                        await call(other)
                assert not any(task.done() for task in calls)
            assert not await results(*calls)

    async def test_tenants_share_the_pool_queue_fairly(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """A full queue rejects a tenant that has its share, and admits one that has less."""
        api = await start_server(fresh_database, pool_size=2, lock_timeout_ms=9000)
        async with contextlib.AsyncExitStack() as stack:
            tenants = [await stack.enter_async_context(another(api)) for _ in range(5)]
            sessions = [(await tenant.session()).id for tenant in tenants]
            await api.session()
            with contextlib.ExitStack() as locks:
                for session_id in sessions:
                    locks.enter_context(locked(fresh_database, session_id))
                waiting = [
                    asyncio.create_task(tenant.message(session_id))
                    for tenant, session_id in zip(tenants, sessions, strict=True)
                    for _ in range(2)
                ]
                await asyncio.sleep(0.5)
                assert not any(task.done() for task in waiting), "ten places are theirs"
                with refused(StatusCode.RESOURCE_EXHAUSTED, "POOL_QUEUE_FULL"):
                    await tenants[0].message(sessions[0])
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
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many searches of one tenant block, those of another are answered."""
        api = await start()
        await self.hang(monkeypatch, search, api)
        request = SearchChatMessagesRequest(query="hello")
        hanging = [api.messages.SearchChatMessages(request) for _ in range(20)]
        await call(api)
        async with another(api) as other, asyncio.timeout(5):
            await other.messages.SearchChatMessages(request)
        for each in hanging:
            each.cancel()

    async def test_reads_of_watchers(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many watchers of one tenant block, those of another receive events."""
        api = await start()
        await self.hang(monkeypatch, session_changes, api)
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(20):
                watcher = await stack.enter_async_context(watching(api, an_id()))
                task = asyncio.create_task(watcher.next())
                stack.callback(task.cancel)
            await call(api)
            async with another(api) as other, asyncio.timeout(5):
                session = await other.session()
                async with watching(other, session.id) as told:
                    await told.next()


class TestCalls:
    async def test_tenant_calls_in_flight(
        self, start: Callable[..., Awaitable[Api]], database: str
    ) -> None:
        """A tenant whose calls block is rejected until they end. Other tenants are not affected."""
        api = await start(tenant_calls_in_flight=2)
        session = await api.session()
        async with (
            another(api) as other,
            blocked_calls(api, database, session.id, 2) as (refusal, _),
        ):
            assert_quota_error(refusal, "tenant_calls_in_flight", "2", f"tenant:{api.tenant}")
            with exceeds("tenant_calls_in_flight", 2, api):
                await call(api)
            await call(other)
            assert await sequences(api, session.id) == [], "a stream is no call"
        assert not await results(call(api), call(api))

    async def test_calls_in_flight_of_all_tenants(
        self, start: Callable[..., Awaitable[Api]], database: str
    ) -> None:
        """The limit of the server applies to all tenants, but not to health checks."""
        api = await start(calls_in_flight=2)
        session = await api.session()
        async with (
            another(api) as other,
            blocked_calls(api, database, session.id, 2) as (refusal, _),
        ):
            assert_quota_error(refusal, "calls_in_flight", "2", SERVER)
            for each in (api, other):
                with exceeds("calls_in_flight", 2, SERVER):
                    await call(each)
            health = await api.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with another(api) as other:
            assert not await results(call(api), call(other))

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_quota_is_released_once_however_a_call_ends(
        self, start: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """By success, an error, a deadline, a cancellation or malformed bytes."""
        api = await start(**{quota: 1})
        subject = SERVER if quota == "calls_in_flight" else api
        session = await api.session()
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        delete = DeleteChatSessionRequest(session_id=session.id)
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"

        async def exactly_one_is_admitted() -> None:
            await eventually(lambda: call(api))
            async with blocked_calls(api, database, session.id, 1):
                with exceeds(quota, 1, subject):
                    await call(api)

        await exactly_one_is_admitted()
        with refused(StatusCode.NOT_FOUND):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
        await exactly_one_is_admitted()
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.channel.unary_unary(method)(b"\xff\xff", metadata=metadata)
        await exactly_one_is_admitted()
        with locked(database, session.id):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DeleteChatSession(delete, metadata=metadata, timeout=0.2)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: call(api))
            leaving = api.sessions.DeleteChatSession(delete)
            await asyncio.sleep(0.1)
            leaving.cancel()
            await eventually(lambda: call(api))
        await exactly_one_is_admitted()


class TestStreams:
    async def test_tenant_streams(self, start: Callable[..., Awaitable[Api]]) -> None:
        """List and watch streams of all sessions of a tenant count together."""
        api = await start(tenant_streams=2)
        sessions = [await api.session() for _ in range(3)]
        async with (
            open_stream(api, sessions[0].id),
            open_stream(api, sessions[1].id),
        ):
            for attempt in (api.sessions.WatchChatSession, api.messages.ListChatMessages):
                with exceeds("tenant_streams", 2, api):
                    await rest_of(attempt(WatchChatSessionRequest(session_id=sessions[2].id)))
            await call(api)
            async with another(api) as other:
                session = await other.session()
                async with (
                    open_stream(other, session.id),
                    open_stream(other, session.id),
                ):
                    pass
        await eventually(lambda: sequences(api, sessions[2].id))

    async def test_session_streams(self, start: Callable[..., Awaitable[Api]]) -> None:
        """The case of a session id does not matter. Another tenant's session is a different one."""
        api = await start(session_streams=2)
        session, second = await api.session(), await api.session()
        async with (
            open_stream(api, session.id),
            open_stream(api, session.id.upper()),
        ):
            for spelled in (session.id, session.id.upper(), session.id.title()):
                with exceeds("session_streams", 2, api):
                    await sequences(api, spelled)
            async with open_stream(api, second.id), another(api) as other:
                await other.session(id=session.id)
                async with (
                    open_stream(other, session.id),
                    open_stream(other, session.id),
                ):
                    with exceeds("session_streams", 2, other):
                        await sequences(other, session.id)

    async def test_streams_of_all_tenants(self, start: Callable[..., Awaitable[Api]]) -> None:
        """The limit of the server applies to all tenants, but not to unary calls."""
        api = await start(streams=2)
        session = await api.session()
        async with another(api) as other, open_stream(api, session.id):
            theirs = await other.session()
            async with open_stream(other, theirs.id):
                for each, session_id in ((api, session.id), (other, theirs.id)):
                    with exceeds("streams", 2, SERVER):
                        await sequences(each, session_id)
                    await call(each)
            await eventually(lambda: sequences(api, session.id))

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_quota_is_released_once_however_a_stream_ends(
        self, start: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """By completion, a cancellation, an error, the end of its session or malformed bytes."""
        api = await start(**{quota: 1})
        subject = SERVER if quota == "streams" else api
        session_id = (await api.session()).id
        await api.message(session_id)
        other_id = (await api.session()).id
        metadata = [("x-tenant-id", api.tenant)]
        method = "/chat_ticket.v1.ChatSessionService/WatchChatSession"

        async def exactly_one_is_admitted(of: str = session_id) -> None:
            async def opened() -> None:
                async with open_stream(api, of):
                    with exceeds(quota, 1, subject):
                        await sequences(api, of)

            await eventually(opened)

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
        session_id = await filled(api, 5000, "x" * 2000)
        slow = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        await slow.read()
        with exceeds("tenant_streams", 1, api):
            await sequences(api, session_id)
        await eventually(lambda: sequences(api, session_id, limit=1))
        with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
            await rest_of(slow)
        await eventually(lambda: sequences(api, session_id, limit=1))


class TestUnauthenticatedMethods:
    async def test_streams_are_limited_per_method_and_do_not_count_for_tenants(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """An unauthenticated caller can use up the streams of one method, and nothing else."""
        api = await start(streams=1, calls_in_flight=1)
        session = await api.session()
        reflection = reflection_pb2_grpc.ServerReflectionStub(api.channel)  # type: ignore[no-untyped-call]
        services = reflection_pb2.ServerReflectionRequest(list_services="")

        async def watch() -> Any:
            stream = api.health.Watch(health_pb2.HealthCheckRequest())
            await stream.read()
            return stream

        async def reflect() -> Any:
            stream = reflection.ServerReflectionInfo()
            await stream.write(services)
            if await stream.read() is grpc.aio.EOF:
                await stream.wait_for_connection()  # raises why it has ended
            return stream

        for one_more, still in ((watch, reflect), (reflect, watch)):
            streams = [await one_more() for _ in range(UNAUTHENTICATED_STREAMS_PER_METHOD)]
            with exceeds("open_streams", UNAUTHENTICATED_STREAMS_PER_METHOD, SERVER):
                await one_more()
            (await still()).cancel()
            await api.health.Check(health_pb2.HealthCheckRequest())
            await call(api)
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
        with exceeds("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)


class TestMemory:
    """Mostly of the counters alone, because thousands of calls through a channel would be slow."""

    def quotas(self, **limits: float) -> Quotas:
        return Quotas(config.Quotas.model_validate(limits))

    def many(self, quotas: Quotas, count: int = 10 * PRUNE_THRESHOLD_TENANTS) -> None:
        for n in range(count):
            with quotas.acquire_call(f"{an_id()} {n}"):
                pass

    async def test_idle_tenants_are_pruned(self) -> None:
        """Memory does not grow with the number of tenants that have ever called."""
        quotas = self.quotas(tenant_calls_per_second=1_000_000)
        self.many(quotas)
        assert len(quotas._usages) <= 2 * PRUNE_THRESHOLD_TENANTS

    async def test_active_tenants_are_not_pruned(self) -> None:
        """A call or stream in progress stays counted, whoever else calls."""
        quotas = self.quotas(
            tenant_calls_per_second=1_000_000, tenant_calls_in_flight=1, tenant_streams=1
        )
        with quotas.acquire_call("calls"), quotas.acquire_stream("streams", an_id()):
            self.many(quotas)
            with pytest.raises(QuotaExceededError), quotas.acquire_call("calls"):
                pass
            with pytest.raises(QuotaExceededError), quotas.acquire_stream("streams", an_id()):
                pass
        self.many(quotas)
        assert not {"calls", "streams"} & quotas._usages.keys()

    async def test_tenants_with_a_used_rate_are_not_pruned(self) -> None:
        """Pruning does not grant a new burst."""
        quotas = self.quotas(tenant_calls_per_second=0.1, tenant_burst=1)
        with quotas.acquire_call("spent"):
            pass
        self.many(quotas)
        with pytest.raises(QuotaExceededError), quotas.acquire_call("spent"):
            pass

    async def test_rejected_calls_leave_no_reference_cycles(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """The garbage collector would stop all calls after a flood."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=3)
        await call(api)
        gc.collect()
        gc.disable()
        try:
            for missing in (
                api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id())),
                sequences(api, an_id()),
            ):
                with refused(StatusCode.NOT_FOUND):
                    await missing
            assert len(await results(*(call(api) for _ in range(10)))) == 10
            assert len(await results(*(sequences(api, an_id()) for _ in range(10)))) == 10

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
            await api.message(session.id, "x" * (4 * config.MIB - 1000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.message(session.id, "x" * 4 * config.MIB)
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert await sequences(api, session.id) == []

    @pytest.mark.parametrize("size", [7000, 9000])
    async def test_metadata_over_8_kib(self, api: Api, size: int) -> None:
        """It is always rejected. Metadata within the limit never are."""
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant), ("x-anything", "x" * size)]
        for _ in range(10):
            answered = stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)
            if size < 8192:
                await answered
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answered
            assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED


class TestFlood:
    async def test_flooding_tenant_is_limited_and_another_is_not(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """30 fast callers get exactly their rate, and every acknowledged write is stored."""
        api = await start(tenant_calls_per_second=20, tenant_burst=50)
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

        async with another(api) as other, asyncio.TaskGroup() as group:
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
        assert {read(e).info.metadata["quota"] for e in flood_errors} == {"tenant_calls_per_second"}
        await asyncio.sleep(0.1)  # in which a turn or two are given back
        assert await sequences(api, flooded.id) == sorted(accepted)
