"""PgBouncer between the tested services and PostgreSQL, configured as in docs/scaling.md.

`make test-pgbouncer` sets TEST_PGBOUNCER; the tests themselves and the listeners of the services
go past it. It is Debian's package pgbouncer, which nothing else needs.
"""

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from psycopg import conninfo

from chat_ticket_svc import embedded

WANTED = "TEST_PGBOUNCER"
# Where it listens, and the server behind it, for the workers of a run.
ADDRESS = "TEST_PGBOUNCER_PLACE"
BEHIND = "TEST_PGBOUNCER_BEHIND"
PORT = "6432"
START_SECONDS = 10

CONF = Path(__file__).parents[2] / "docs" / "pgbouncer.ini"
TO = "host=127.0.0.1 port=5432"
# Of its section, where what comes last counts. Idle connections are let go of, as every test has
# a database of its own.
HERE = """
listen_addr =
unix_socket_dir = {directory}
auth_type = trust
auth_file = {directory}/users
default_pool_size = {pool_size}
server_idle_timeout = 2
"""

# With its setting for it, statements may be prepared.
PREPARES = (1, 21)
PREPARING = "max_prepared_statements = 200\n"


def _program() -> str:
    return shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"


@functools.cache
def _prepares() -> bool:
    version = subprocess.run([_program(), "--version"], capture_output=True, text=True, check=True)
    major, minor = re.match(r"PgBouncer (\d+)\.(\d+)", version.stdout).groups()
    return (int(major), int(minor)) >= PREPARES


@contextlib.contextmanager
def pgbouncer(database_url: str, directory: Path, *, pool_size: int = 20) -> Iterator[str]:
    """Run it before the server of a URL; yields the part of URLs that leads to it instead."""
    server = conninfo.conninfo_to_dict(database_url)
    directory.mkdir(mode=0o700)
    configuration = directory / "pgbouncer.ini"
    to = " ".join(f"{name}={server[name]}" for name in ("host", "port"))
    configuration.write_text(
        CONF.read_text().replace(TO, to)
        + HERE.format(directory=directory, pool_size=pool_size)
        + (PREPARING if _prepares() else "")
    )
    users = directory / "users"
    users.write_text(f'"{server["user"]}" ""\n')
    # As whoever PostgreSQL runs as, whose socket is for nobody else; neither runs as root.
    identity = embedded._identity(embedded._binaries())
    if identity == "nobody":
        for path in (directory, configuration, users):
            os.chown(path, embedded._NOBODY, embedded._NOBODY)
    command = embedded._command(identity, Path(_program()), str(configuration))
    ending = threading.Event()

    def keep_running() -> None:
        """As systemd would: 1.18 ends now and then, when callers cancel (its issue 801)."""
        with (directory / "log").open("wb") as log:
            while not ending.is_set():
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    start_new_session=True,
                )
                while process.poll() is None and not ending.wait(0.05):
                    pass
                if not ending.is_set():
                    print("pgbouncer ended by itself", file=sys.stderr)
                process.terminate()
                process.wait()

    keeper = threading.Thread(target=keep_running)
    keeper.start()
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (directory / f".s.PGSQL.{PORT}").exists():
            if time.monotonic() > deadline:
                raise RuntimeError(f"pgbouncer did not start: {(directory / 'log').read_text()}")
            time.sleep(0.01)
        yield urlencode({"host": str(directory), "port": PORT, "sslmode": "disable"})
    finally:
        ending.set()
        keeper.join()


def through(address: str, database_url: str) -> dict[str, str]:
    """The settings of a service on a database, by PgBouncer at `place`."""
    pooled = urlsplit(database_url)._replace(query=address).geturl()
    return {
        "DATABASE_URL": pooled,
        "DATABASE_LISTEN_URL": database_url,
        "MIGRATE_DATABASE_URL": database_url,
        "CHAT_TICKET_PREPARE_STATEMENTS": str(_prepares()),
    }


def environment(database_url: str) -> dict[str, str]:
    """The settings of a service on a database, which may be of a server that a test started."""
    if urlsplit(database_url)._replace(path="").geturl() != os.environ.get(BEHIND):
        return {"DATABASE_URL": database_url}
    return through(os.environ[ADDRESS], database_url)
