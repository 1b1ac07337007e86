"""The error table, each row provoked for real. Rows about fields and rules are with their RPCs.

What only a database can say is said by a real database: a trigger raises the SQLSTATE, or the
database is stopped.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from psycopg.conninfo import conninfo_to_dict
from support.client import Api, a_file, an_id, refused

from chat_ticket.v1 import chat_message_pb2_grpc, chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
    ListChatMessagesRequest,
    SearchChatMessagesRequest,
)
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
)
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.rpc.status import STATUS_CODES, status_code


def execute(database_url: str, *statements: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]


def raise_on_insert(database_url: str, raised: str, *, table: str = "chat_sessions") -> None:
    """Make every new session, or row of another table, run `raised` in the database."""
    execute(
        database_url,
        "CREATE OR REPLACE FUNCTION sabotage() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN {raised}; RETURN NEW; END $$",
        f"CREATE OR REPLACE TRIGGER sabotage BEFORE INSERT ON {table}"
        " FOR EACH ROW EXECUTE FUNCTION sabotage()",
    )


@contextmanager
def locked(database_url: str, session_id: str) -> Iterator[None]:
    """Hold the row lock of a session, as a slow writer would."""
    with psycopg.connect(database_url) as connection:
        connection.execute("SELECT FROM chat_sessions WHERE id = %s FOR UPDATE", [session_id])
        yield


def set_read_only(database_url: str, setting: str) -> None:
    """As a standby is, for sessions to come."""
    execute(
        database_url,
        "SET default_transaction_read_only = off",
        f"ALTER DATABASE {urlsplit(database_url).path[1:]}"
        f" SET default_transaction_read_only = {setting}",
    )


async def session_soon(api: Api) -> r.ChatSession:
    """A session, as soon as one can be created."""
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await api.session()
            await asyncio.sleep(0.1)


class TestDatabaseErrors:
    @pytest.mark.parametrize(
        ("sqlstate", "code", "reason"),
        [
            ("40001", StatusCode.ABORTED, "CONTENTION"),
            ("40P01", StatusCode.ABORTED, "CONTENTION"),
            ("53100", StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"),
            ("53200", StatusCode.RESOURCE_EXHAUSTED, "DATABASE_RESOURCES"),
            ("57014", StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
            ("25006", StatusCode.UNAVAILABLE, "DATABASE_READ_ONLY"),
            ("0A000", StatusCode.UNIMPLEMENTED, "UNSUPPORTED_BY_DATABASE"),
            ("22003", StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
            ("54001", StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
        ],
    )
    async def test_sqlstate_becomes_its_status(
        self, start_server: Any, fresh_database: str, sqlstate: str, code: StatusCode, reason: str
    ) -> None:
        """What the database says is told in the caller's words, without its text."""
        api = await start_server(fresh_database)
        raise_on_insert(fresh_database, f"RAISE 'CANARY' USING ERRCODE = '{sqlstate}'")
        with refused(code, reason) as refusal:
            await api.session()
        assert "CANARY" not in refusal.text
        retried = (StatusCode.ABORTED, StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE)
        assert ("RetryInfo" in refusal.details) == (code in retried)

    async def test_conflicts_are_retried_before_the_caller_hears(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Three serialization failures in a row are ours to deal with."""
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
        session = await session_soon(api)
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
        await session_soon(api)

    async def test_unknown_error_tells_nothing_but_an_id(
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
        """Who waits too long for a session gives up, and nothing is written."""
        api = await start_server(fresh_database, lock_timeout_ms=100)
        session = await api.session()
        with locked(fresh_database, session.id), refused(StatusCode.ABORTED, "CONTENTION"):
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
            locked(fresh_database, session.id),
            refused(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        ):
            await api.message(session.id)

    async def test_call_without_a_deadline_gets_one(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """No unary call waits for ever, and the statement it waited for is cancelled."""
        api = await start_server(fresh_database, unary_timeout_seconds=0.2, pool_size=1)
        session = await api.session()
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        with (
            locked(fresh_database, session.id),
            refused(StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
        ):
            await stub.DeleteChatSession(
                DeleteChatSessionRequest(session_id=session.id),
                metadata=[("x-tenant-id", api.tenant)],
            )
        assert (await api.message(session.id)).sequence == 1

    async def test_write_that_nobody_would_hear_of_is_not_begun(self, api: Api) -> None:
        """With less than 50 ms left; a read is tried all the same."""
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


class TestDatabaseAway:
    @pytest.fixture
    def postgres(self, tmp_path: Path) -> Iterator[EmbeddedPostgres]:
        """A PostgreSQL that the test may stop."""
        from chat_ticket_svc.commands import migrate

        with EmbeddedPostgres(tmp_path / "data", durable=False) as postgres:
            assert migrate.up(postgres.url("chat_ticket"), quiet=True) == 0
            yield postgres

    async def health(self, api: Api) -> int:
        from grpc_health.v1.health_pb2 import HealthCheckRequest

        return (await api.health.Check(HealthCheckRequest())).status  # type: ignore[no-any-return]

    async def until_health(self, api: Api, status: int) -> None:
        async with asyncio.timeout(15):
            while await self.health(api) != status:
                await asyncio.sleep(0.1)

    async def test_every_call_is_unavailable_and_comes_back(
        self, start_server: Any, postgres: EmbeddedPostgres
    ) -> None:
        """Unary calls and streams say UNAVAILABLE; health follows; nobody has to restart us."""
        api = await start_server(postgres.url("chat_ticket"))
        session = await api.session()
        await self.until_health(api, 1)
        postgres.stop()
        calls = (
            api.sessions.GetChatSession(GetChatSessionRequest(session_id=session.id)),
            api.sessions.ListChatSessions(ListChatSessionsRequest()),
            api.messages.SearchChatMessages(SearchChatMessagesRequest(query="x")),
            api.messages.ListChatMessages(ListChatMessagesRequest(session_id=session.id)).read(),
        )
        for call in calls:
            with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE") as refusal:
                await call
            assert "RetryInfo" in refusal.details
        with refused(StatusCode.UNAVAILABLE):
            await api.message(session.id)
        await self.until_health(api, 2)
        postgres.start()
        await self.until_health(api, 1)
        assert (await api.message(session.id)).sequence == 1

    async def test_restart_is_survived_without_an_error(
        self, start_server: Any, postgres: EmbeddedPostgres
    ) -> None:
        """Dead connections are replaced once and the call repeated: reads and creates succeed."""
        api = await start_server(postgres.url("chat_ticket"))
        session = await api.session()
        await asyncio.gather(*(api.message(session.id) for _ in range(20)))
        postgres.stop()
        postgres.start()
        request = GetChatSessionRequest(session_id=session.id)
        answers = await asyncio.gather(
            *(api.sessions.GetChatSession(request) for _ in range(10)),
            *(api.message(session.id) for _ in range(10)),
        )
        assert answers[0].session.id == session.id
        sequences = sorted(message.sequence for message in answers[10:])
        assert sequences == list(range(21, 31)), "each created once"

    async def test_starts_without_a_database(
        self, start_server: Any, postgres: EmbeddedPostgres
    ) -> None:
        """The server starts, says NOT_SERVING, and serves when the database is there."""
        postgres.stop()
        api = await start_server(postgres.url("chat_ticket"))
        assert await self.health(api) == 2
        postgres.start()
        await self.until_health(api, 1)
        assert (await api.session()).revision == 0

    async def test_connection_lost_in_a_write_is_an_unknown_outcome(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """A delete that may have happened says so; a create is repeated by its id instead."""
        api = await start_server(fresh_database, pool_size=2)
        session = await api.session()
        execute(
            fresh_database,
            "CREATE FUNCTION hang_up() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER hang_up AFTER DELETE ON chat_sessions"
            " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION hang_up()",
        )
        with refused(StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN") as refusal:
            request = DeleteChatSessionRequest(session_id=session.id)
            await api.sessions.DeleteChatSession(request)
        assert "RetryInfo" in refusal.details
        execute(fresh_database, "CREATE SEQUENCE attempts")
        raise_on_insert(
            fresh_database,
            "IF nextval('attempts') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid());"
            " END IF",
        )
        session_id = an_id()
        assert (await api.session(id=session_id)).id == session_id

    async def test_full_queue_is_refused_at_once(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Beyond the calls that may wait for a connection, the next is RESOURCE_EXHAUSTED."""
        api = await start_server(fresh_database, pool_size=1)
        session = await api.session()
        with locked(fresh_database, session.id):
            calls = [asyncio.create_task(api.message(session.id)) for _ in range(8)]
            done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            for call in done:
                with refused(StatusCode.RESOURCE_EXHAUSTED, "POOL_QUEUE_FULL") as refusal:
                    await call
                assert "RetryInfo" in refusal.details
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        stored = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert sorted(message.sequence for message in stored) == list(range(1, len(stored) + 1))

    async def test_callers_who_left_do_not_fill_the_queue(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """Only those who still wait count."""
        api = await start_server(fresh_database, pool_size=1)
        session = await api.session()
        request = ListChatSessionsRequest()
        with locked(fresh_database, session.id):
            writing = asyncio.create_task(api.message(session.id))
            await asyncio.sleep(0.2)
            waiting = [
                asyncio.ensure_future(api.sessions.ListChatSessions(request)) for _ in range(4)
            ]
            await asyncio.sleep(0.2)
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await asyncio.sleep(0.2)
            last = asyncio.ensure_future(api.sessions.ListChatSessions(request))
            await asyncio.sleep(0.2)
            assert not last.done(), "refused though nobody else waits"
        assert [found.id for found in (await last).sessions] == [session.id]
        assert (await writing).sequence == 1

    async def test_searches_leave_connections_to_others(
        self, start_server: Any, fresh_database: str
    ) -> None:
        """However many searches run, another tenant's calls are answered."""
        api = await start_server(fresh_database, pool_size=3)
        session = await api.session()
        with psycopg.connect(fresh_database) as connection:
            connection.execute("LOCK TABLE chat_messages IN ACCESS EXCLUSIVE MODE")
            searches = [
                asyncio.ensure_future(
                    api.messages.SearchChatMessages(SearchChatMessagesRequest(query="x"))
                )
                for _ in range(6)
            ]
            await asyncio.sleep(0.3)
            request = GetChatSessionRequest(session_id=session.id)
            assert (await api.sessions.GetChatSession(request)).session.id == session.id
        await asyncio.gather(*searches)

    async def test_clients_that_leave_are_no_errors(
        self, api: Api, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """A stream that is cancelled while it is written to is not an internal error."""
        from test_list_messages import filled

        session_id = await filled(api, 2000, "x" * 500)
        request = ListChatMessagesRequest(session_id=session_id)
        for n in range(150):
            call = api.messages.ListChatMessages(request)
            await asyncio.sleep(0.0004 * (n % 50))
            call.cancel()
        await api.session()
        captured = capsys.readouterr()
        assert "internal error" not in captured.out + captured.err


class TestCaller:
    async def call(self, api: Api, *metadata: tuple[str, str]) -> None:
        stub = chat_session_pb2_grpc.ChatSessionServiceStub(api.channel)
        await stub.ListChatSessions(ListChatSessionsRequest(), metadata=metadata, timeout=10)

    async def test_missing_tenant_is_unauthenticated(self, api: Api) -> None:
        """Nobody is served who does not say for whom."""
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await self.call(api)

    @pytest.mark.parametrize("tenant", ["", " ", " a", "a ", "a" * 256])
    async def test_malformed_tenant_is_refused(self, api: Api, tenant: str) -> None:
        """1 to 255 printable ASCII characters without spaces around them."""
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await self.call(api, ("x-tenant-id", tenant))
        assert list(refusal.fields) == ["x-tenant-id"]

    async def test_two_tenants_are_refused(self, api: Api) -> None:
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

    async def test_invalid_utf8_is_refused(self, api: Api) -> None:
        """A string that is no UTF-8 never becomes text."""
        method = "/chat_ticket.v1.ChatSessionService/GetChatSession"
        call = api.channel.unary_unary(method)(b"\x0a\x02\xc3\x28", metadata=[("x-tenant-id", "a")])
        with refused(StatusCode.INVALID_ARGUMENT):
            await call

    async def test_unknown_method_is_unimplemented(self, api: Api) -> None:
        """gRPC's own answer."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.channel.unary_unary("/chat_ticket.v1.ChatSessionService/Nope")(b"")
        assert caught.value.code() is StatusCode.UNIMPLEMENTED

    async def test_request_over_4_mib_is_refused(self, api: Api) -> None:
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

            with locked(fresh_database, session.id):
                call = asyncio.create_task(api.message(session.id, attachments=[a_file()]))
                await until(1)
                call.cancel()
                await until(0)
        assert (await api.message(session.id)).sequence == 1
