"""How much callers may use at once, and that what one tenant takes is not taken from another.

Rates are low here, so that nothing is given back while a test looks; a call that must succeed is
one whose turn cannot have been taken.
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
    REJECTION_DELAY_SECONDS,
    TENANTS,
    UNAUTHENTICATED_STREAMS,
    Quotas,
)
from chat_ticket_svc.commands.token import development_settings, sign_token
from chat_ticket_svc.errors import QuotaExceededError
from chat_ticket_svc.store import search, session_changes

SERVER = "server"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that end without notice: nobody is left to hear of it."""
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
    """Make the calls at once; returns the errors of those that failed."""
    done = await asyncio.gather(*calls, return_exceptions=True)
    return [result for result in done if isinstance(result, BaseException)]


def aborted() -> list[grpc.aio.AbortError]:
    """What has ended calls and is in memory still."""
    return [each for each in gc.get_objects() if isinstance(each, grpc.aio.AbortError)]


def read(error: BaseException) -> Refusal:
    assert isinstance(error, grpc.aio.AioRpcError)
    refusal = Refusal()
    refusal.read(error)
    return refusal


def assert_about(refusal: Refusal, quota: str, limit: str, subject: str) -> float:
    """The refusal has all that a program needs; returns after how many seconds to try again."""
    assert refusal.code is StatusCode.RESOURCE_EXHAUSTED
    assert refusal.info.reason == "QUOTA_EXCEEDED"
    assert dict(refusal.info.metadata) == {"quota": quota, "limit": limit}
    [violation] = refusal.details["QuotaFailure"].violations
    assert violation.subject == subject
    assert violation.description == refusal.text == f"the limit {quota} of {limit} is reached"
    delay = refusal.details["RetryInfo"].retry_delay.ToTimedelta().total_seconds()
    assert delay > 0
    return float(delay)


