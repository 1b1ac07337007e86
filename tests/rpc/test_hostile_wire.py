"""What arrives below gRPC: frames, headers and compression that no gRPC library would send.

The server is a process of its own, so that its death and its memory can be seen. What gRPC itself
answers before any code of ours runs carries no details; where that is INTERNAL, which the service
never says of itself, it is pinned here, one by one.
"""

import asyncio
import contextlib
import gzip
import re
import socket
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from support.client import Api, an_id
from support.http2 import Headers, Http2, WireAnswer, frame
from support.process import ServerProcess, server_process

from chat_ticket.v1.chat_session_pb2 import CreateChatSessionResponse, ListChatSessionsRequest
from chat_ticket_svc.limits import MIB

CREATE = b"/chat_ticket.v1.ChatSessionService/CreateChatSession"
GET = b"/chat_ticket.v1.ChatSessionService/GetChatSession"
WATCH = b"/chat_ticket.v1.ChatSessionService/WatchChatSession"
FEED = b"/chat_ticket.v1.ChatSessionService/WatchChatSessions"
HEALTH_CHECK = b"/grpc.health.v1.Health/Check"
HEALTH_WATCH = b"/grpc.health.v1.Health/Watch"
REFLECTION = b"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

OK = "grpc-status 0"
INVALID_ARGUMENT = "grpc-status 3"
DEADLINE_EXCEEDED = "grpc-status 4"
RESOURCE_EXHAUSTED = "grpc-status 8"
UNIMPLEMENTED = "grpc-status 12"
INTERNAL = "grpc-status 13"
PROTOCOL_ERROR = "reset 2"


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    with server_process(database) as process:
        yield process


@pytest_asyncio.fixture
async def address(process: ServerProcess, tenant: str) -> AsyncIterator[str]:
    """Where the server listens, which afterwards lives, and answers the next caller."""
    yield process.address
    await answers_still(process, tenant)
    internal = [line for line in process.log if line["event"] == "internal error"]
    assert not internal


async def answers_still(process: ServerProcess, tenant: str) -> None:
    async with Api(process.address, tenant) as api:
        session = await api.session()
        assert session.tenant_id == tenant
        await api.sessions.ListChatSessions(ListChatSessionsRequest())
    assert process.popen.poll() is None


def headers(
    *more: tuple[bytes, bytes], path: bytes = GET, but: dict[bytes, bytes | None] | None = None
) -> Headers:
    """Those of an ordinary call, with some replaced, left out (None) or added."""
    ordinary = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"x-tenant-id": b"wire",
        **(but or {}),
    }
    return [*((key, value) for key, value in ordinary.items() if value is not None), *more]


def send(
    address: str, request: Headers, data: bytes = frame(b""), seconds: float = 10
) -> WireAnswer:
    """One call on a connection of its own."""
    with Http2(address) as connection:
        stream = connection.open(request)
        connection.send(stream, data)
        return connection.answer(stream, seconds)


def encoded(kind: bytes) -> tuple[bytes, bytes]:
    return b"grpc-encoding", kind


