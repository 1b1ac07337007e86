"""A process that owns an embedded PostgreSQL, to be killed, and checks of what remains."""

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from chat_ticket_svc.embedded import EmbeddedPostgres

NOBODY = 65534
NO_NAMESPACES = "embedded._namespaces_work = lambda _: False"


OWNER = """
import sys
from pathlib import Path
from chat_ticket_svc import embedded
exec(sys.argv[2])
with embedded.EmbeddedPostgres(Path(sys.argv[1])) as postgres:
    print(postgres.pid, flush=True)
    sys.stdin.read()
"""


StartOwner = Callable[..., subprocess.Popen[str]]


def server_pid(owner: subprocess.Popen[str]) -> int:
    assert owner.stdout is not None
    return int(owner.stdout.readline())


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        time.sleep(0.01)


def socket_directory(postgres: EmbeddedPostgres) -> Path:
    return Path(str(conninfo_to_dict(postgres.url("postgres"))["host"]))


def query(postgres: EmbeddedPostgres, query: str) -> str:
    with psycopg.connect(postgres.url("postgres")) as connection:
        row = connection.execute(sql.SQL(query)).fetchone()
    assert row is not None
    return str(row[0])
