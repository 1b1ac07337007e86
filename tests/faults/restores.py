"""A PostgreSQL, its backups of one moment, and the databases that are restored from them."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
from support.cluster import Cluster
from support.database import execute

from chat_ticket_svc import embedded
from chat_ticket_svc.embedded import EmbeddedPostgres
from faults.environment import _children, _signal

DATABASE = "chat_ticket"  # as in conftest's migrated_data
RESTORE_POINT = "backup"
WAIT_SECONDS = 30.0


class Backups:
    """A PostgreSQL that archives its WAL, and what a restore needs of it.

    `take_snapshot` is first, `dump` next, and from then on nothing that is written is in a backup.
    """

    def __init__(self, directory: Path):
        """`directory` has a data directory, `primary`, with a database that was migrated."""
        self._directory = directory
        self._archive = directory / "archive"
        self._archive.mkdir()
        self._archive.chmod(0o777)  # PostgreSQL may run as another user
        configure(
            directory / "primary",
            archive_mode="on",
            archive_command=f"cp %p {self._archive}/%f",
        )
        self._primary = EmbeddedPostgres(directory / "primary", durable=False)
        self._restores = 0

    @property
    def url(self) -> str:
        return self._primary.url(DATABASE)

    def start(self) -> str:
        self._primary.start()
        return self.url

    def stop(self) -> None:
        self._primary.stop()

    def take_snapshot(self) -> None:
        """Copy the volume. PostgreSQL must be stopped."""
        copied(self._directory / "primary", self._directory / "base")

    def dump(self) -> None:
        """Dump the database, and name the moment, which recovery can find again."""
        _run("pg_dump", "-Fc", "-f", self._directory / "dump", self.url)
        execute(self.url, f"SELECT pg_create_restore_point('{RESTORE_POINT}')")

    def archive(self) -> None:
        """Return when all WAL is in the archive."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute("SELECT pg_walfile_name(pg_switch_wal())").fetchone()
            assert row is not None
            wait_until(lambda: (self._archive / row[0]).exists(), "the WAL is archived")

    # ---- Ways to restore ----

    @contextlib.contextmanager
    def from_dump_beside(self, _: Cluster) -> Iterator[str]:
        """Into another database of the same cluster."""
        with self._from_dump(Cluster(self._primary.url("postgres"))) as url:
            yield url

    @contextlib.contextmanager
    def from_dump_elsewhere(self, other: Cluster) -> Iterator[str]:
        """Into another cluster."""
        with self._from_dump(other) as url:
            yield url

    @contextlib.contextmanager
    def _from_dump(self, cluster: Cluster) -> Iterator[str]:
        url = cluster.create("template0")
        try:
            _run("pg_restore", "--exit-on-error", "-d", url, self._directory / "dump")
            yield url
        finally:
            cluster.drop(url)

    @contextlib.contextmanager
    def to_point_in_time(self, _: Cluster) -> Iterator[str]:
        """From the snapshot and the archive."""
        data = self._copy_of_snapshot()
        configure(
            data,
            archive_mode="off",
            restore_command=f"cp {self._archive}/%f %p",
            recovery_target_name=RESTORE_POINT,
            recovery_target_action="promote",
        )
        self.restored = Restored(data)
        with self.restored:
            yield self.restored.recover()

    @contextlib.contextmanager
    def from_snapshot(self, _: Cluster) -> Iterator[str]:
        """Of the volume, which PostgreSQL cannot tell from a restart."""
        data = self._copy_of_snapshot()
        configure(data, archive_mode="off")
        with EmbeddedPostgres(data, durable=False) as postgres:
            url = postgres.url(DATABASE)
            execute(url, "SELECT begin_chat_epoch()")
            yield url

    def _copy_of_snapshot(self) -> Path:
        self._restores += 1
        return copied(self._directory / "base", self._directory / f"restored-{self._restores}")


class Restored:
    """A data directory that PostgreSQL recovers to a primary of a new timeline."""

    def __init__(self, data: Path):
        self._data = data
        self._postgres = EmbeddedPostgres(data, durable=False)

    def __enter__(self) -> "Restored":
        return self

    def __exit__(self, *_: object) -> None:
        self._postgres.stop()

    def recover(self) -> str:
        """Start recovery, and return the URL of the database when it has ended."""
        (self._data / "recovery.signal").touch()
        self._postgres.start()
        url = self._postgres.url(DATABASE)
        wait_until(lambda: _is_primary(url), "recovery has ended")
        return url

    def write_elsewhere(self) -> None:
        """Write WAL, but nothing of the service."""
        execute(
            self._postgres.url("postgres"),
            "SET synchronous_commit = on",  # a crash is to find it
            "CREATE TABLE other AS SELECT repeat('x', 1000) FROM generate_series(1, 1000)",
        )

    def crash(self) -> None:
        kill(self._postgres)
        self._postgres.stop()
        configure(self._data, recovery_target_name="")

    def start(self) -> None:
        self._postgres.start()


WAYS = (
    Backups.from_dump_beside,
    Backups.from_dump_elsewhere,
    Backups.to_point_in_time,
    Backups.from_snapshot,
)


def copied(data: Path, target: Path) -> Path:
    """Copy the data directory of a PostgreSQL that was stopped."""
    subprocess.run(["cp", "-a", data, target], check=True)
    return target


def configure(data: Path, **settings: str) -> None:
    """Append settings to those of a data directory. The last ones count."""
    with (data / "postgresql.conf").open("a") as file:
        file.writelines(f"{name} = '{value}'\n" for name, value in settings.items())


def run_as_server(program: str, *arguments: str) -> None:
    """Run it as whom PostgreSQL runs, to whom the files belong."""
    binaries = embedded._binaries()
    command = embedded._command(embedded._identity(binaries), binaries / program, *arguments)
    subprocess.run(command, check=True, cwd="/")


def kill(postgres: EmbeddedPostgres) -> None:
    """All of its processes at once, as with their machine."""
    for pid in (postgres.pid, *_children(postgres.pid)):
        _signal(pid, signal.SIGKILL)


def wait_until(is_so: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


def _run(program: str, *arguments: str | Path) -> None:
    subprocess.run([embedded._binaries() / program, *arguments], check=True)


def _is_primary(url: str) -> bool:
    with (
        contextlib.suppress(psycopg.OperationalError),
        psycopg.connect(url, autocommit=True) as connection,
    ):
        return connection.execute("SELECT NOT pg_is_in_recovery()").fetchone() == (True,)
    return False