class TestFrames:
    @pytest.mark.parametrize("path", [GET, WATCH, HEALTH_CHECK, HEALTH_WATCH])
    @pytest.mark.parametrize(
        "data",
        [b"", b"\0", b"\0\0\0\0", frame(b"", length=1), frame(b"abc", length=100)],
        ids=["none", "flag", "prefix", "no data", "less data"],
    )
    async def test_message_that_ends_early(self, address: str, path: bytes, data: bytes) -> None:
        """INTERNAL at once, with or without a deadline."""
        for timeout in ([], [(b"grpc-timeout", b"5S")]):
            answer = send(address, headers(*timeout, path=path), data, seconds=2)
            assert str(answer) == INTERNAL
            assert answer.headers[b"grpc-message"] == b"the request ended before its message"

    @pytest.mark.parametrize("path", [GET, WATCH])
    async def test_message_that_never_ends(self, address: str, path: bytes) -> None:
        """The caller's deadline ends it, and others are served meanwhile."""
        with Http2(address) as connection:
            waiting = connection.open(headers((b"grpc-timeout", b"300m"), path=path))
            connection.send(waiting, frame(b"abc", length=100), end=False)
            stream = connection.open(headers(path=CREATE))
            connection.send(stream, frame(b""))
            assert str(connection.answer(stream)) == OK
            assert str(connection.answer(waiting)) == DEADLINE_EXCEEDED

    @pytest.mark.parametrize("path", [GET, WATCH, HEALTH_CHECK, REFLECTION])
    @pytest.mark.parametrize("length", [4 * MIB + 1, 2**31 - 1, 2**31, 2**32 - 1])
    async def test_length_over_the_limit(self, address: str, path: bytes, length: int) -> None:
        """The length prefix is rejected, and no memory is allocated for the announced length."""
        answer = send(address, headers(path=path), frame(b"abc", length=length))
        assert str(answer) == RESOURCE_EXHAUSTED

    async def test_two_messages_on_a_unary_call(self, address: str) -> None:
        """The first is answered."""
        answer = send(address, headers(path=CREATE), frame(b"") + frame(b"\xff"))
        assert str(answer) == OK

    @pytest.mark.parametrize("flag", [2, 4, 128, 254, 255])
    async def test_unknown_frame_flag(self, address: str, flag: int) -> None:
        """gRPC drops the message, or its bytes, by chance."""
        answer = send(address, headers(), frame(b"\xff\xff", flag=flag))
        assert str(answer) in (INTERNAL, INVALID_ARGUMENT)

    @pytest.mark.parametrize("path", [GET, WATCH, HEALTH_CHECK, HEALTH_WATCH, REFLECTION])
    @pytest.mark.parametrize(
        ("encoding", "data"),
        [
            (None, b"a"),
            (b"identity", b"a"),
            (b"gzip", b"garbage"),
            (b"deflate", b"garbage"),
            (b"gzip", gzip.compress(b"a" * 1000, mtime=0)[:20]),
            (b"snappy", b"a"),
            (b"\xff", b"a"),
        ],
    )
    async def test_unknown_compression(
        self, address: str, path: bytes, encoding: bytes | None, data: bytes
    ) -> None:
        """gRPC itself answers INTERNAL with its own text; the service does not see the call."""
        more = [encoded(encoding)] if encoding is not None else []
        answer = send(address, headers(*more, path=path), frame(data, flag=1))
        assert str(answer) == INTERNAL
        assert answer.headers[b"grpc-message"] in (
            b"Compression bit set but no encoding configured",
            b"Decompression failed due to zlib error",
            b"Decompression failed due to data error",
            b"Error parsing 'grpc-encoding' metadata",
        )

    @pytest.mark.parametrize("kind", [b"gzip", b"deflate"])
    async def test_honest_compression_is_read(self, address: str, kind: bytes) -> None:
        """Only malformed compressed data is rejected."""
        data = gzip.compress(b"") if kind == b"gzip" else zlib.compress(b"")
        answer = send(address, headers(encoded(kind), path=CREATE), frame(data, flag=1))
        assert str(answer) == OK


