"""`serve --workers N`: several processes, one server to its callers and to its operator."""

import asyncio
import contextlib
import itertools
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import psycopg
import pytest
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.cluster import Cluster
from support.process import ServerProcess, is_postgres_running, run_command, server_process
from support.sessions import create_session_at, list_sessions_at
from support.watching import watching
from support.worker_processes import pids, printed, two_workers, unable_to_spawn, wait_until

from chat_ticket_svc import config, workers
from chat_ticket_svc.commands.serve import EVENT_ENGINE_READS
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.embedded import EmbeddedPostgres

ESTABLISHED = "01"
ADDED_BY = "SELECT version FROM schema_migrations ORDER BY version DESC LIMIT 1"


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and bool(cmdline(pid))


def cmdline(pid: int) -> bytes:
    """Nothing, of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def connections(pid: int, port: int) -> int:
    """How many of a process are connected to its port."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
    count = 0
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            here = int(local.rpartition(":")[2], 16) == port
            count += here and state == ESTABLISHED and inode in inodes
    return count


async def client_of(process: ServerProcess, pid: int, tenant: str) -> Api:
    """A client whose connection is to this worker."""
    port = process.wait_for("listening")["port"]
    for _ in range(100):
        before = connections(pid, port)
        # Otherwise all clients of a process share one connection.
        options = [("grpc.use_local_subchannel_pool", 1)]
        api = Api(process.address, tenant, options=options)
        with contextlib.suppress(grpc.aio.AioRpcError):  # of one that has just been killed
            await api.session()
        if connections(pid, port) > before:
            return api
        await api.channel.close()
    raise AssertionError(f"no connection to {pid}")


@pytest.fixture(scope="module")
def two(database: str) -> Iterator[tuple[ServerProcess, list[int]]]:
    """A server of two workers that never poll, and their process ids."""
    with two_workers(database, CHAT_TICKET_WATCH_POLL_INTERVAL_SECONDS="600") as two:
        yield two


class TestTwo:
    async def test_both_deliver_each_others_writes(
        self, two: tuple[ServerProcess, list[int]], tenant: str
    ) -> None:
        """What is written through one is delivered by the other at once, both ways.

        The log says which is which. Neither is the process that was started.
        """
        process, both = two
        assert len({process.popen.pid, *both}) == 3
        async with contextlib.AsyncExitStack() as stack:
            apis = [
                await stack.enter_async_context(await client_of(process, pid, tenant))
                for pid in both
            ]
            for writer, reader in itertools.permutations(apis):
                session = await writer.session()
                async with watching(reader, session.id) as watcher:
                    await watcher.until("caught_up")
                    message = await writer.message(session.id)
                    event = await watcher.next(timeout=5)
                    assert list(event.messages_created.messages) == [message]

    def test_parent_is_no_server(self, two: tuple[ServerProcess, list[int]]) -> None:
        """It has nothing of gRPC; and Ctrl-C reaches it alone, which drains its workers."""
        process, both = two
        loaded = [
            "cygrpc" in Path(f"/proc/{pid}/maps").read_text() for pid in (process.popen.pid, *both)
        ]
        assert loaded == [False, True, True]
        assert [os.getpgid(pid) for pid in both] == both

    def test_every_log_line_names_its_process(self) -> None:
        """Every line has the same form, also the lines of libraries."""
        with server_process("postgresql://nobody@127.0.0.1:1/none", "--workers", "2") as process:
            both = pids(process, 2)
            process.wait_for_all("not serving", 2)
            assert process.stop() == 0
        assert any(line.get("logger") == "psycopg.pool" for line in process.log)
        assert all({"level", "timestamp", "pid"} <= line.keys() for line in process.log)
        assert {line["pid"] for line in process.log} == set(both)
        assert EVENT_ENGINE_READS not in {line["event"] for line in process.log}

    def test_one_is_the_process_that_was_started(self, database: str) -> None:
        """Without workers there is no parent, and the log is as it was."""
        with server_process(database, "--workers", "1") as process:
            process.wait_for("serving")
            pid = process.popen.pid
            assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""
            assert process.stop() == 0
        assert all("pid" not in line for line in process.log)

    def test_worker_does_not_run_without_its_parent(self, database: str) -> None:
        """One that is started by hand, or too late, does not serve."""
        result = run_command("worker", "1", "0", DATABASE_URL=database)
        assert result.returncode != 0
        assert result.stderr == "the parent process has already ended\n"


