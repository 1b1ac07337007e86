"""A network to PostgreSQL that can be cut, stopped, slowed down, or lose some of what passes.

It runs in a thread of its own and understands as much of the protocol
(https://www.postgresql.org/docs/current/protocol-message-formats.html) as it needs to know which
answer tells of a commit: it lets the commit happen, and closes the connection instead of passing
that answer on.
"""

import asyncio
import contextlib
import re
import threading
from collections import deque
from collections.abc import Iterator
from enum import Enum, auto
from pathlib import Path

SLOW_SECONDS = 0.2
TRICKLE_SECONDS = 1.0
CHUNK = 64 * 1024
LOSE_EVERY = 10

WRITES = re.compile(rb"\b(INSERT INTO|UPDATE|DELETE FROM)\b")


class Mode(Enum):
    PASS = auto()
    CUT = auto()  # every connection is closed, and each new one
    BLACKHOLE = auto()  # nothing passes, and no connection is closed
    SLOW = auto()  # everything takes 200 ms longer, each way
    TRICKLE = auto()  # one byte a second
    LOSE_NOTIFICATIONS = auto()  # what LISTEN would hear does not come
    LOSE_COMMITS = auto()  # every tenth commit happens, and its answer does not come


class Proxy:
    """Listens on a port of loopback, in front of a PostgreSQL's Unix socket."""

    def __init__(self, socket: Path):
        self._socket = socket
        self._mode = Mode.PASS
        self._links: set[_Link] = set()
        self._commits = 0
        self.lost = 0  # commits whose answer did not come
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "Proxy":
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def mode(self) -> Mode:
        return self._mode

    @contextlib.contextmanager
    def during(self, mode: Mode) -> Iterator[None]:
        """Be like this for a while."""
        self._set(mode)
        try:
            yield
        finally:
            self._set(Mode.PASS)

    def loses(self) -> bool:
        """Whether the answer to the next commit is to be lost."""
        self._commits += 1
        lose = self._mode is Mode.LOSE_COMMITS and self._commits % LOSE_EVERY == 0
        self.lost += lose
        return lose

    def drops(self, message: bytes) -> bool:
        """Whether an answer is not passed on."""
        return self._mode is Mode.LOSE_NOTIFICATIONS and message[:1] == b"A"

    async def flows(self) -> None:
        """Returns when something may pass."""
        while self._mode is Mode.BLACKHOLE:
            await self._changed.wait()
        if self._mode is Mode.SLOW:
            await asyncio.sleep(SLOW_SECONDS)

    async def trickle(self) -> None:
        """Sleep between two bytes while the proxy trickles."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TRICKLE_SECONDS):
                await self._changed.wait()

    def _set(self, mode: Mode) -> None:
        asyncio.run_coroutine_threadsafe(self._become(mode), self._loop).result()

    async def _become(self, mode: Mode) -> None:
        self._mode = mode
        self._changed.set()
        self._changed = asyncio.Event()
        if mode is Mode.CUT:
            for link in list(self._links):
                link.close()

    async def _listen(self) -> asyncio.Server:
        self._changed = asyncio.Event()
        return await asyncio.start_server(self._connected, "127.0.0.1", 0)

    async def _close(self) -> None:
        self._server.close()
        for link in list(self._links):
            link.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode is Mode.CUT:
            writer.transport.abort()
            return
        try:
            to_reader, to_writer = await asyncio.open_unix_connection(str(self._socket))
        except OSError:
            writer.transport.abort()
            return
        link = _Link(self, writer, to_writer)
        self._links.add(link)
        try:
            await asyncio.gather(
                self._pump(reader, to_writer, link, link.asked),
                self._pump(to_reader, writer, link, link.answered),
            )
        except OSError:
            pass
        finally:
            link.close()
            self._links.discard(link)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        link: "_Link",
        inspect: object,
    ) -> None:
        while data := await reader.read(CHUNK):
            await self.flows()
            data = inspect(data)  # type: ignore[operator]
            while self._mode is Mode.TRICKLE and data:
                writer.write(data[:1])
                data = data[1:]
                await self.trickle()
            await self.flows()
            writer.write(data)
            await writer.drain()
        link.close()


class _Link:
    """A connection: both of its sides, and the data in flight."""

    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, server: asyncio.StreamWriter):
        self._proxy = proxy
        self._sides = (client, server)
        self._started = False  # the first message has no type
        self._asking = b""
        self._answering = b""
        self._writes: dict[bytes, bool] = {}  # by the name of a prepared statement
        self._commits: dict[bytes, bool] = {}
        self._in_transaction = False
        self._bound_to_commit = False
        # For each point at which the server will be ready again, whether its answer is to be lost.
        self._due: deque[bool] = deque()

    def close(self) -> None:
        for side in self._sides:
            side.transport.abort()

    def asked(self, data: bytes) -> bytes:
        """Look at what the client sends; all of it passes."""
        self._asking += data
        if not self._started:
            if len(self._asking) < 4 or len(self._asking) < (
                length := int.from_bytes(self._asking[:4])
            ):
                return data
            self._asking = self._asking[length:]
            self._started = True
            self._due.append(False)
        while (message := _first(self._asking)) is not None:
            self._asking = self._asking[len(message) :]
            self._inspect(message[:1], message[5:])
        return data

    def _inspect(self, kind: bytes, body: bytes) -> None:
        match kind:
            case b"P":
                name, sql, _ = body.split(b"\0", 2)
                self._writes[name] = bool(WRITES.search(sql))
                self._commits[name] = sql.strip().upper() == b"COMMIT"
            case b"B":
                _, name, _ = body.split(b"\0", 2)
                self._bound_to_commit = self._commits.get(name, False) or (
                    self._writes.get(name, False) and not self._in_transaction
                )
            case b"S":
                self._due.append(self._bound_to_commit and self._proxy.loses())
                self._bound_to_commit = False
            case b"Q":
                self._due.append(False)

    def answered(self, data: bytes) -> bytes:
        """Buffer partial messages, and drop the answer that is to be lost."""
        self._answering += data
        passing = b""
        while (message := _first(self._answering)) is not None:
            self._answering = self._answering[len(message) :]
            lost = bool(self._due) and self._due[0]
            if not lost and not self._proxy.drops(message):
                passing += message
            if message[:1] == b"Z":
                self._in_transaction = message[5:6] != b"I"
                if self._due:
                    self._due.popleft()
                if lost:
                    self.close()
                    return b""
        return passing


def _first(data: bytes) -> bytes | None:
    """The first message of those that are there as a whole."""
    if len(data) < 5:
        return None
    length = 1 + int.from_bytes(data[1:5])
    return data[:length] if len(data) >= length else None
