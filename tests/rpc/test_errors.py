"""The error table, each row provoked for real. Rows about fields and rules are with their RPCs.

What only a database can say is said by a real database: a trigger raises the SQLSTATE, or the
database is stopped.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import quote, urlencode

import grpc.aio
import psycopg
import pytest
import pytest_asyncio
from grpc import StatusCode
from psycopg.conninfo import conninfo_to_dict
from support.client import Api, a_file, an_id, refused
from support.cluster import Cluster
from support.database import (
    execute,
    raise_on_insert,
    session_locked,
    set_read_only,
    wait_for_lock_waiters,
)
from support.server import serving
from support.sessions import create_session_when_possible

from chat_ticket.v1 import chat_message_pb2_grpc, chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
)
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.rpc.status import STATUS_CODES, status_code


@pytest_asyncio.fixture(scope="module")
async def refusing(cluster: Cluster) -> AsyncIterator[tuple[str, Api]]:
    """A database that is made to refuse sessions, and a client of its server."""
    database = cluster.create()
    async with (
        serving(database) as server,
        Api(f"127.0.0.1:{server.port}", "refused") as api,
    ):
        yield database, api
    cluster.drop(database)


class TestDatabaseErrors:
    @pytest.mark.parametrize(
        ("sqlstate", "code", "reason"),
        [
            ("40001", StatusCode.ABORTED, "CONTENTION"),
            ("40P01", StatusCode.ABORTED, "CONTENTION"),
            ("53100", StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"),
            ("53200", StatusCode.RESOURCE_EXHAUSTED, "DATABASE_RESOURCES"),
            ("57014", StatusCode.UNAVAILABLE, "STATEMENT_CANCELED"),
            ("25006", StatusCode.UNAVAILABLE, "DATABASE_READ_ONLY"),
            ("0A000", StatusCode.UNIMPLEMENTED, "UNSUPPORTED_BY_DATABASE"),
            ("22003", StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
            ("54001", StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        ],
    )
    async def test_sqlstate_becomes_its_status(
        self, refusing: tuple[str, Api], sqlstate: str, code: StatusCode, reason: str
    ) -> None:
        """The caller gets a status and a reason, and no text of the database."""
        database, api = refusing
        raise_on_insert(database, f"RAISE 'CANARY' USING ERRCODE = '{sqlstate}'")
        with refused(code, reason) as refusal:
            await api.session()
        assert "CANARY" not in refusal.text
        retried = (StatusCode.ABORTED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE)
        assert ("RetryInfo" in refusal.details) == (code in retried)

    async def test_conflicts_are_retried_by_the_server(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """The server retries three serialization failures in a row."""
        api = await start_server(fresh_database)
        execute(fresh_database, "CREATE SEQUENCE attempts")
        raise_on_insert(
            fresh_database,
            "IF nextval('attempts') <= 3 THEN RAISE 'x' USING ERRCODE = '40001'; END IF",
        )
        assert (await api.session()).revision == 0

    @pytest.mark.direct("its sessions are read-only until it lets go of them")
    async def test_server_that_takes_no_writes_is_left(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """By all connections: where it was may be another, which takes them."""
        set_read_only(fresh_database, "on")
        api = await start_server(fresh_database)
        for write in (api.message(an_id()), api.session()):
            with refused(StatusCode.UNAVAILABLE, "DATABASE_READ_ONLY"):
                await write
        set_read_only(fresh_database, "off")
        session = await create_session_when_possible(api)
        # One at a time, and by the connection that small ones share. Connections that were made
        # while it took no writes are left by the first that meets one, a second later at most.
        async with asyncio.timeout(15):
            in_a_row = 0
            while in_a_row < 20:
                in_a_row += 1
                try:
                    await api.session()
                    await api.message(session.id)
                except grpc.aio.AioRpcError:
                    in_a_row = 0
                    await asyncio.sleep(0.1)

    @pytest.mark.direct("the hosts are PostgreSQL's")
    async def test_first_server_that_takes_writes_is_used(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Of several hosts: others are passed over, and where there is none it is waited for."""
        to = conninfo_to_dict(fresh_database)
        to |= {"host": f"/nowhere,{to['host']}", "port": f"1,{to.get('port', 5432)}"}
        url = f"postgresql://?{urlencode(to, quote_via=quote)}"
        set_read_only(fresh_database, "on")
        api = await start_server(url)
        with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
            await api.session()
        set_read_only(fresh_database, "off")
        await create_session_when_possible(api)

    async def test_unknown_error_has_only_a_correlation_id(
        self, start_server: Any, fresh_database: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """INTERNAL with a correlation id; the log has the id, the kind and the place."""
        api = await start_server(fresh_database)
        raise_on_insert(fresh_database, "RAISE 'CANARY' USING ERRCODE = 'XX000'")
        with refused(StatusCode.INTERNAL, "INTERNAL") as refusal:
            await api.session()
        correlation_id = refusal.info.metadata["correlation_id"]
        assert refusal.text == f"internal error {correlation_id}"
        assert list(refusal.details) == ["ErrorInfo", "RequestInfo"], "ids alone"
        captured = capsys.readouterr()
        logged = captured.out + captured.err
        assert correlation_id in logged
        assert "XX000" in logged
        assert "sessions.py" in logged
        assert "CANARY" not in logged + refusal.text

    async def test_lock_timeout_is_contention(self, start_server: Any, fresh_database: str) -> None:
        """A call that waits too long for a session fails, and writes nothing."""
        api = await start_server(fresh_database, lock_timeout_ms=100)
        session = await api.session()
        with session_locked(fresh_database, session.id), refused(StatusCode.ABORTED, "CONTENTION"):
            await api.message(session.id)
        assert (await api.message(session.id)).sequence == 1

    @pytest.mark.direct("its sessions' settings are PgBouncer's")
    async def test_statement_timeout_is_the_deadline(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """A statement that runs too long is ended by the database."""
        api = await start_server(fresh_database, statement_timeout_ms=100)
        session = await api.session()
        with (
            session_locked(fresh_database, session.id),
            refused(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        ):
            await api.message(session.id)

    async def test_statement_that_an_operator_cancels_can_be_retried(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """It did not time out, and nothing was written."""
        api = await start_server(fresh_database)
        session = await api.session()
        with session_locked(fresh_database, session.id):
            call = asyncio.create_task(api.message(session.id))
            await wait_for_lock_waiters(fresh_database, 1)
            execute(
                fresh_database,
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'",
            )
            with refused(StatusCode.UNAVAILABLE, "STATEMENT_CANCELED") as refusal:
                await call
        assert "RetryInfo" in refusal.details
        assert (await api.message(session.id)).sequence == 1

    async def test_call_without_a_deadline_gets_one(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """No unary call waits for ever, and the statement it waited for is cancelled."""
        api = await start_server(fresh_database, unary_timeout_seconds=0.2, pool_size=1)
        session = await api.session()
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        with (
            session_locked(fresh_database, session.id),
            refused(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        ):
            await stub.DeleteChatSession(
                DeleteChatSessionRequest(session_id=session.id),
                metadata=[("x-tenant-id", api.tenant)],
            )
        assert (await api.message(session.id)).sequence == 1
        for method in (
            "/chat_ticket.v1.ChatSessionService/GetChatSession",
            "/chat_ticket.v1.ChatSessionService/WatchChatSession",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.channel.stream_unary(method)()  # which never sends its request
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED

    async def test_write_without_enough_time_left_is_not_started(self, api: Api) -> None:
        """With less than 50 ms until the deadline. A read is still started."""
        session = await api.session()
        metadata = [("x-tenant-id", api.tenant)]
        messages = chat_message_pb2_grpc.ChatMessageServiceStub(api.channel)
        message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="too late")
        for _ in range(20):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await messages.CreateChatMessage(
                    CreateChatMessageRequest(session_id=session.id, message=message),
                    metadata=metadata,
                    timeout=0.045,
                )
            assert caught.value.code() is StatusCode.DEADLINE_EXCEEDED
        sessions = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        request = GetChatSessionRequest(session_id=session.id)
        for _ in range(50):  # this machine may be slow for a moment
            with contextlib.suppress(grpc.aio.AioRpcError):
                found = await sessions.GetChatSession(request, metadata=metadata, timeout=0.045)
                break
        assert found.session.revision == 0


class TestCaller:
    async def call(self, api: Api, *metadata: tuple[str, str]) -> None:
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata, timeout=10)

    async def test_missing_tenant_is_unauthenticated(self, api: Api) -> None:
        """A call without a tenant is rejected."""
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await self.call(api)

    @pytest.mark.parametrize("tenant", ["", " ", " a", "a ", "a" * 256])
    async def test_malformed_tenant_is_rejected(self, api: Api, tenant: str) -> None:
        """1 to 255 printable ASCII characters without spaces around them."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await self.call(api, ("x-tenant-id", tenant))
        assert list(refusal.fields) == ["x-tenant-id"]

    async def test_two_tenants_are_rejected(self, api: Api) -> None:
        """A call acts for one."""
        with refused(StatusCode.INVALID_ARGUMENT):
            await self.call(api, ("x-tenant-id", "a"), ("x-tenant-id", "b"))

    async def test_longest_tenant_id(self, server: Any) -> None:
        """255 characters, spaces inside, are a tenant."""
        async with Api(f"127.0.0.1:{server.port}", "a " * 127 + "b") as api:
            assert (await api.session()).tenant_id == api.tenant


class TestWire:
    @pytest.mark.parametrize("streamed", [False, True])
    async def test_bytes_that_are_no_message(self, api: Api, streamed: bool) -> None:
        """INVALID_ARGUMENT, for unary calls and streams, instead of gRPC's own words."""
        metadata = [("x-tenant-id", api.tenant)]
        if streamed:
            method = "/chat_ticket.v1.ChatSessionService/WatchChatSession"
            call = api.channel.unary_stream(method)(b"\xff\xff", metadata=metadata).read()
        else:
            method = "/chat_ticket.v1.ChatSessionService/GetChatSession"
            call = api.channel.unary_unary(method)(b"\xff\xff", metadata=metadata)
        with refused(StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT") as refusal:
            await call
        assert refusal.text == "malformed request: not the request message of this method"

    async def test_invalid_utf8_is_rejected(self, api: Api) -> None:
        """A string of invalid UTF-8 is rejected."""
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"
        call = api.channel.unary_unary(method)(b"\x0a\x02\xc3\x28", metadata=[("x-tenant-id", "a")])
        with refused(StatusCode.INVALID_ARGUMENT):
            await call

    async def test_unknown_method_is_unimplemented(self, api: Api) -> None:
        """gRPC's own answer."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/Nope")(b"")
        assert caught.value.code() is StatusCode.UNIMPLEMENTED

    async def test_request_over_4_mib_is_rejected(self, api: Api) -> None:
        """gRPC's own answer, before anything is parsed."""
        session = await api.session()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.message(session.id, "x" * 4 * 1024 * 1024)
        assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED


class TestTable:
    def test_every_domain_error_has_a_status(self) -> None:
        """The table is complete, and no row is shadowed by one above it."""

        def kinds(kind: type[DomainError]) -> Iterator[type[DomainError]]:
            for child in kind.__subclasses__():
                yield child
                yield from kinds(child)

        for kind in kinds(DomainError):
            assert status_code(kind.__new__(kind)) in StatusCode
        listed = [kind for kind, _ in STATUS_CODES]
        for index, kind in enumerate(listed):
            assert not any(issubclass(kind, earlier) for earlier in listed[:index])

    async def test_a_client_that_leaves_stops_the_work(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Cancelling a call cancels its statement: the lock queue is left at once."""
        api = await start_server(fresh_database)
        session = await api.session()
        with psycopg.connect(fresh_database, autocommit=True) as watch:

            def waiting() -> int:
                row = watch.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                ).fetchone()
                return row[0] if row else 0

            async def until(count: int) -> None:
                end = time.monotonic() + 10
                while waiting() != count:
                    assert time.monotonic() < end
                    await asyncio.sleep(0.02)

            with session_locked(fresh_database, session.id):
                call = asyncio.create_task(api.message(session.id, attachments=[a_file()]))
                await until(1)
                call.cancel()
                await until(0)
        assert (await api.message(session.id)).sequence == 1