def bomb(kind: bytes) -> bytes:
    """A gibibyte of zeros, but for the checksum at its end."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    assert zlib.decompressobj(-15).decompress(block) == bytes(MIB)
    header = b"\x1f\x8b\x08" + bytes(7) if kind == b"gzip" else b"\x78\xda"
    return header + block * 1024


def peak_memory(process: ServerProcess) -> int:
    """In bytes, since the process began."""
    status = Path(f"/proc/{process.popen.pid}/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


class TestBombs:
    @pytest.mark.parametrize("path", [GET, REFLECTION])
    @pytest.mark.parametrize("kind", [b"gzip", b"deflate"])
    async def test_gibibyte_in_a_mebibyte(
        self, process: ServerProcess, address: str, path: bytes, kind: bytes
    ) -> None:
        """Refused when 4 MiB are unpacked; never does it grow to its size."""
        before = peak_memory(process)
        data = frame(bomb(kind), flag=1)
        assert len(data) < 1.1 * MIB
        assert str(send(address, headers(encoded(kind), path=path), data)) == RESOURCE_EXHAUSTED
        assert peak_memory(process) - before < 100 * MIB

    @pytest.mark.parametrize(
        ("size", "expected"), [(4 * MIB, INVALID_ARGUMENT), (4 * MIB + 1, RESOURCE_EXHAUSTED)]
    )
    async def test_limit_applies_after_decompression(
        self, address: str, size: int, expected: str
    ) -> None:
        """4 MiB of zeros reach the parser, which rejects them; one more byte does not."""
        data = frame(gzip.compress(bytes(size)), flag=1)
        assert str(send(address, headers(encoded(b"gzip")), data)) == expected


class TestMetadata:
    @pytest.mark.parametrize("path", [GET, HEALTH_WATCH, REFLECTION])
    @pytest.mark.parametrize(
        "more",
        [
            [(b"x-big", b"a" * 20 * 1024)],
            [(b"x-big", b"a" * MIB)],
            [(b"x-%d" % index, b"v") for index in range(5000)],
            [(b"x", b"v")] * 5000,
            [(b"x-tenant-id", b"a" * 20 * 1024)],
        ],
        ids=["20 KiB", "1 MiB", "5000 keys", "5000 times a key", "tenant"],
    )
    async def test_oversized_is_rejected(self, address: str, path: bytes, more: Headers) -> None:
        """Over 16 KiB gRPC rejects it always."""
        assert str(send(address, headers(*more, path=path))) == RESOURCE_EXHAUSTED

    async def test_12_kib_are_sometimes_rejected(self, address: str) -> None:
        """Between 8 and 16 KiB gRPC rejects metadata at random, and larger metadata more often."""
        answers = {str(send(address, headers((b"x-big", b"a" * 12 * 1024)))) for _ in range(12)}
        assert answers <= {RESOURCE_EXHAUSTED, INVALID_ARGUMENT}
        assert RESOURCE_EXHAUSTED in answers

    async def test_caller_who_does_not_accept_the_limit(
        self, process: ServerProcess, address: str
    ) -> None:
        """gRPC applies the limit only after the client acknowledged it; memory stays bounded."""
        before = peak_memory(process)
        for _ in range(3):
            with Http2(address, acknowledges=False) as connection:
                more = [(b"x-%d" % index, b"v" * 100) for index in range(10_000)]
                stream = connection.open(headers(*more))
                connection.send(stream, frame(b""))
                assert str(connection.answer(stream)) in (INVALID_ARGUMENT, RESOURCE_EXHAUSTED)
        assert peak_memory(process) - before < 100 * MIB

    @pytest.mark.parametrize("value", [b"!!!", b"a", b"\xff", b"YQ,YQ"])
    async def test_malformed_base64_in_binary_metadata(self, address: str, value: bytes) -> None:
        """INTERNAL by gRPC itself."""
        answer = send(address, headers((b"x-odd-bin", value)))
        assert str(answer) == INTERNAL
        expected = b"Error parsing 'x-odd-bin' metadata: illegal base64 encoding"
        assert answer.headers[b"grpc-message"] == expected

    @pytest.mark.parametrize("value", [b"-1", b"abc", b"", b"1", b"1x", b"5S5S", b"\xff"])
    async def test_malformed_timeout(self, address: str, value: bytes) -> None:
        """INTERNAL by gRPC itself."""
        answer = send(address, headers((b"grpc-timeout", value)))
        assert str(answer) == INTERNAL
        assert answer.headers[b"grpc-message"] == b"Error parsing 'grpc-timeout' metadata"

    @pytest.mark.parametrize("value", [b"99999999999H", b"99999999H", b" 5S", b"1000000000n"])
    async def test_odd_timeout(self, address: str, value: bytes) -> None:
        """However far away, it is a deadline, and the service's own applies as well."""
        answer = send(address, headers((b"grpc-timeout", value)))
        assert str(answer) == INVALID_ARGUMENT
        assert b"grpc-status-details-bin" in answer.headers

    @pytest.mark.parametrize("value", [b"0n", b"0S"])
    async def test_timeout_that_has_passed(self, address: str, value: bytes) -> None:
        """DEADLINE_EXCEEDED, by gRPC itself."""
        assert str(send(address, headers((b"grpc-timeout", value)))) == DEADLINE_EXCEEDED

    @pytest.mark.parametrize(
        "value", [b"\xff\xfe", b"\0", b"a\r\nb", b"a" * 256, b"\xc3\xa9", b"\xed\xa0\x80", b""]
    )
    async def test_odd_tenant(self, address: str, value: bytes) -> None:
        """Never a tenant."""
        answer = send(address, headers(but={b"x-tenant-id": value}))
        assert str(answer) == INVALID_ARGUMENT
        assert b"x-tenant-id: must occur once" in answer.headers[b"grpc-message"]

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (b"x", b"\r\nfoo: bar"),
            (b"x", b"\0"),
            (b"x", b"\xff\xfe"),
            (b"connection", b"close"),
            (b"host", b"a"),
            (b"grpc-status", b"13"),
            (b"grpc-status-details-bin", b"AA"),
            (b"grpc-trace-bin", b"AA"),
            (b"grpc-accept-encoding", b"\xff"),
            (b"user-agent", b"\xff"),
            (b"content-length", b"-1"),
            (b"transfer-encoding", b"chunked"),
        ],
    )
    async def test_other_headers_do_no_harm(self, address: str, key: bytes, value: bytes) -> None:
        """The service does not read them."""
        answer = send(address, headers((key, value)))
        assert str(answer) == INVALID_ARGUMENT
        assert b"grpc-status-details-bin" in answer.headers

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            (b"X-Upper", b"a"),
            (b"x space", b"a"),
            (b"", b"a"),
            (b":odd", b"a"),
            (b"grpc-previous-rpc-attempts", b"x"),
            (b"lb-cost-bin", b"AA"),
        ],
    )
    async def test_header_that_grpc_cannot_read(
        self, address: str, key: bytes, value: bytes
    ) -> None:
        """INTERNAL by gRPC itself."""
        assert str(send(address, headers((key, value)))) == INTERNAL


