"""The server process: settings, start, stop, health, and its error messages."""

import asyncio
import itertools
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.client import Api, refused
from support.process import is_postgres_running, run_command, server_process
from support.server import serving
from support.sessions import create_session_at, list_sessions_at
from support.watching import watching

from chat_ticket_svc import config
from chat_ticket_svc.commands.serve import EVENT_ENGINE_READS
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.embedded import EmbeddedPostgres
from chat_ticket_svc.rpc import aio_server
from chat_ticket_svc.server import SERVICES, run

ROOT = Path(__file__).parents[2]


class TestSettings:
    def test_all_wrong_settings_are_reported_at_once_without_values(self) -> None:
        """One line each, by the name of the variable; a value could be a secret."""
        result = run_command(
            "serve",
            CHAT_TICKET_PORT="CANARY",
            CHAT_TICKET_POOL_SIZE="0",
            CHAT_TICKET_ATTACHMENT_URL_SCHEMES="ftp",
            CHAT_TICKET_LIMITS__TITLE="CANARY",
        )
        assert result.returncode != 0
        for name in ("PORT", "POOL_SIZE", "ATTACHMENT_URL_SCHEMES", "LIMITS__TITLE"):
            assert f"CHAT_TICKET_{name}" in result.stderr
        assert "CANARY" not in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("name", ["serve", "migrate", "migrate-status"])
    def test_database_is_required(self, name: str) -> None:
        """The error names the missing variable."""
        result = run_command(name)
        assert result.returncode != 0
        assert "DATABASE_URL" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.parametrize("url", ["host=localhost dbname=x", "mysql://x", "CANARY"])
    def test_database_is_named_by_a_url(self, url: str) -> None:
        """In the one form that the service and dbmate both take."""
        with pytest.raises(ConfigurationError) as caught:
            config.load(DATABASE_URL=url)
        assert str(caught.value) == "DATABASE_URL: must be a postgresql:// URL"

    @pytest.mark.parametrize("hosts", ["CANARY:1,other:2/x", "/x?host=CANARY,other&port=1,2"])
    def test_migrations_need_one_host(self, hosts: str) -> None:
        """A URL with several hosts does not tell the primary from the standbys."""
        url = f"postgresql://u@{hosts}"
        for variable, why in (
            ("DATABASE_URL", "required"),
            ("MIGRATE_DATABASE_URL", "single host"),
        ):
            result = run_command("migrate", **{variable: url})
            assert result.returncode != 0
            assert re.search(f"chat-ticket-svc: MIGRATE_DATABASE_URL: .*{why}", result.stderr)
            assert "CANARY" not in result.stderr

    def test_bad_allowed_hosts_are_rejected(self, database: str) -> None:
        """An entry that could never work is a mistake, not a silent nothing."""
        result = run_command(
            "serve", DATABASE_URL=database, CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS="a b,x:99999"
        )
        assert result.returncode != 0
        assert "CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS" in result.stderr
        assert "Traceback" not in result.stderr

    def test_lists_and_limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lists are separated by commas; limits are nested by two underscores."""
        monkeypatch.setenv("CHAT_TICKET_ATTACHMENT_URL_SCHEMES", "https, http")
        monkeypatch.setenv("CHAT_TICKET_LIMITS__TITLE", "7")
        settings = config.load()
        assert settings.attachment_url_schemes == ("https", "http")
        assert settings.limits.title == 7
        assert settings.limits.query == 1000


class TestProcess:
    def test_port_in_use_is_reported_clearly(self, database: str) -> None:
        """In one line. That two servers never share a port is in test_worker_port.py."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = listener.getsockname()[1]
            result = run_command("serve", "--port", str(port), DATABASE_URL=database)
        assert result.returncode != 0
        assert f"127.0.0.1:{port}" in result.stderr
        assert "the port is in use" in result.stderr
        assert result.stderr.count("\n") == 1, "no line of gRPC's own"

    def test_every_log_line_has_one_form(self) -> None:
        """Every line is JSON, also the lines of libraries about an unreachable database.

        One says that gRPC's EventEngine reads the connections, as the operator wants it.
        """
        with server_process(
            "postgresql://nobody@127.0.0.1:1/none", GRPC_EXPERIMENTS="event_engine_listener"
        ) as process:
            process.wait_for("listening")
            process.wait_for("not serving")
            process.wait_for("listener cannot connect")
            time.sleep(2.5)  # two more attempts of each connection
            assert process.stop() == 0
        of_pool = {line["event"] for line in process.log if line.get("logger") == "psycopg.pool"}
        assert (
            "error connecting in the pool: connection refused: nothing listens at the host and port"
            in of_pool
        )
        assert all("level" in line and "timestamp" in line for line in process.log)
        events = Counter(line["event"] for line in process.log)
        assert max(events.values()) == 1, "a failure that goes on is logged once"
        assert EVENT_ENGINE_READS in events
        assert "listener lost its connection" not in events, "it had none"

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_signal_drains(self, database: str, tenant: str, number: int) -> None:
        """The watch ends with DRAINING, a call in flight is answered, the exit status is 0.

        SIGHUP before it changes nothing: it asks others to read their files again.
        """
        with server_process(database) as process:
            async with Api(process.address, tenant) as api:
                process.popen.send_signal(signal.SIGHUP)
                session = await api.session()
                async with watching(api, session.id) as watcher:
                    await watcher.until("caught_up")
                    with psycopg.connect(database) as connection:
                        connection.execute(
                            "SELECT FROM chat_sessions WHERE id = %s FOR UPDATE", [session.id]
                        )
                        writing = asyncio.create_task(api.message(session.id))
                        await asyncio.sleep(0.2)
                        process.popen.send_signal(number)
                        with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                            await watcher.next()
                    assert (await writing).sequence == 1
            assert await asyncio.to_thread(process.stop) == 0
        assert EVENT_ENGINE_READS not in {line["event"] for line in process.log}

    async def test_calls_during_the_drain_are_answered(self, database: str, tenant: str) -> None:
        """Callers who call again at once lose no call: each is answered, until nothing listens."""

        async def call_until_nothing_listens(server: Any) -> int:
            async with Api(f"127.0.0.1:{server.port}", tenant) as api:
                for answered in itertools.count():
                    try:
                        await api.session()
                    except grpc.aio.AioRpcError as error:
                        assert error.code() is StatusCode.UNAVAILABLE
                        assert "failed to connect" in (error.details() or "")
                        return answered
            raise AssertionError

        async with serving(database, drain_seconds=5) as server:
            callers = [asyncio.create_task(call_until_nothing_listens(server)) for _ in range(16)]
            await asyncio.sleep(0.2)
        assert min(await asyncio.gather(*callers)) > 1

    async def test_new_watcher_during_the_drain(self, database: str, tenant: str) -> None:
        """It ends with DRAINING, as documented, and can resume on another server."""
        async with (
            serving(database, drain_seconds=5) as server,
            Api(f"127.0.0.1:{server.port}", tenant) as api,
        ):
            session = await api.session()
            stopping = asyncio.create_task(server.stop())
            with refused(StatusCode.UNAVAILABLE, "DRAINING") as refusal:
                async with watching(api, session.id) as watcher:
                    while True:
                        await watcher.next()
            assert "RetryInfo" in refusal.details
            await stopping

    async def test_health_of_every_service(self, api: Api) -> None:
        """The standard health service answers for the server and each service."""
        for name in ("", *SERVICES):
            async with asyncio.timeout(10):
                while True:
                    request = health_pb2.HealthCheckRequest(service=name)
                    if (await api.health.Check(request)).status == 1:
                        break
                    await asyncio.sleep(0.1)

    async def test_health_can_be_watched(self, api: Api) -> None:
        """The health service's own stream passes through our interceptor."""
        stub = health_pb2_grpc.HealthStub(api.channel)
        call = stub.Watch(health_pb2.HealthCheckRequest(), timeout=10)
        assert (await call.read()).status in (1, 2)
        call.cancel()

    async def test_plain_synchronous_client(self, api: Api) -> None:
        """The generated stubs work without asyncio."""
        before = len(await asyncio.to_thread(list_sessions_at, api.address))
        await asyncio.to_thread(create_session_at, api.address)
        assert len(await asyncio.to_thread(list_sessions_at, api.address)) == before + 1


