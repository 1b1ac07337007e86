"""Several server processes on one port, and their parent, which replaces those that end.

The kernel spreads the connections over the processes that listen on the port. Each is a server of
its own, spawned and not forked, since gRPC does not survive a fork; the parent never loads it.
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

log = structlog.get_logger()

# What a worker prints for its parent.
LISTENING = b"listening\n"

# An exit status tells of a signal in the way of a shell: by its number above this one.
SIGNALLED = 128

# A worker that ends this soon is one that cannot run: the next one waits, longer each time.
SETTLED_SECONDS = 10
FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 30


class PortTakenError(Exception):
    """Nothing can listen on the address."""

    def __init__(self, address: str):
        super().__init__(
            f"cannot listen on {address}: is the port taken, or the address of another machine?"
        )


def address_of(host: str, port: int) -> str:
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"{host}:{port}"


class Supervisor:
    """Keeps `count` workers running, with `environment`, until `stop` is set."""

    def __init__(self, count: int, environment: Mapping[str, str], stop: asyncio.Event):
        self._count = count
        self._environment = environment
        self._stop = stop
        self._processes: set[Process] = set()

    async def run(self, listening: Callable[[], None]) -> int:
        """Start, replace and drain the workers; returns the exit status.

        One worker goes ahead, so that what keeps all of them from starting is said once. When it
        ends before it listens there are no others, and its exit status is the result; otherwise
        `listening` is called.
        """
        draining = asyncio.create_task(self._drain())
        try:
            first = await self._spawn(0)
            if not await self._listens(first):
                status = await self._ended(first)
                if self._stop.is_set():
                    return 0
                if status > SIGNALLED:  # otherwise it has said why
                    log.error("a worker ended", worker=first.pid, status=status)
                return status
            listening()
            others = [self._keep(number, None) for number in range(1, self._count)]
            await asyncio.gather(self._keep(0, first), *others)
            return 0
        finally:
            draining.cancel()

    async def _keep(self, number: int, process: Process | None) -> None:
        """One worker after another; the first may run already."""
        delay = 0.0
        while process is not None or not self._stop.is_set():
            began = time.monotonic()
            end: dict[str, int | str]
            try:
                if process is None:
                    process = await self._spawn(number)
                    await self._listens(process)
                end = {"worker": process.pid, "status": await self._ended(process)}
            except OSError as error:  # too little of something, of which there may be more later
                end = {"error": type(error).__qualname__}
            if self._stop.is_set():
                return
            if time.monotonic() - began > SETTLED_SECONDS:
                delay = 0
            else:
                delay = min(max(FIRST_DELAY_SECONDS, 2 * delay), LONGEST_DELAY_SECONDS)
            log.error("a worker ended", **end, next_in_seconds=delay)
            process = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._stop.wait()

    async def _spawn(self, number: int) -> Process:
        process = await asyncio.create_subprocess_exec(
            # -P: whatever else lies in the working directory.
            *(sys.executable, "-P", "-m", "chat_ticket_svc", "worker"),
            *(str(os.getpid()), str(number)),
            env=self._environment,
            stdin=DEVNULL,
            stdout=PIPE,
            start_new_session=True,  # Ctrl-C is for the parent, which drains them
        )
        self._processes.add(process)
        return process

    async def _listens(self, process: Process) -> bool:
        """Wait until a worker listens; False when it ends before."""
        assert process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
        listens = False
        while not listens and (line := await process.stdout.readline()):
            listens = line == LISTENING
        if self._stop.is_set():
            # Again: one that was spawned when we ignored the signal already did so until now.
            _terminate(process)
        return listens

    async def _ended(self, process: Process) -> int:
        status = await process.wait()
        self._processes.discard(process)
        return status if status >= 0 else SIGNALLED - status

    async def _drain(self) -> None:
        await self._stop.wait()
        for process in self._processes:
            _terminate(process)


def _terminate(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.terminate()


def die_with_supervisor(parent: int) -> None:
    """Have this worker end when its parent does, however it does: a parent may be killed."""
    embedded.set_parent_death_signal(parent, signal.SIGKILL)


def report_listening() -> None:
    os.write(sys.stdout.fileno(), LISTENING)
    # The parent reads no more.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


@contextlib.contextmanager
def reserve_port(host: str, port: int) -> Iterator[int]:
    """Keep a port, or a free one for 0, for processes that share it by SO_REUSEPORT.

    It is refused when anybody has it, also another parent whose workers do not listen yet. Then
    nobody gets it, also while no worker listens; only processes of the same user that ask to share
    it cannot be kept out. The sockets do not listen, so they take no connections from the workers.
    """
    reserved_port = 0
    with contextlib.ExitStack() as stack:
        try:
            for family, ip in _addresses(host):
                try:
                    reservation = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    _bind(reservation, ip, reserved_port or port)
                except OSError as error:
                    # `localhost` often has an address of IPv6 also where there is no IPv6.
                    if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        raise
                else:
                    reserved_port = reservation.getsockname()[1]
        except OSError as error:
            raise PortTakenError(address_of(host, port)) from error
        if not reserved_port:
            raise PortTakenError(address_of(host, port))
        yield reserved_port


def _addresses(host: str) -> Sequence[tuple[socket.AddressFamily, str]]:
    """What gRPC makes of the host that it is to listen on."""
    found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys((family, str(ip)) for family, _, _, _, (ip, *_) in found))
    if any(ip_address(ip).is_unspecified for _, ip in addresses) and socket.has_dualstack_ipv6():
        return [(socket.AF_INET6, "::")]
    return addresses


def _bind(reservation: socket.socket, ip: str, port: int) -> None:
    if reservation.family == socket.AF_INET6:
        only = not ip_address(ip).is_unspecified
        reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
    try:
        reservation.bind((ip, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Perhaps only by what is left of the connections of an earlier server.
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reservation.bind((ip, port))
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    # Not before: as it is the port of one, and from now on that of the workers.
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