class TestRequestLine:
    @pytest.mark.parametrize(
        "value",
        [b"text/plain", b"", b"application/grpc+json", b"application/grpc-web", b"\xff", None],
    )
    async def test_odd_content_type(self, address: str, value: bytes | None) -> None:
        """gRPC does not look at it."""
        answer = send(address, headers(but={b"content-type": value}))
        assert str(answer) == INVALID_ARGUMENT

    @pytest.mark.parametrize("key", [b"te", b":path", b":method", b":scheme", b":authority"])
    async def test_missing_header(self, address: str, key: bytes) -> None:
        """The stream is reset."""
        assert str(send(address, headers(but={key: None}))) == PROTOCOL_ERROR

    @pytest.mark.parametrize("method", [b"GET", b"PUT"])
    async def test_other_http_method(self, address: str, method: bytes) -> None:
        """The stream is reset."""
        assert str(send(address, headers(but={b":method": method}))) == PROTOCOL_ERROR

    @pytest.mark.parametrize("method", [b"HEAD", b"CONNECT", b"", b"post"])
    async def test_unknown_http_method(self, address: str, method: bytes) -> None:
        """INTERNAL by gRPC itself."""
        assert str(send(address, headers(but={b":method": method}))) == INTERNAL

    @pytest.mark.parametrize(
        "path",
        [
            b"",
            b"/",
            b"*",
            b"nope",
            b"/nope",
            b"/a/b/c",
            GET + b"/",
            b"/" + GET,
            GET + b"?a=b",
            GET + b"\0",
            GET[:-1],
            b"/chat_ticket.v1.ChatSessionService/",
            b"/" + b"a" * 7000,
            "/\u202e".encode(),
            b"/\xff",  # of which gRPC's own server dies
            GET + b"\xff",
        ],
    )
    async def test_unknown_method(self, address: str, path: bytes) -> None:
        """UNIMPLEMENTED, and the next call is answered."""
        assert str(send(address, headers(path=path))) == UNIMPLEMENTED


