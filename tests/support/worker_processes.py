"""A server of two worker processes."""

import contextlib
import re
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

from support.process import ServerProcess, server_process


@contextlib.contextmanager
def two_workers(database: str, *arguments: str, **settings: str) -> Iterator[tuple[Any, list[int]]]:
    """A server of two workers that listen, and their process ids."""
    settings = {"CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000", **settings}
    with server_process(database, "--workers", "2", *arguments, **settings) as process:
        yield process, pids(process, 2)


def pids(process: ServerProcess, count: int) -> list[int]:
    """The pids of the first `count` workers that logged that they listen."""
    return [line["pid"] for line in process.wait_for_all("listening", count)]


def wait_until(condition: Callable[[], object], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def printed(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that are no log lines of the service or of gRPC."""
    return [line for line in result.stderr.splitlines() if not re.match(r"{|E\d{4} ", line)]


@contextlib.contextmanager
def unable_to_spawn(process: ServerProcess) -> Iterator[None]:
    """For want of file descriptors."""
    pid, which = process.popen.pid, resource.RLIMIT_NOFILE
    limits = resource.prlimit(pid, which)
    resource.prlimit(pid, which, (3, limits[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, which, limits)