class TestDeath:
    async def test_killed_worker_is_replaced_and_calls_continue(
        self, database: str, tenant: str
    ) -> None:
        """Callers of the other one notice nothing; its own connect again."""
        with two_workers(database) as (process, [killed, other]):
            async with (
                await client_of(process, killed, tenant) as unlucky,
                await client_of(process, other, tenant) as lucky,
            ):
                session = await lucky.session()
                os.kill(killed, signal.SIGKILL)
                exited = await asyncio.to_thread(process.wait_for, "worker exited")
                assert (exited["worker"], exited["status"]) == (killed, 128 + signal.SIGKILL)
                replacing = asyncio.create_task(asyncio.to_thread(pids, process, 3))
                while not replacing.done():
                    await lucky.message(session.id)
                with contextlib.suppress(grpc.aio.AioRpcError):  # that the connection is gone
                    await unlucky.message(session.id)
                await unlucky.message(session.id)
                *before, replacement = await replacing
                assert replacement not in before
                async with await client_of(process, replacement, tenant) as newest:
                    await newest.message(session.id)
                assert process.stop() == 0

    async def test_worker_that_cannot_start_is_tried_again_later_and_later(
        self, fresh_database: str, tenant: str
    ) -> None:
        """What would have kept the server from starting does not end one that serves."""
        with (
            two_workers(fresh_database) as (process, [killed, other]),
            psycopg.connect(fresh_database, autocommit=True) as connection,
        ):
            [version] = connection.execute(ADDED_BY).fetchone() or []
            connection.execute("DELETE FROM schema_migrations WHERE version = %s", [version])
            os.kill(killed, signal.SIGKILL)
            async with await client_of(process, other, tenant) as api:
                waited = asyncio.to_thread(process.wait_for_all, "worker exited", 3)
                ends = await waited
                assert [line["restart_in_seconds"] for line in ends] == [0.5, 1, 2]
                assert [line["status"] for line in ends] == [128 + signal.SIGKILL, 1, 1]
                await api.session()
            connection.execute("INSERT INTO schema_migrations VALUES (%s)", [version])
            assert pids(process, 3)[2] not in (killed, other)
            assert process.stop() == 0

    def test_exited_worker_is_replaced_once_that_is_possible(self, database: str) -> None:
        """SIGTERM drains one worker. A parent that cannot spawn its replacement tries again."""
        with two_workers(database) as (process, [exited, other]):
            with unable_to_spawn(process):
                os.kill(exited, signal.SIGTERM)
                first, *_, last = process.wait_for_all("worker exited", 3)
                assert (first["worker"], first["status"]) == (exited, 0)
                assert last["error"] == "OSError"
            assert pids(process, 3)[2] not in (exited, other)
            assert is_alive(other)

    def test_killed_parent_leaves_nothing(self, served_data: Path) -> None:
        """No worker, no PostgreSQL, no taken port; what was acknowledged is there afterwards."""
        arguments = ("--embedded", str(served_data))
        with two_workers("", *arguments) as (process, both):
            process.wait_for("serving")
            port = process.wait_for("listening")["port"]
            create_session_at(process.address)
            postmaster = int((served_data / "postmaster.pid").read_text().split()[0])
            process.stop(signal.SIGKILL)
            wait_until(lambda: not any(map(is_alive, both)))
            wait_until(lambda: not is_postgres_running(postmaster, served_data))
        with two_workers("", *arguments, CHAT_TICKET_PORT=str(port)) as (process, _):
            process.wait_for("serving")
            assert len(list_sessions_at(process.address)) == 1