class TestConnections:
    @pytest.mark.parametrize(("path", "data"), [(WATCH, None), (FEED, frame(b""))])
    async def test_streams_reset_at_once(
        self, address: str, path: bytes, data: bytes | None
    ) -> None:
        """Rapid resets cost the caller his connection at the most."""
        with Http2(address) as connection:
            for _ in range(2000):
                try:
                    stream = connection.open(headers(path=path))
                    if data is not None:
                        connection.send(stream, data)
                    connection.h2.reset_stream(stream)
                    connection.flush()
                except Exception:  # as many as the server allows at once, or it has hung up
                    break

    async def test_streams_reset_faster_than_they_are_served(self, address: str) -> None:
        """Rapid resets: gRPC refuses most of the streams before any code of ours runs."""
        with Http2(address) as connection:
            for _ in range(2000):
                stream = connection.h2.get_next_available_stream_id()
                connection.h2.send_headers(stream, headers(path=WATCH))
                connection.h2.reset_stream(stream)
            connection.socket.settimeout(0.5)
            received = b""
            with contextlib.suppress(TimeoutError):
                connection.socket.sendall(connection.h2.data_to_send())
                while data := connection.socket.recv(65536):
                    received += data
        # The beginning of an RST_STREAM frame, and the code at its end.
        refused = re.findall(rb"\x00\x00\x04\x03\x00....\x00\x00\x00\x07", received, re.DOTALL)
        assert len(refused) > 1000

    async def test_pings(self, address: str) -> None:
        """Too many of them end the connection, and only that."""
        with Http2(address) as connection:
            for number in range(2000):
                connection.h2.ping(number.to_bytes(8, "big"))
                connection.flush()
            stream = connection.open(headers(path=CREATE))
            connection.send(stream, frame(b""))
            connection.answer(stream, 2)

    @pytest.mark.parametrize(
        "sent", [b"", b"PRI * HTTP/2.0\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 99]
    )
    async def test_connections_that_send_garbage(self, address: str, sent: bytes) -> None:
        """They come and go."""
        host, _, port = address.rpartition(":")
        for _ in range(50):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(sent)

    async def test_connections_dropped_in_the_middle(self, address: str) -> None:
        """Of a message, and of a stream that is followed."""
        for path in (CREATE, WATCH, FEED, HEALTH_WATCH, REFLECTION) * 10:
            with Http2(address) as connection:
                stream = connection.open(headers(path=path))
                connection.send(stream, frame(b"abc", length=100), end=False)

    async def test_call_is_answered_as_by_grpc(self, address: str) -> None:
        """The client of these tests is one: what it is rejected, others are."""
        answer = send(address, headers(path=CREATE))
        assert str(answer) == OK
        assert answer.data[:5] == frame(answer.data[5:])[:5]
        assert CreateChatSessionResponse.FromString(answer.data[5:]).session.tenant_id == "wire"
        answer = send(address, headers((b"x-id", an_id().encode())), frame(b"\xff\xff"))
        assert str(answer) == INVALID_ARGUMENT


class TestHealthWatch:
    """A caller of Watch who reads nothing: its one byte waits in the server."""

    async def blocked(self, process: ServerProcess) -> Http2:
        connection = Http2(process.address, window=0)
        stream = connection.open(headers(path=HEALTH_WATCH))
        connection.send(stream, frame(b""))
        await asyncio.sleep(0.5)
        return connection

    async def test_does_not_delay_others(self, database: str) -> None:
        """The status still changes, and another one that watches it is told."""
        settings = {"CHAT_TICKET_STREAM_WRITE_TIMEOUT_SECONDS": "600"}
        with server_process(database, **settings) as server, await self.blocked(server):
            async with Api(server.address, "") as api:
                watch = api.health.Watch(HealthCheckRequest())
                assert (await watch.read()).status == HealthCheckResponse.SERVING
                server.popen.terminate()
                assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING

    async def test_does_not_delay_shutdown(self, database: str) -> None:
        """The server ends as fast as without it."""
        with server_process(database, CHAT_TICKET_DRAIN_SECONDS="0.2") as process:
            process.wait_for("serving")
            with await self.blocked(process):
                process.popen.terminate()
                assert await asyncio.to_thread(process.popen.wait, 15) == 0
