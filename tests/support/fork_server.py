"""A process that has imported the service, and runs each command in a fork of itself.

A command takes 0.4 s of CPU time to import what it needs, and 0.06 s for what a test asks of it.
A server takes 0.6 s to start, and 0.2 s in a fork.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from chat_ticket_svc.cli import COMMANDS

LONGEST_REQUEST = 1 << 20
# What `serve` imports when it is run.
IMPORTED_LATER = ["chat_ticket_svc.server", "chat_ticket_svc.telemetry.tracing", "uvloop"]


_starting = threading.Lock()


@functools.cache
def _fork_server() -> socket.socket:
    """Start the one of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        program = [sys.executable, "-m", "support.fork_server", str(theirs.fileno())]
        process = subprocess.Popen(
            program,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            pass_fds=[theirs.fileno()],
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last registered is the first to run
    return ours


class ForkedProcess:
    """`chat-ticket-svc` in a fork, with these descriptors for its output; else as a `Popen`."""

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], output: int, errors: int
    ):
        with _starting:
            server = _fork_server()
        ended, end = os.pipe()
        try:
            request = json.dumps([list(arguments), dict(environment), str(Path.cwd())])
            socket.send_fds(server, [request.encode()], [output, errors, end])
        finally:
            os.close(end)
        status = os.fdopen(ended)
        self.pid = int(status.readline())
        self.returncode: int | None = None
        self._waiter = threading.Thread(target=self._wait, args=[status], daemon=True)
        self._waiter.start()

    def _wait(self, status: TextIO) -> None:
        with status:
            self.returncode = int(status.read())

    def wait(self, timeout: float | None = None) -> int:
        self._waiter.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return self.returncode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _serve(requests: socket.socket) -> None:
    """Start a command for each request, until nobody can send one."""
    for name in COMMANDS:
        importlib.import_module(f"chat_ticket_svc.commands.{name.replace('-', '_')}")
    for name in IMPORTED_LATER:
        importlib.import_module(name)
    gc.freeze()  # or each fork would copy the memory of all objects, to mark them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # which reaps those that wait for a command
    while True:
        request, descriptors, *_ = socket.recv_fds(requests, LONGEST_REQUEST, 3)
        if not request:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            *streams, end = descriptors
            if (command := os.fork()) == 0:
                requests.detach()
                _become(*json.loads(request), streams)
                return
            os.write(end, f"{command}\n".encode())
            _, status = os.waitpid(command, 0)
            os.write(end, str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def _become(
    arguments: list[str], environment: dict[str, str], directory: str, streams: list[int]
) -> None:
    """Run the command in this process, as if it had just started."""
    for number, descriptor in enumerate([os.open(os.devnull, os.O_RDONLY), *streams]):
        os.dup2(descriptor, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # The text layer of the fork server remembers whether its own stderr could seek.
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(
        io.BufferedWriter(io.FileIO(2, "w", closefd=False)),
        encoding=sys.stderr.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[1:] = arguments
    runpy.run_module("chat_ticket_svc", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
