"""Local HTTP sites, resolvers and name servers: the internet of the tests of attachment URLs."""

import asyncio
import contextlib
import secrets
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from ssrfguard import Resolver
from ssrfguard.resolvers import UdpResolver

from chat_ticket_svc.services import attachment_url

PRIVATE = "127.0.0.1"
PUBLIC = "127.0.0.2"  # where the `internet` fixture is used
OK = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/9\r\nContent-Length: 1\r\n\r\nx"


Answer = bytes | Callable[[str, asyncio.StreamWriter], Awaitable[None]]


def status(code: int) -> bytes:
    return b"HTTP/1.1 %d Status\r\nContent-Length: 0\r\n\r\n" % code


def redirect(location: str, *headers: str) -> bytes:
    lines = ["HTTP/1.1 302 Found", f"Location: {location}", *headers, "Content-Length: 0", "", ""]
    return "\r\n".join(lines).encode()


def paths(answers: dict[str, bytes]) -> Answer:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[request.split()[1]])

    return answer


def endless(head: bytes, chunk: bytes, pause: float = 0) -> Answer:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()
            await asyncio.sleep(pause)

    return answer


async def silence(request: str, writer: asyncio.StreamWriter) -> None:
    """The request is read, and that is all."""


@dataclass
class Site:
    """A local server: who connected, what they asked, how much they were sent, who hung up."""

    host: str
    port: int = 0
    peers: list[Any] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    sent: int = 0
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def at(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def visits(self) -> int:
        """The number of connections so far, including those of the backlog."""
        _, writer = await asyncio.open_connection(self.host, self.port)
        own = writer.get_extra_info("sockname")
        while own not in self.peers:
            self.arrived.clear()
            await self.arrived.wait()
        writer.close()
        self.peers.remove(own)
        return len(self.peers)


def unused_port() -> int:
    """A port that is free on every address, below the system's ephemeral ports."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)  # not by `random`, which tests seed alike
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


@contextlib.asynccontextmanager
async def serve(
    answer: Answer = OK, host: str = PRIVATE, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Site]:
    site = Site(host)
    tasks: set[asyncio.Task[Any] | None] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        site.peers.append(writer.get_extra_info("peername"))
        site.arrived.set()
        written = writer.write

        def write(data: bytes) -> None:
            site.sent += len(data)
            written(data)

        writer.write = write  # type: ignore[method-assign, assignment]
        try:
            request = (await reader.readuntil(b"\r\n\r\n")).decode()
            site.requests.append(request)
            if isinstance(answer, bytes):
                writer.write(answer)
            else:
                await answer(request, writer)
            await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            site.left.set()
            writer.close()

    # Not a port of the system's choice: another test may have that one on another address, where
    # the second site of a pair has to be.
    server = await asyncio.start_server(connected, host, port or unused_port(), ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        server.close()
        for task in filter(None, tasks):
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)


def dns(records: dict[str, Iterable[str]]) -> Resolver:
    """A resolver that knows these names, and addresses written out."""

    def resolve(host: str, port: int, *_: int) -> list[Any]:
        rows = []
        for address in records.get(host.rstrip("."), [host]):
            rows += socket.getaddrinfo(
                address, port, 0, socket.SOCK_STREAM, 0, socket.AI_NUMERICHOST
            )
        return rows

    return resolve


class NameServer(asyncio.DatagramProtocol):
    """Answers for a name and a type of record with these records, or not at all."""

    def __init__(self, find: Callable[[str, int], Collection[bytes] | None]) -> None:
        self.find = find

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, query: bytes, client: Any) -> None:
        labels, rest = [], query[12:]
        while size := rest[0]:
            labels.append(rest[1 : 1 + size].decode())
            rest = rest[1 + size :]
        records = self.find(".".join(labels).lower(), query[-3])
        if records is None:
            return
        reply = query[:2] + b"\x81\x80\0\1" + bytes([0, len(records), 0, 0, 0, 0]) + query[12:]
        for data in records:
            reply += b"\xc0\x0c" + query[-4:] + bytes([0, 0, 0, 0, 0, len(data)]) + data
        self.transport.sendto(reply, client)


@contextlib.asynccontextmanager
async def name_server(
    monkeypatch: pytest.MonkeyPatch, find: Callable[[str, int], Collection[bytes] | None]
) -> AsyncIterator[threading.Event]:
    """Serves the lookups of public names; the event is set when one has ended."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: NameServer(find), (PRIVATE, 0)
    )
    port = transport.get_extra_info("sockname")[1]
    stopped = threading.Event()

    def resolver(**options: Any) -> Resolver:
        def resolve(*query: Any) -> Iterable[Any]:
            try:
                return UdpResolver(
                    nameservers=(PRIVATE,), nameserver_port=port, attempts=100, **options
                )(*query)
            finally:
                stopped.set()

        return resolve

    monkeypatch.setattr(attachment_url, "UdpResolver", resolver)
    yield stopped
    transport.close()
