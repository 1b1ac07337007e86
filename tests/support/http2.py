"""An HTTP/2 client that sends what gRPC never would: any header, any frame, in any order."""

import functools
import socket
import time
from dataclasses import dataclass, field
from typing import Self

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

Headers = list[tuple[bytes, bytes]]


def frame(message: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A message as gRPC frames it, or not quite."""
    size = len(message) if length is None else length
    return bytes([flag]) + size.to_bytes(4, "big") + message


@dataclass
class WireAnswer:
    """All that came back on a stream, and how it or its connection ended."""

    headers: dict[bytes, bytes] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None
    goaway: int | None = None
    disconnected: bool = False

    @property
    def code(self) -> int | None:
        """The grpc-status, when there is one."""
        value = self.headers.get(b"grpc-status")
        return None if value is None else int(value)

    def __str__(self) -> str:
        """What the tests compare: the first of these that there is."""
        if self.code is not None:
            return f"grpc-status {self.code}"
        if self.reset is not None:
            return f"reset {self.reset}"
        if self.goaway is not None:
            return f"goaway {self.goaway}"
        if self.disconnected:
            return "disconnected"
        status = self.headers.get(b":status", b"").decode()
        return f"http {status}" if status else "nothing"


class Http2:
    """One connection.

    `acknowledges` the server's settings before it sends anything; `window` is how many bytes the
    server may send on a stream.
    """

    def __init__(self, address: str, *, acknowledges: bool = True, window: int | None = None):
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=10)
        # Otherwise each frame waits 40 ms for the acknowledgement of the one before it.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
                validate_inbound_headers=False,
            )
        )
        # In Python, Huffman's code takes minutes for a megabyte.
        self.h2.encoder.encode = functools.partial(self.h2.encoder.encode, huffman=False)
        self.answers: dict[int, WireAnswer] = {}
        self._ended: set[int] = set()
        self.goaway: int | None = None
        self.is_closed = False
        self._settled = False
        self.h2.initiate_connection()
        if window is not None:
            self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        self.flush()
        while acknowledges and not self._settled and not self.is_closed:
            self.receive(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def flush(self) -> None:
        try:
            self.socket.sendall(self.h2.data_to_send())
        except OSError:
            self.is_closed = True

    def open(self, headers: Headers, *, end: bool = False) -> int:
        """Begin a stream; returns its id."""
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = WireAnswer()
        self.h2.send_headers(stream, headers, end_stream=end)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send data as the server takes it, until all is sent or the stream has ended."""
        deadline = time.monotonic() + 20
        while data and not self._is_over(stream) and time.monotonic() < deadline:
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            if room <= 0:
                self.receive(1)
                continue
            part, data = data[:room], data[room:]
            self.h2.send_data(stream, part)
            self.flush()
        if end and not self._is_over(stream):
            self.h2.end_stream(stream)
            self.flush()

    def answer(self, stream: int, seconds: float = 10) -> WireAnswer:
        """Wait until the stream has ended."""
        deadline = time.monotonic() + seconds
        while not self._is_over(stream) and time.monotonic() < deadline:
            self.receive(max(0.01, deadline - time.monotonic()))
        answer = self.answers[stream]
        answer.goaway, answer.disconnected = self.goaway, self.is_closed
        return answer

    def _is_over(self, stream: int) -> bool:
        return stream in self._ended or self.is_closed

    def receive(self, seconds: float) -> None:
        """Handle what arrives next, within some seconds."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return
        except OSError:
            data = b""
        if not data:
            self.is_closed = True
            return
        try:
            events = self.h2.receive_data(data)
        except h2.exceptions.ProtocolError:
            self.is_closed = True
            return
        for event in events:
            self._handle(event)
        self.flush()

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RemoteSettingsChanged():
                self._settled = True
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self.answers[event.stream_id].headers.update(event.headers or ())
            case h2.events.DataReceived():
                self.answers[event.stream_id].data += event.data or b""
                self.h2.acknowledge_received_data(
                    event.flow_controlled_length or 0, event.stream_id
                )
            case h2.events.StreamEnded():
                self._ended.add(event.stream_id)
            case h2.events.StreamReset():
                if event.stream_id in self.answers:
                    self.answers[event.stream_id].reset = int(event.error_code or 0)
                self._ended.add(event.stream_id)
            case h2.events.ConnectionTerminated():
                self.goaway = int(event.error_code or 0)