class TestDrain:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    async def test_signal_drains_both(self, database: str, tenant: str, number: int) -> None:
        """Watches end with DRAINING, calls in flight are answered, the exit status is 0.

        SIGHUP before it changes nothing: it asks others to read their files again.
        """
        with two_workers(database) as (process, both):
            process.popen.send_signal(signal.SIGHUP)
            async with contextlib.AsyncExitStack() as stack:
                apis = [
                    await stack.enter_async_context(await client_of(process, pid, tenant))
                    for pid in both
                ]
                session = await apis[0].session()
                watchers = [
                    await stack.enter_async_context(watching(api, session.id)) for api in apis
                ]
                for watcher in watchers:
                    await watcher.until("caught_up")
                with psycopg.connect(database) as connection:
                    connection.execute(
                        "SELECT FROM chat_sessions WHERE id = %s FOR UPDATE", [session.id]
                    )
                    writing = [asyncio.create_task(api.message(session.id)) for api in apis]
                    await asyncio.sleep(0.2)
                    process.popen.send_signal(number)
                    for watcher in watchers:
                        with refused(StatusCode.UNAVAILABLE, "DRAINING"):
                            await watcher.next()
                    assert process.popen.poll() is None, "the parent waits for its workers"
                assert sorted([(await written).sequence for written in writing]) == [1, 2]
            assert await asyncio.to_thread(process.stop) == 0
            assert not any(map(is_alive, both))

    async def test_load_loses_nothing(self, database: str, tenant: str) -> None:
        """Each call is answered or rejected as retryable. What was answered is stored."""
        answered: list[str] = []
        with two_workers(database) as (process, both):
            async with contextlib.AsyncExitStack() as stack:
                apis = [
                    await stack.enter_async_context(await client_of(process, pid, tenant))
                    for pid in both * 2
                ]
                session_ids = [(await apis[0].session()).id for _ in range(16)]

                async def write(api: Api, session_id: str) -> StatusCode:
                    while True:
                        message_id = an_id()
                        try:
                            await api.message(session_id, id=message_id)
                        except grpc.aio.AioRpcError as error:
                            return error.code()
                        answered.append(message_id)

                writing = [
                    asyncio.create_task(write(api, session_id))
                    for api, session_id in zip(itertools.cycle(apis), session_ids, strict=False)
                ]
                await asyncio.sleep(1)
                process.popen.send_signal(signal.SIGTERM)
                assert set(await asyncio.gather(*writing)) == {StatusCode.UNAVAILABLE}
            assert await asyncio.to_thread(process.stop) == 0
        assert not any(line["event"] == "worker exited" for line in process.log)
        with psycopg.connect(database) as connection:
            rows = connection.execute(
                "SELECT id::text FROM chat_messages WHERE tenant_id = %s", [tenant]
            )
            stored = {message_id for (message_id,) in rows}
        assert answered
        assert set(answered) <= stored

    def test_embedded_postgres_ends_last(self, served_data: Path) -> None:
        """No worker loses its database while it drains; nothing stays behind."""
        with two_workers("", "--embedded", str(served_data)) as (process, both):
            assert "ListChatSessions" in process.printed()
            process.wait_for_all("serving", 2)
            create_session_at(process.address)
            postmaster = int((served_data / "postmaster.pid").read_text().split()[0])
            assert process.stop() == 0
            assert not any(map(is_alive, both))
            assert not is_postgres_running(postmaster, served_data)
        events = [line["event"] for line in process.log if line["event"] != "finished call"]
        assert events[-2:] == ["draining", "draining"]

    @pytest.mark.parametrize("event", ["", "listening", "worker exited"])
    def test_signal_while_workers_start(self, served_data: Path, event: str) -> None:
        """Those that have only begun end too."""
        with server_process("", "--workers", "2", "--embedded", str(served_data)) as process:
            wait_until(lambda: (served_data / "postmaster.pid").exists(), 30)
            if event == "worker exited":
                os.kill(pids(process, 2)[0], signal.SIGKILL)
            children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
            if event:
                process.wait_for(event)
            else:
                wait_until(
                    lambda: b"worker" in b"".join(cmdline(pid) for pid in children_of(children)), 30
                )
            started = children_of(children)
            assert process.stop() == 0
            assert not any(map(is_alive, started))
            sockets = re.findall("host=([^&]*)", EmbeddedPostgres(served_data).url("x"))
            assert [path for path in sockets if Path(path).exists()] == []

    async def test_worker_that_began_when_signals_were_ignored(self, database: str) -> None:
        """Spawned between the signal and the drain, it ignores the first call to end."""
        with workers.reserve_port("127.0.0.1", 0) as port:
            environment = {"CHAT_TICKET_PORT": str(port), "CHAT_TICKET_WORKERS": "2"}
            stop = asyncio.Event()
            parent = workers.Supervisor(
                2, {**os.environ, "DATABASE_URL": database, **environment}, stop
            )
            handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                running = asyncio.create_task(parent.run(lambda: None))
                children = Path(f"/proc/self/task/{os.getpid()}/children")
                while not any(
                    b"worker" in cmdline(pid).split(b"\0") for pid in children_of(children)
                ):
                    await asyncio.sleep(0.01)
            finally:
                signal.signal(signal.SIGTERM, handler)
            stop.set()
            async with asyncio.timeout(30):
                assert await running == 0


