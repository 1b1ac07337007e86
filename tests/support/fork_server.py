"""A process that has imported the service, and runs each command in a fork of itself.

A command takes 0.4 s of CPU time to import what it needs, and 0.06 s for what a test asks of it.
"""

import atexit
import functools
import gc
import importlib
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

from chat_ticket_svc.cli import COMMANDS

LONGEST_REQUEST = 1 << 20


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


def run(arguments: Sequence[str], environment: Mapping[str, str], output: int, errors: int) -> int:
    """Run `chat-ticket-svc` with these descriptors for its output, and return its exit status."""
    with _starting:
        server = _fork_server()
    ended, end = os.pipe()
    try:
        request = json.dumps([list(arguments), dict(environment), str(Path.cwd())])
        socket.send_fds(server, [request.encode()], [output, errors, end])
    finally:
        os.close(end)
    with os.fdopen(ended, "rb") as status:
        return int(status.read())


def _serve(requests: socket.socket) -> None:
    """Start a command for each request, until nobody can send one."""
    for name in COMMANDS:
        importlib.import_module(f"chat_ticket_svc.commands.{name.replace('-', '_')}")
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
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv[1:] = arguments
    runpy.run_module("chat_ticket_svc", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
