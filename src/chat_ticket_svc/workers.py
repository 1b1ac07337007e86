"""Several server processes on one port, and the supervisor that replaces those that exit.

The kernel distributes connections over the processes that listen on the port. Each worker is a
complete server. Workers are spawned, not forked, because gRPC does not survive a fork. The
supervisor never loads gRPC.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable, Iterator, Mapping, Sequence
from ipaddress import ip_address

import structlog

from chat_ticket_svc import embedded
from chat_ticket_svc.addresses import ListenError, format_address

log = structlog.get_logger()

# A worker prints this for the supervisor when it listens.
LISTENING = b"listening\n"

# As in a shell, the exit status of a process that a signal has killed is this plus the signal.
SIGNAL_STATUS_BASE = 128

# The restart of a worker that has run for less than this is delayed, longer each time.
STABLE_AFTER_SECONDS = 10
MIN_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30


class Supervisor:
    """Keeps `count` workers running, with `environment`, until `stop` is set."""

    def __init__(self, count: int, environment: Mapping[str, str], stop: asyncio.Event):
        self._count = count
        self._environment = environment
        self._stop = stop
        self._processes: set[Process] = set()

    async def run(self, on_listening: Callable[[], None]) -> int:
        """Start, replace and drain the workers; returns the exit status.

        The first worker starts alone, so that an error that concerns all workers is reported once.
        If it exits before it listens, no others are started and its exit status is returned.
        Otherwise `on_listening` is called.
        """
        draining = asyncio.create_task(self._drain())
        try:
            first = await self._spawn(0)
            if not await self._wait_until_listening(first):
                status = await self._wait_for_exit(first)
                if self._stop.is_set():
                    return 0
                if status > SIGNAL_STATUS_BASE:  # otherwise the worker has reported its error
                    log.error("worker exited", worker=first.pid, status=status)
                return status
            on_listening()
            others = [self._keep_running(number, None) for number in range(1, self._count)]
            await asyncio.gather(self._keep_running(0, first), *others)
            return 0
        finally:
            draining.cancel()

    async def _keep_running(self, number: int, process: Process | None) -> None:
        """Run worker `number`, and restart it when it exits. `process` is one already running."""
        delay = 0.0
        while process is not None or not self._stop.is_set():
            started_at = time.monotonic()
            result: dict[str, int | str]
            try:
                if process is None:
                    process = await self._spawn(number)
                    await self._wait_until_listening(process)
                result = {"worker": process.pid, "status": await self._wait_for_exit(process)}
            except OSError as error:  # out of some resource, which may be available again later
                result = {"error": type(error).__qualname__}
            if self._stop.is_set():
                return
            if time.monotonic() - started_at > STABLE_AFTER_SECONDS:
                delay = 0
            else:
                delay = min(max(MIN_BACKOFF_SECONDS, 2 * delay), MAX_BACKOFF_SECONDS)
            log.error("worker exited", **result, restart_in_seconds=delay)
            process = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()

    async def _spawn(self, number: int) -> Process:
        process = await asyncio.create_subprocess_exec(
            # With -P, Python imports nothing from the working directory.
            *(sys.executable, "-P", "-m", "chat_ticket_svc", "worker"),
            *(str(os.getpid()), str(number)),
            env=self._environment,
            stdin=DEVNULL,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C reaches the supervisor alone, which drains the workers
        )
        self._processes.add(process)
        return process

    async def _wait_until_listening(self, process: Process) -> bool:
        """Wait until a worker listens. Returns False when it exits before."""
        assert process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
        is_listening = False
        while not is_listening and (line := await process.stdout.readline()):
            is_listening = line == LISTENING
        if self._stop.is_set():
            # Signalled again: a worker that was spawned while this process ignored SIGTERM has
            # inherited that, and has ignored the first signal.
            _terminate(process)
        return is_listening

    async def _wait_for_exit(self, process: Process) -> int:
        status = await process.wait()
        self._processes.discard(process)
        return status if status >= 0 else SIGNAL_STATUS_BASE - status

    async def _drain(self) -> None:
        await self._stop.wait()
        for process in self._processes:
            _terminate(process)


def _terminate(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()


def die_with_supervisor(supervisor_pid: int) -> None:
    """Have the kernel kill this worker when the supervisor exits, even by SIGKILL."""
    embedded.set_parent_death_signal(supervisor_pid, signal.SIGKILL)


def report_listening() -> None:
    """Tell the supervisor that this worker listens."""
    os.write(sys.stdout.fileno(), LISTENING)
    # The supervisor reads nothing more from the pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


@contextlib.contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Reserve a port for the workers, which share it by SO_REUSEPORT. 0 reserves a free one.

    Raises ListenError when another process has the port, even a supervisor whose workers do not
    listen yet. While it is reserved no other process gets the port, even when no worker listens,
    except for processes of the same user that share it by SO_REUSEPORT as well. The reserving
    sockets do not listen, so they receive none of the workers' connections.
    """
    reserved_port = 0
    with contextlib.ExitStack() as stack:
        try:
            for family, ip in _addresses(host):
                try:
                    reservation = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    _bind(reservation, ip, reserved_port or port)
                except OSError as error:
                    # `localhost` often resolves to an IPv6 address on machines without IPv6.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                else:
                    reserved_port = reservation.getsockname()[1]
        except OSError as error:
            raise ListenError(format_address(host, port)) from error
        if not reserved_port:
            raise ListenError(format_address(host, port))
        yield reserved_port


def _addresses(host: str) -> Sequence[tuple[socket.AddressFamily, str]]:
    """The addresses that gRPC binds when it is told to listen on `host`."""
    results = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys((family, str(ip)) for family, _, _, _, (ip, *_) in results))
    if any(ip_address(ip).is_unspecified for _, ip in addresses) and socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, "::")]
    return addresses


def _bind(reservation: socket.socket, ip: str, port: int) -> None:
    if reservation.family == socket.AF_INET6:
        is_v6_only = not ip_address(ip).is_unspecified
        reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, is_v6_only)
    try:
        reservation.bind((ip, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Connections of an earlier server in TIME_WAIT block the port too. SO_REUSEADDR allows
        # binding beside those, but not beside a socket that listens.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((ip, port))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # Set after binding: the bind must fail when another process has the port. From here on the
    # workers may share it.
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