def children_of(children: Path) -> list[int]:
    return [int(pid) for pid in children.read_text().split()]


class TestRefusal:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"CHAT_TICKET_POOL_SIZE": "0"},
            {"CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS": "a b"},
            {"CHAT_TICKET_HOST": "192.0.2.1", "CHAT_TICKET_ALLOW_INSECURE": "1"},
            {
                "CHAT_TICKET_AUTH": "jwt",
                "CHAT_TICKET_JWKS": "/nowhere/CANARY",
                "CHAT_TICKET_JWT_ISSUER": "i",
                "CHAT_TICKET_JWT_AUDIENCE": "a",
            },
        ],
        ids=lambda wrong: " ".join(wrong),
    )
    def test_wrong_setting_is_reported_once(self, database: str, wrong: dict[str, str]) -> None:
        """With the words and the exit status of one process."""
        environment = {"DATABASE_URL": database, "CHAT_TICKET_PORT": "0", **wrong}
        one, two = (
            run_command("serve", CHAT_TICKET_WORKERS=workers, **environment) for workers in "12"
        )
        assert one.returncode == two.returncode == 1
        assert printed(one) == printed(two)
        assert "chat-ticket-svc: " in two.stderr

    def test_stale_schema_is_reported_once(self, cluster: Cluster) -> None:
        """The first worker reports it, as a single process would."""
        empty = cluster.create("template1")
        try:
            one, two = (
                run_command("serve", "--port", "0", "--workers", n, DATABASE_URL=empty)
                for n in "12"
            )
        finally:
            cluster.drop(empty)
        assert one.returncode == two.returncode == 1
        assert one.stderr == two.stderr
        assert two.stderr.count("make migrate") == 1

    @pytest.mark.parametrize("number", ["0", "-1", "129", "x"])
    def test_number_of_workers_is_checked(
        self, monkeypatch: pytest.MonkeyPatch, number: str
    ) -> None:
        """Like every other setting."""
        monkeypatch.setenv("CHAT_TICKET_WORKERS", number)
        with pytest.raises(ConfigurationError, match=r"\ACHAT_TICKET_WORKERS: "):
            config.load()

    def test_worker_killed_at_start_is_logged(self, database: str) -> None:
        """The first worker cannot report why it ended."""
        with server_process(database, "--workers", "2") as process:
            children = Path(f"/proc/{process.popen.pid}/task/{process.popen.pid}/children")
            wait_until(lambda: children_of(children))
            os.kill(children_of(children)[0], signal.SIGKILL)
            assert process.popen.wait(timeout=30) == 128 + signal.SIGKILL
            assert process.wait_for("worker exited")["status"] == 128 + signal.SIGKILL