@contextlib.contextmanager
def beyond(quota: str, limit: float, subject: str | Api) -> Any:
    """Expects the call inside to be refused by this quota."""
    with refused(StatusCode.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED") as refusal:
        yield refusal
    of = subject if isinstance(subject, str) else f"tenant:{subject.tenant}"
    assert_about(refusal, quota, f"{limit:g}", of)


@contextlib.asynccontextmanager
async def held(
    api: Api, database_url: str, session_id: str, count: int
) -> AsyncIterator[tuple[Refusal, list[asyncio.Task[Any]]]]:
    """`count` calls hang, and one more has been refused: `refusal`. They succeed afterwards."""
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
    """A stream of changes that has been let in."""
    async with watching(api, session_id) as watcher:
        await watcher.next()
        yield watcher


async def eventually(attempt: Callable[[], Awaitable[object]]) -> None:
    """Try until it is not refused by a quota: the server hears a little later of a cancel."""
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
    async def test_burst_then_refusal_until_the_delay_that_is_told(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """A burst passes, the rest is told how long to wait; then one more passes, not two."""
        api = await start(tenant_calls_per_second=1.25, tenant_burst=3)
        errors = await results(*(call(api) for _ in range(5)))
        assert len(errors) == 2
        subject = f"tenant:{api.tenant}"
        told = [
            assert_about(read(error), "tenant_calls_per_second", "1.25", subject)
            for error in errors
        ]
        assert max(told) <= 0.8, "no longer than a turn takes"
        async with another(api) as other:
            assert not await results(*(call(other) for _ in range(3))), "has a rate of its own"
        await asyncio.sleep(max(told))
        await call(api)
        with beyond("tenant_calls_per_second", 1.25, api):
            await call(api)

    async def test_rate_comes_back_no_further_than_the_burst(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """However long a tenant was quiet, what it may do at once is the burst."""
        api = await start(tenant_calls_per_second=4, tenant_burst=2)
        assert not await results(call(api), call(api))
        await asyncio.sleep(1)
        assert len(await results(*(call(api) for _ in range(6)))) == 4

    async def test_refused_calls_cost_nothing(self, start: Callable[..., Awaitable[Api]]) -> None:
        """Whoever keeps trying waits no longer than whoever waits."""
        api = await start(tenant_calls_per_second=1.25, tenant_burst=1)
        await call(api)
        errors = await results(*(call(api) for _ in range(20)))
        assert len(errors) == 20
        delays = [read(e).details["RetryInfo"].retry_delay.ToMilliseconds() for e in errors]
        assert max(delays) <= 800
        await asyncio.sleep(max(delays) / 1000)
        await call(api)

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_calls_refused_by_another_quota_cost_nothing(
        self, start: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """What was not done was not taken from the rate either."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with held(api, database, session.id, 1):
            assert len(await results(*(call(api) for _ in range(5)))) == 5
        await call(api)
        await call(api)
        with beyond("tenant_calls_per_second", 0.1, api):
            await call(api)

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_streams_refused_by_another_quota_cost_nothing(
        self, start: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """As with calls."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4, **{quota: 1})
        session = await api.session()
        async with open_stream(api, session.id):
            assert len(await results(*(sequences(api, session.id) for _ in range(5)))) == 5
            await call(api)
            await call(api)
            with beyond("tenant_calls_per_second", 0.1, api):
                await call(api)

    async def test_opening_a_stream_takes_a_turn(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """Streams and calls share the rate; an open stream takes nothing more."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=4)
        session = await api.session()
        assert await sequences(api, session.id) == []
        async with open_stream(api, session.id) as watcher:
            assert (await api.message(session.id)).sequence == 1
            await watcher.until_revision(1)
            with beyond("tenant_calls_per_second", 0.1, api):
                await call(api)
            with beyond("tenant_calls_per_second", 0.1, api):
                await sequences(api, session.id)


class TestHoldingBack:
    async def test_refusals_are_answered_a_little_later(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A flood is slowed, not for long; calls that are let in are not, nor is another tenant."""
        api = await start(tenant_calls_per_second=0.1, tenant_burst=1)
        loop = asyncio.get_running_loop()
        await call(api)
        for attempt in (call(api), sequences(api, an_id())):
            began = loop.time()
            with beyond("tenant_calls_per_second", 0.1, api):
                await attempt
            assert loop.time() - began >= REJECTION_DELAY_SECONDS / 2
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        async with another(api) as other:
            async with asyncio.timeout(10):
                await call(other)

    @pytest.mark.parametrize("bound", ["TENANT_DELAYED_REJECTIONS", "DELAYED_REJECTIONS"])
    async def test_only_so_many_refusals_are_held_back(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch, bound: str
    ) -> None:
        """The others are answered at once, so that waiting for refusals takes no memory."""
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

    async def test_refusal_comes_before_the_deadline(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says more than DEADLINE_EXCEEDED."""
        monkeypatch.setattr(quotas_module, "REJECTION_DELAY_SECONDS", 30)
        api = await start(tenant_calls_per_second=0.1, tenant_burst=1)
        await call(api)
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        with beyond("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata, timeout=1)


class TestConnections:
    @pytest.mark.parametrize("pool_size", [2, 5])
    async def test_tenant_whose_calls_hang_leaves_connections_to_others(
        self, start_server: Any, database: str, pool_size: int
    ) -> None:
        """However many of one tenant's calls wait for a lock, another tenant's are answered."""
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

    async def test_tenants_in_a_crowd_share_the_places_to_wait_in(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """When all are taken, who has its part gets no more, and who has less still gets one."""
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


class TestShares:
    """What a call waits for within the process, another tenant's calls must not use up."""

    async def hang(self, monkeypatch: pytest.MonkeyPatch, module: Any, api: Api) -> None:
        """Make the reads of this tenant by `module.page` last for ever."""
        page = module.page

        async def hanging(db: Any, tenant_id: str, *arguments: Any, **named: Any) -> Any:
            if tenant_id == api.tenant:
                await asyncio.Event().wait()
            return await page(db, tenant_id, *arguments, **named)

        monkeypatch.setattr(module, "page", hanging)

    async def test_searches(
        self, start: Callable[..., Awaitable[Api]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many of one tenant's searches hang, another's are answered."""
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
        """However many of one tenant's watchers hang, another's are told."""
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
        """A tenant whose calls hang is refused the next, and nobody else is; then it goes on."""
        api = await start(tenant_calls_in_flight=2)
        session = await api.session()
        async with another(api) as other, held(api, database, session.id, 2) as (refusal, _):
            assert_about(refusal, "tenant_calls_in_flight", "2", f"tenant:{api.tenant}")
            with beyond("tenant_calls_in_flight", 2, api):
                await call(api)
            await call(other)
            assert await sequences(api, session.id) == [], "a stream is no call"
        assert not await results(call(api), call(api))

    async def test_calls_in_flight_of_all_tenants(
        self, start: Callable[..., Awaitable[Api]], database: str
    ) -> None:
        """The whole server has an end, for everybody; its health is told all the same."""
        api = await start(calls_in_flight=2)
        session = await api.session()
        async with another(api) as other, held(api, database, session.id, 2) as (refusal, _):
            assert_about(refusal, "calls_in_flight", "2", SERVER)
            for each in (api, other):
                with beyond("calls_in_flight", 2, SERVER):
                    await call(each)
            health = await api.health.Check(health_pb2.HealthCheckRequest())
            assert health.status == health_pb2.HealthCheckResponse.SERVING
        async with another(api) as other:
            assert not await results(call(api), call(other))

    @pytest.mark.parametrize("quota", ["tenant_calls_in_flight", "calls_in_flight"])
    async def test_every_end_of_a_call_gives_its_place_back_once(
        self, start: Callable[..., Awaitable[Api]], database: str, quota: str
    ) -> None:
        """Success, an error, a deadline, a caller that leaves, bytes that are no request."""
        api = await start(**{quota: 1})
        subject = SERVER if quota == "calls_in_flight" else api
        session = await api.session()
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        metadata = [("x-tenant-id", api.tenant)]
        delete = DeleteChatSessionRequest(session_id=session.id)
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"

        async def one_place() -> None:
            await eventually(lambda: call(api))
            async with held(api, database, session.id, 1):
                with beyond(quota, 1, subject):
                    await call(api)

        await one_place()
        with refused(StatusCode.NOT_FOUND):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
        await one_place()
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.channel.unary_unary(method)(b"\xff\xff", metadata=metadata)
        await one_place()
        with locked(database, session.id):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.DeleteChatSession(delete, metadata=metadata, timeout=0.2)
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
            await eventually(lambda: call(api))
            leaving = api.sessions.DeleteChatSession(delete)
            await asyncio.sleep(0.1)
            leaving.cancel()
            await eventually(lambda: call(api))
        await one_place()


class TestStreams:
    async def test_tenant_streams(self, start: Callable[..., Awaitable[Api]]) -> None:
        """Those of a tenant are counted together, of messages and of changes, on any session."""
        api = await start(tenant_streams=2)
        sessions = [await api.session() for _ in range(3)]
        async with (
            open_stream(api, sessions[0].id),
            open_stream(api, sessions[1].id),
        ):
            for attempt in (api.sessions.WatchChatSession, api.messages.ListChatMessages):
                with beyond("tenant_streams", 2, api):
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
        """A session is the same however its id is spelled; one of another tenant is another."""
        api = await start(session_streams=2)
        session, second = await api.session(), await api.session()
        async with (
            open_stream(api, session.id),
            open_stream(api, session.id.upper()),
        ):
            for spelled in (session.id, session.id.upper(), session.id.title()):
                with beyond("session_streams", 2, api):
                    await sequences(api, spelled)
            async with open_stream(api, second.id), another(api) as other:
                await other.session(id=session.id)
                async with (
                    open_stream(other, session.id),
                    open_stream(other, session.id),
                ):
                    with beyond("session_streams", 2, other):
                        await sequences(other, session.id)

    async def test_streams_of_all_tenants(self, start: Callable[..., Awaitable[Api]]) -> None:
        """The whole server has an end, for everybody; calls go on."""
        api = await start(streams=2)
        session = await api.session()
        async with another(api) as other, open_stream(api, session.id):
            theirs = await other.session()
            async with open_stream(other, theirs.id):
                for each, session_id in ((api, session.id), (other, theirs.id)):
                    with beyond("streams", 2, SERVER):
                        await sequences(each, session_id)
                    await call(each)
            await eventually(lambda: sequences(api, session.id))

    @pytest.mark.parametrize("quota", ["tenant_streams", "session_streams", "streams"])
    async def test_every_end_of_a_stream_gives_its_place_back_once(
        self, start: Callable[..., Awaitable[Api]], quota: str
    ) -> None:
        """Its own end, the caller's, an error, its session's end, bytes that are no request."""
        api = await start(**{quota: 1})
        subject = SERVER if quota == "streams" else api
        session_id = (await api.session()).id
        await api.message(session_id)
        other_id = (await api.session()).id
        metadata = [("x-tenant-id", api.tenant)]
        method = "/chat_ticket.v1.ChatSessionService/WatchChatSession"

        async def one_place(of: str = session_id) -> None:
            async def opened() -> None:
                async with open_stream(api, of):
                    with beyond(quota, 1, subject):
                        await sequences(api, of)

            await eventually(opened)

        await one_place()  # which ends as its caller leaves
        await one_place()
        await eventually(lambda: sequences(api, session_id, limit=1))
        await one_place()
        await eventually(lambda: sequences(api, session_id, limit=1))
        for wrong in (an_id(), ""):
            with refused(StatusCode.NOT_FOUND if wrong else StatusCode.INVALID_ARGUMENT):
                await sequences(api, wrong)
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.channel.unary_stream(method)(b"\xff\xff", metadata=metadata).read()
        await one_place()
        await eventually(lambda: sequences(api, session_id, limit=1))
        async with open_stream(api, other_id) as watcher:
            await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=other_id))
            await watcher.end()
        await one_place()

    async def test_reader_that_is_too_slow_gives_its_places_back(
        self, start_server: Any, database: str
    ) -> None:
        """All of them, when the server gives up and not when the caller notices."""
        quotas = {"tenant_streams": 1, "session_streams": 1, "streams": 1}
        api = await start_server(database, quotas=quotas, stream_write_timeout_seconds=0.3)
        session_id = await filled(api, 5000, "x" * 2000)
        slow = api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session_id))
        await slow.read()
        with beyond("tenant_streams", 1, api):
            await sequences(api, session_id)
        await eventually(lambda: sequences(api, session_id, limit=1))
        with refused(StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER"):
            await rest_of(slow)
        await eventually(lambda: sequences(api, session_id, limit=1))


class TestOpenMethods:
    async def test_open_methods_have_an_end_each_and_take_nothing_from_tenants(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """Whoever needs no credential can fill one method's streams, and nothing else."""
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
            streams = [await one_more() for _ in range(UNAUTHENTICATED_STREAMS)]
            with beyond("open_streams", UNAUTHENTICATED_STREAMS, SERVER):
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


class TestStrangers:
    async def test_callers_who_are_not_let_in_take_nothing(
        self, start_server: Any, database: str, tmp_path: Path
    ) -> None:
        """Naming a tenant in vain costs it no turn and no place."""
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
        with beyond("tenant_calls_per_second", 0.1, api):
            await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata)


class TestMemory:
    """Of the counters alone: thousands of calls through a channel would take long."""

    def quotas(self, **limits: float) -> Quotas:
        return Quotas(config.Quotas.model_validate(limits))

    def many(self, quotas: Quotas, count: int = 10 * TENANTS) -> None:
        for n in range(count):
            with quotas.call(f"{an_id()} {n}"):
                pass

    async def test_tenants_that_called_once_are_forgotten(self) -> None:
        """What is remembered does not grow with the number of tenants there have ever been."""
        quotas = self.quotas(tenant_calls_per_second=1_000_000)
        self.many(quotas)
        assert len(quotas._uses) <= 2 * TENANTS

    async def test_tenants_that_use_something_are_not_forgotten(self) -> None:
        """A call or a stream that goes on stays counted, whoever else comes by."""
        quotas = self.quotas(
            tenant_calls_per_second=1_000_000, tenant_calls_in_flight=1, tenant_streams=1
        )
        with quotas.call("calls"), quotas.stream("streams", an_id()):
            self.many(quotas)
            with pytest.raises(QuotaExceededError), quotas.call("calls"):
                pass
            with pytest.raises(QuotaExceededError), quotas.stream("streams", an_id()):
                pass
        self.many(quotas)
        assert not {"calls", "streams"} & quotas._uses.keys()

    async def test_spent_rates_are_not_forgotten(self) -> None:
        """Being forgotten is no way to a new burst."""
        quotas = self.quotas(tenant_calls_per_second=0.1, tenant_burst=1)
        with quotas.call("spent"):
            pass
        self.many(quotas)
        with pytest.raises(QuotaExceededError), quotas.call("spent"):
            pass

    async def test_refused_calls_leave_nothing_to_the_garbage_collector(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """It stops everybody while it looks for what a flood has left."""
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
                while len(aborted()) >= 5:
                    await asyncio.sleep(0.1)
        finally:
            gc.enable()

    async def test_last_call_of_a_method_is_not_kept(self, api: Api) -> None:
        """However long the method is not called again."""
        for _ in range(2):
            with refused(StatusCode.NOT_FOUND):
                await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
        async with asyncio.timeout(10):
            while gc.collect() or aborted():
                await asyncio.sleep(0.1)


class TestSizes:
    """gRPC's own answers, before anything of ours is reached: they carry no details."""

    async def test_message_over_4_mib(self, api: Api) -> None:
        """Is refused unread; one that is just below is only too long for its field."""
        session = await api.session()
        with refused(StatusCode.INVALID_ARGUMENT):
            await api.message(session.id, "x" * (4 * config.MIB - 1000))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.message(session.id, "x" * 4 * config.MIB)
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED
        assert await sequences(api, session.id) == []

    @pytest.mark.parametrize("size", [7000, 9000])
    async def test_metadata_over_8_kib(self, api: Api, size: int) -> None:
        """Is refused, every time; what fits is not."""
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
    async def test_flooding_tenant_is_refused_and_another_goes_on(
        self, start: Callable[..., Awaitable[Api]]
    ) -> None:
        """However fast 30 callers call, they get their rate; what was acknowledged is there."""
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
