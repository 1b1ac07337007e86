"""Servers that tests kill, and options for clients that reconnect to them soon."""

import asyncio
import contextlib
import signal
import socket

from support.process import ServerProcess, server_process

SETTINGS = {
    "CHAT_TICKET_DRAIN_SECONDS": "1",
    "CHAT_TICKET_WATCH_HEARTBEAT_SECONDS": "0.3",
    "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
}


OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the servers are back sooner than anywhere else
    # It is also how long gRPC lets an attempt to connect take, TLS handshake included.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]  # type: ignore[no-any-return]


class Servers:
    """Two servers of one database, which restart on the same ports."""

    def __init__(self, database_url: str, stack: contextlib.ExitStack):
        self._database_url = database_url
        self._stack = stack
        self._ports = [free_port(), free_port()]
        self._running: list[ServerProcess] = [self._start(0), self._start(1)]

    @property
    def target(self) -> str:
        return "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in self._ports)

    def _start(self, number: int) -> ServerProcess:
        settings = {**SETTINGS, "CHAT_TICKET_PORT": str(self._ports[number])}
        process = server_process(self._database_url, **settings)
        return self._stack.enter_context(process)  # type: ignore[no-any-return]

    async def serving(self) -> None:
        for server in self._running:
            await asyncio.to_thread(server.wait_for, "serving")

    async def restart(self, number: int, *servers: int) -> None:
        """End servers by a signal, and start them again."""
        running = [self._running[server] for server in servers]
        await asyncio.gather(*(asyncio.to_thread(server.stop, number) for server in running))
        for server in servers:
            self._running[server] = self._start(server)
        await self.serving()

    async def freeze(self, server: int, seconds: float) -> None:
        process = self._running[server].popen
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            process.send_signal(signal.SIGCONT)
