"""A minimal HTTP/2 client for gRPC calls, about as fast as h2load.

gRPC's own client needs more time per call than the server does, so it would measure itself. The
client in tests/support/http2.py uses a library and can break the protocol. This one sends only
what the calls need.
"""

import socket
import struct
from collections.abc import Iterator, Mapping

import hpack

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4  # a setting

DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
LARGEST_FRAME = 16_384
RECEIVE_BYTES = 262_144


Headers = Mapping[str, str]


class CallFailedError(Exception):
    """A call did not end with grpc-status 0, or its connection ended before it did."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    size = len(payload)
    return struct.pack(">BHBBI", size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def message(serialized: bytes) -> bytes:
    """A message with gRPC's length prefix."""
    return struct.pack(">BI", 0, len(serialized)) + serialized


def messages(data: bytes) -> Iterator[bytes]:
    """The complete messages at the beginning of a stream's data."""
    at = 0
    while at + 5 <= len(data):
        _, size = struct.unpack_from(">BI", data, at)
        if at + 5 + size > len(data):
            return
        yield data[at + 5 : at + 5 + size]
        at += 5 + size


def request_headers(path: str, tenant: str) -> bytes:
    """The headers of a call, as HPACK literals without indexing."""
    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("x-tenant-id", tenant),
    )
    return b"".join(
        b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in headers
    )


class Connection:
    """One connection. `window` is the number of bytes that the server may send on each stream."""

    def __init__(self, address: str, *, window: int = LARGEST_WINDOW):
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._next_stream = 1
        self._buffer = b""
        self._received = 0  # since the last WINDOW_UPDATE of the connection
        self._decoder = hpack.Decoder()
        self._header_cache: dict[bytes, Headers] = {}
        # The server's windows: of the connection, of a new stream, and of the blocked streams.
        self._window = self._stream_window = DEFAULT_WINDOW
        self._blocked: dict[int, tuple[bytes, int]] = {}
        self._open: dict[int, int] = {}  # the windows of the streams that `open_stream` began
        settings = struct.pack(">HI", INITIAL_WINDOW_SIZE, window)
        more = struct.pack(">I", LARGEST_WINDOW - DEFAULT_WINDOW)
        self._socket.sendall(
            PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, more)
        )

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def call(self, headers: bytes, body: bytes) -> int:
        """Start a call with one request, and return its stream."""
        stream = self._next_stream
        self._next_stream += 2
        out = frame(HEADERS, END_HEADERS, stream, headers)
        size = len(body)
        if size <= min(self._window, self._stream_window, LARGEST_FRAME) and not self._blocked:
            self._window -= size
            self._socket.sendall(out + frame(DATA, END_STREAM, stream, body))
        else:
            self._blocked[stream] = body, self._stream_window
            self._socket.sendall(out)
            self._send_waiting()
        return stream

    def open_stream(self, headers: bytes) -> int:
        """Start a call whose requests follow by `send`."""
        stream = self._next_stream
        self._next_stream += 2
        self._open[stream] = self._stream_window
        self._socket.sendall(frame(HEADERS, END_HEADERS, stream, headers))
        return stream

    def send(self, stream: int, body: bytes, *, is_last: bool = False) -> None:
        """Send a request of an open stream. There must be room for it in the server's windows."""
        size = len(body)
        if size > min(self._window, self._open[stream]):
            raise CallFailedError("the server reads too slowly")
        self._window -= size
        self._open[stream] -= size
        self._socket.sendall(frame(DATA, END_STREAM if is_last else 0, stream, body))

    def cancel(self, stream: int) -> None:
        self._socket.sendall(frame(RST_STREAM, 0, stream, struct.pack(">I", 8)))

    def read(self) -> bytes:
        """The received bytes, to be passed to `feed`."""
        received = self._socket.recv(RECEIVE_BYTES)
        if not received:
            raise CallFailedError("the server closed the connection")
        return received

    def receive(self) -> Iterator[tuple[int, bytes | None]]:
        return self.feed(self.read())

    def feed(self, received: bytes) -> Iterator[tuple[int, bytes | None]]:
        """Yield data with its stream, and None for a stream that has ended with status 0."""
        buffer = self._buffer + received if self._buffer else received
        at, end = 0, len(buffer)
        while end - at >= 9:
            high, low, kind, flags, stream = struct.unpack_from(">BHBBI", buffer, at)
            stop = at + 9 + (high << 16 | low)
            if stop > end:
                break
            payload = buffer[at + 9 : stop]
            at = stop
            if kind == DATA:
                self._received += len(payload)
                yield stream, payload
            elif kind == HEADERS:
                headers = self._decode_headers(payload)
                if flags & END_STREAM:
                    self._require_ok(headers)
                    yield stream, None
            else:
                self._handle(kind, flags, stream, payload)
        self._buffer = buffer[at:]
        if self._received > LARGEST_WINDOW // 2:
            self._socket.sendall(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", self._received)))
            self._received = 0

    def _handle(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    more, self._stream_window = value - self._stream_window, value
                    self._blocked = {s: (b, w + more) for s, (b, w) in self._blocked.items()}
                    self._open = {s: w + more for s, w in self._open.items()}
            self._socket.sendall(frame(SETTINGS, ACK, 0))
            self._send_waiting()
        elif kind == PING and not flags & ACK:
            self._socket.sendall(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += more
            elif stream in self._open:
                self._open[stream] += more
            elif stream in self._blocked:
                body, window = self._blocked[stream]
                self._blocked[stream] = body, window + more
            self._send_waiting()
        elif kind in (RST_STREAM, GOAWAY):
            raise CallFailedError(f"frame {kind} on stream {stream}: {payload!r}")
        elif kind not in (SETTINGS, PING):
            raise CallFailedError(f"unexpected frame of kind {kind}")

    def _send_waiting(self) -> None:
        """Send the blocked requests as far as the windows allow."""
        for stream, (body, window) in list(self._blocked.items()):
            rest = body
            while room := min(self._window, window, LARGEST_FRAME, len(rest)):
                part, rest = rest[:room], rest[room:]
                self._window -= room
                window -= room
                flags = 0 if rest else END_STREAM
                self._socket.sendall(frame(DATA, flags, stream, part))
            if rest:
                self._blocked[stream] = rest, window
            else:
                del self._blocked[stream]

    def _decode_headers(self, block: bytes) -> Headers:
        headers = self._header_cache.get(block)
        if headers is None:
            table = self._decoder.header_table.dynamic_entries
            before = list(table)
            headers = {str(name): str(value) for name, value in self._decoder.decode(block)}
            if list(table) == before:
                self._header_cache[block] = headers
            else:  # the dynamic table has changed, so the same bytes may now mean something else
                self._header_cache.clear()
        return headers

    @staticmethod
    def _require_ok(headers: Headers) -> None:
        if headers.get("grpc-status") != "0":
            raise CallFailedError(f"a call ended with {headers}")
