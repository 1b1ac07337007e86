"""PostgreSQL, the network before it and the service, as processes that can be broken; and callers.

Callers run on an event loop in a thread of their own, as this one is the operator's: it kills,
stops and starts, and may wait.
"""

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

import grpc
import psycopg
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.process import ServerProcess

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres
from faults.checker import Violation, check
from faults.draft_record import LEASE_SECONDS
from faults.draft_sampler import OVERDUE_SECONDS, DraftSampler
from faults.feed_audit import INSTALL
from faults.proxy import Proxy
from faults.served import MUTANT
from faults.workload import THINK_SECONDS, Workload

T = TypeVar("T")

DATABASE = "faults"
SMALL_DISK = "768m"
HEALTHY_SECONDS = 10.0  # I8
START_SECONDS = 30.0
SETTINGS = {
    "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
    "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
    "CHAT_TICKET_WATCH_HEARTBEAT_SECONDS": "1",
    "CHAT_TICKET_DRAIN_SECONDS": "5",
    "CHAT_TICKET_STREAM_WRITE_TIMEOUT_SECONDS": "3",
    "CHAT_TICKET_DRAFT_SECONDS": str(LEASE_SECONDS),
}

CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'chat-ticket-svc'"
BUSY = f"{CONNECTIONS} AND state IN ('active', 'idle in transaction')"


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A disk that can be filled; only root may mount one."""
    with tempfile.TemporaryDirectory(prefix="chat-ticket-faults-") as directory:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", directory]
        subprocess.run(mount, check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


class AtRest(NamedTuple):
    """The resources of an idle server process."""

    pid: int
    mebibytes: float
    descriptors: int
    tasks: int


class Service:
    """A server process on a port that stays its own."""

    def __init__(self, database_url: str):
        self.mutant = ""  # of which the next process is
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._environment = {
            "DATABASE_URL": database_url,
            "CHAT_TICKET_PORT": str(port),
            **SETTINGS,
        }
        self._process: ServerProcess | None = None
        self.log: list[dict[str, Any]] = []  # of the processes before

    def start(self) -> None:
        tests = str(Path(__file__).parent.parent)
        environment = {
            **self._environment,
            "PYTHONPATH": os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")]),
            MUTANT: self.mutant,
        }
        self._process = ServerProcess(environment=environment, module="faults.served")
        self._asked = 0

    def wait(self) -> None:
        self.process.wait_for("listening")

    @property
    def process(self) -> ServerProcess:
        assert self._process is not None
        return self._process

    def stop(self, number: int = signal.SIGTERM) -> int:
        status = self.process.stop(number)
        self.log += self.process.log
        return status

    def send(self, number: int) -> None:
        self.process.popen.send_signal(number)

    @property
    def mebibytes(self) -> float:
        """Of memory, that the process has."""
        status = Path(f"/proc/{self.process.popen.pid}/status").read_text()
        [kibibytes] = re.findall(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
        return int(kibibytes) / 1024

    def at_rest(self) -> "AtRest":
        """What the process has, which is to be what it had."""
        pid = self.process.popen.pid
        self._asked += 1
        self.send(signal.SIGUSR1)
        tasks = self.process.wait_for_all("tasks", self._asked)[-1]["count"]
        descriptors = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        return AtRest(pid, self.mebibytes, descriptors, tasks)

    def is_healthy(self) -> bool:
        with grpc.insecure_channel(self.address) as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(
                    health_pb2.HealthCheckRequest(), timeout=1
                )
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class Environment:
    """All of it, for the runs of one matrix."""

    def __init__(self, directory: Path, *, services: int = 2):
        directory.chmod(0o711)  # PostgreSQL may have to run as another user
        self.directory = directory
        self.first_rests: dict[int, AtRest] = {}  # by the process
        self._stack = contextlib.ExitStack()
        self._postgres = EmbeddedPostgres(directory / "postgres")
        self._services = services

    def __enter__(self) -> "Environment":
        with contextlib.ExitStack() as stack:
            self._postgres.start()
            stack.callback(self._postgres.stop)
            self.database_url = self._postgres.url(DATABASE)
            assert migrate.up(self.database_url, quiet=True) == 0
            with psycopg.connect(self.database_url) as connection:
                connection.execute(INSTALL)
            host = Path(parse_qs(urlsplit(self.database_url).query)["host"][0])
            port = parse_qs(urlsplit(self.database_url).query)["port"][0]
            self.proxy = stack.enter_context(Proxy(host / f".s.PGSQL.{port}"))
            through = (
                f"postgresql://postgres@127.0.0.1:{self.proxy.port}/{DATABASE}"
                "?sslmode=disable&gssencmode=disable"
            )
            self.services = [Service(through) for _ in range(self._services)]
            for service in self.services:
                service.start()
                stack.callback(self._end, service)
            for service in self.services:
                service.wait()
            self._loop = asyncio.new_event_loop()
            thread = threading.Thread(target=self._loop.run_forever, daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
            self.wait_until_healthy()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _end(self, service: Service) -> None:
        with contextlib.suppress(ProcessLookupError):
            service.send(signal.SIGCONT)
        service.stop(signal.SIGKILL)

    # ---- What may be done to it ----

    def end_postgres(self, number: int) -> None:
        os.kill(self._postgres.pid, number)

    def end_wal_segment(self) -> None:
        """So that PostgreSQL needs another, for which there has to be space."""
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(self.database_url, autocommit=True, connect_timeout=3) as connection,
        ):
            connection.execute("SELECT pg_logical_emit_message(false, '', ''), pg_switch_wal()")

    def restart_postgres(self) -> None:
        """After it was ended by a signal."""
        self._postgres.stop()
        self._postgres.start()

    @contextlib.contextmanager
    def stopped_postgres(self) -> Iterator[None]:
        """Stop the postmaster and all of its processes with SIGSTOP."""
        pids = [self._postgres.pid, *_children(self._postgres.pid)]
        for pid in pids:
            _signal(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                _signal(pid, signal.SIGCONT)

    def terminate_backends(self) -> None:
        """Every connection of the service, the listener's included."""
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(self.database_url, autocommit=True) as connection,
        ):
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE application_name = 'chat-ticket-svc'"
            )

    def become(self, mutant: str) -> None:
        """Have the services be this mutant, or none."""
        changed = [service for service in self.services if service.mutant != mutant]
        for service in changed:
            service.stop(signal.SIGKILL)
            service.mutant = mutant
            service.start()
        for service in changed:
            service.wait()
        self.wait_until_healthy()

    # ---- Callers ----

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """On the callers' loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @contextlib.contextmanager
    def workload(
        self, seed: int, name: str, think_seconds: float = THINK_SECONDS, *, drafts: bool = False
    ) -> Iterator[Workload]:
        def addresses() -> Sequence[str]:
            return [service.address for service in self.services]

        workload = Workload(
            addresses,
            seed,
            name,
            think_seconds,
            drafts=drafts,
            audited_database=self.database_url,
        )
        try:
            self.run(workload.start())
            yield workload
        finally:
            self.run(workload.close())

    @contextlib.contextmanager
    def sampled_drafts(
        self, workload: Workload, overdue_seconds: float = OVERDUE_SECONDS
    ) -> Iterator[DraftSampler]:
        addresses = [service.address for service in self.services]
        sampler = DraftSampler(
            self.database_url,
            addresses,
            workload.tenants,
            workload.record.drafts,
            overdue_seconds=overdue_seconds,
        )
        sampler.start()
        try:
            yield sampler
        finally:
            sampler.stop()

    # ---- Afterwards ----

    def check(self, workload: Workload) -> list[Violation]:
        with psycopg.connect(self.database_url) as connection:
            return check(workload.record, connection, workload.tenants)

    def wait_until_healthy(self) -> float:
        """The seconds until every service is healthy."""
        began = time.monotonic()
        while not all(service.is_healthy() for service in self.services):
            if time.monotonic() - began > START_SECONDS:
                raise TimeoutError("a service does not become healthy")
            time.sleep(0.05)
        return time.monotonic() - began

    def mebibytes(self) -> float:
        """Of memory, that the services have."""
        return sum(service.mebibytes for service in self.services)

    def connections(self) -> int:
        """Of the services, to PostgreSQL."""
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute(CONNECTIONS).fetchone()
        assert row is not None
        return int(row[0])

    def busy(self) -> int:
        """Connections of the services that are active although no call is in progress (I7)."""
        deadline = time.monotonic() + 5
        with psycopg.connect(self.database_url, autocommit=True) as connection:
            while True:
                row = connection.execute(BUSY).fetchone()
                assert row is not None
                if not row[0] or time.monotonic() > deadline:
                    return int(row[0])
                time.sleep(0.1)


def _children(pid: int) -> list[int]:
    return [
        int(child)
        for tasks in Path(f"/proc/{pid}/task").glob("*/children")
        for child in tasks.read_text().split()
    ]


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