class TestEmbedded:
    def test_starts_on_a_new_directory_and_on_an_old_one(self, directory: Path) -> None:
        """An empty directory becomes a migrated database; the next start uses its data."""
        data = str(directory / "a b" / "data")
        for expected in (0, 1):
            with server_process("", "--embedded", data) as process:
                process.wait_for("serving")
                create_session_at(process.address)
                count = len(list_sessions_at(process.address))
                assert count == expected + 1
                assert process.stop() == 0

    def test_killed_server_leaves_no_postgres_and_starts_again(self, served_data: Path) -> None:
        """SIGKILL of the server ends its PostgreSQL; what was acknowledged is there afterwards."""
        with server_process("", "--embedded", str(served_data)) as process:
            process.wait_for("serving")
            create_session_at(process.address)
            postmaster = int((served_data / "postmaster.pid").read_text().split()[0])
            process.stop(signal.SIGKILL)
        with server_process("", "--embedded", str(served_data)) as process:
            process.wait_for("serving")
            assert len(list_sessions_at(process.address)) == 1
            assert not is_postgres_running(postmaster, served_data)

    def test_ends_with_its_terminal(self, served_data: Path) -> None:
        """In order, and PostgreSQL with it; unless it was started by nohup."""
        handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
        try:
            with server_process("", "--embedded", str(served_data)) as process:
                process.wait_for("serving")
                pid = int((served_data / "postmaster.pid").read_text().split()[0])
                assert process.stop(signal.SIGHUP) == 0
                assert not is_postgres_running(pid, served_data)
                assert any(line["event"] == "draining" for line in process.log)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            with server_process("", "--embedded", str(served_data)) as process:
                process.wait_for("serving")
                process.popen.send_signal(signal.SIGHUP)
                time.sleep(0.2)
                create_session_at(process.address)
        finally:
            signal.signal(signal.SIGHUP, handler)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signal_while_it_starts_ends_postgres_too(self, directory: Path, number: int) -> None:
        """A signal at any time leaves no process and no socket directory."""
        data = directory / "data"
        with server_process("", "--embedded", str(data)) as process:
            pid_file = data / "postmaster.pid"
            end = time.monotonic() + 30
            while not (pid_file.exists() and pid_file.read_text()):
                assert time.monotonic() < end
                time.sleep(0.005)
            pid = int(pid_file.read_text().split()[0])
            assert process.stop(number) == 0
            assert not is_postgres_running(pid, data)
            sockets = re.findall("host=([^&]*)", EmbeddedPostgres(data).url("x"))
            assert [path for path in sockets if Path(path).exists()] == []

    def test_second_server_on_the_directory_is_rejected(self, served_data: Path) -> None:
        """The error names the directory, and the first server continues."""
        with server_process("", "--embedded", str(served_data)) as process:
            process.wait_for("serving")
            result = run_command("serve", "--port", "0", "--embedded", str(served_data))
            assert result.returncode != 0
            assert str(served_data) in result.stderr
            assert "Traceback" not in result.stderr
            create_session_at(process.address)


class TestCrash:
    async def test_process_does_not_outlive_its_server(
        self, database: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A defect that ends gRPC's server ends the process, whose supervisor starts another."""

        async def crash(_: object) -> None:
            raise ArithmeticError

        monkeypatch.setattr(aio_server._AioServer, "_reject_unknown_methods", crash)
        settings = config.load(DATABASE_URL=database, port=0, drain_seconds=0)
        with pytest.raises(ArithmeticError):
            async with asyncio.timeout(20):
                await run(settings, asyncio.Event(), lambda _: None)
