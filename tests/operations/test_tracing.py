"""Traces that a collector receives from a real server."""

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from grpc import StatusCode
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from support.client import Api, an_id, refused
from support.database import raise_on_insert, session_locked
from support.process import ServerProcess, log_line, server_process
from support.secrets import leaks, secret

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import (
    CreateChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
)

SESSIONS = "chat_ticket.v1.ChatSessionService"
PARENT_ID = "b7ad6b7169203331"


class Collector:
    """An OTLP collector over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.spans: list[Span] = []
        self.services: set[str] = set()

    def receive(self, body: bytes) -> None:
        self.bodies.append(body)
        for each in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {
                pair.value.string_value
                for pair in each.resource.attributes
                if pair.key == "service.name"
            }
            self.spans += [span for scope in each.scope_spans for span in scope.spans]

    async def call(self, tenant: str, method: str) -> Span:
        """The span of the only call of a method in the trace of `tenant`."""
        async with asyncio.timeout(10):
            while True:
                for span in self.spans:
                    if span.trace_id == trace_of(tenant) and span.name.endswith(f"/{method}"):
                        return span
                await asyncio.sleep(0.05)

    def children(self, call: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == call.span_id}


def trace_of(tenant: str) -> bytes:
    """The trace id of a test, from its tenant's UUID."""
    return bytes.fromhex(tenant[-36:].replace("-", ""))


def traced(api: Api) -> list[tuple[str, str]]:
    """The metadata of a call with a trace context."""
    parent = f"00-{trace_of(api.tenant).hex()}-{PARENT_ID}-01"
    return [("x-tenant-id", api.tenant), ("traceparent", parent)]


def attributes(span: Span) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in span.attributes
    }


@contextmanager
def http_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.receive(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http_server(Handler) as url:
        yield collector, url


TRACES = {"CHAT_TICKET_TRACES": "true", "OTEL_BSP_SCHEDULE_DELAY": "50"}


@pytest.fixture(scope="module")
def process(database: str, collector: tuple[Collector, str]) -> Iterator[ServerProcess]:
    settings = {**TRACES, "OTEL_EXPORTER_OTLP_ENDPOINT": collector[1]}
    with server_process(database, **settings) as process:
        process.wait_for("serving")
        yield process


@pytest.fixture
async def api(process: ServerProcess, tenant: str) -> Any:
    async with Api(process.address, tenant) as api:
        yield api


async def test_call_has_a_span_in_the_trace_of_its_caller(
    process: ServerProcess, api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    """With the service, the method and the status. The log line has the trace id."""
    session = await api.session()
    request = GetChatSessionRequest(session_id=session.id)
    await api.sessions._stub.GetChatSession(request, metadata=traced(api))
    span = await collector[0].call(tenant, "GetChatSession")
    assert span.name == f"{SESSIONS}/GetChatSession"
    assert span.kind == Span.SPAN_KIND_SERVER
    assert span.parent_span_id.hex() == PARENT_ID
    assert attributes(span) == {
        "rpc.system": "grpc",
        "rpc.service": SESSIONS,
        "rpc.method": "GetChatSession",
        "rpc.grpc.status_code": 0,
    }
    assert span.status.code == Status.STATUS_CODE_UNSET
    assert collector[0].services == {"chat-ticket-svc"}
    await log_line(process, "finished call", trace_id=trace_of(tenant).hex())


async def test_pool_wait_and_statement_are_child_spans(
    api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    await api.sessions._stub.ListChatSessions(ListChatSessionsRequest(), metadata=traced(api))
    span = await collector[0].call(tenant, "ListChatSessions")
    children = collector[0].children(span)
    assert children.keys() == {"pool wait", "statement"}
    statement = attributes(children["statement"])
    assert statement["db.system.name"] == "postgresql"
    assert "FROM chat_sessions" in statement["db.query.text"]
    assert children["pool wait"].end_time_unix_nano <= children["statement"].start_time_unix_nano


@pytest.mark.parametrize("method", ["GetChatSession", "CreateChatMessage"])
async def test_pipelined_and_batched_statements_are_child_spans(
    api: Api, collector: tuple[Collector, str], tenant: str, method: str
) -> None:
    """Reads by id and small messages do not have a connection of their own."""
    session = await api.session()
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="hello")
    stub, request = {
        "GetChatSession": (api.sessions, GetChatSessionRequest(session_id=session.id)),
        "CreateChatMessage": (
            api.messages,
            CreateChatMessageRequest(session_id=session.id, message=message),
        ),
    }[method]
    await getattr(stub._stub, method)(request, metadata=traced(api))
    span = await collector[0].call(tenant, method)
    assert "chat_sessions" in attributes(collector[0].children(span)["statement"])["db.query.text"]


async def test_error_of_the_caller_is_not_an_error_of_the_span(
    api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    """According to OpenTelemetry's conventions for servers."""
    with refused(StatusCode.NOT_FOUND):
        request = GetChatSessionRequest(session_id=an_id())
        await api.sessions._stub.GetChatSession(request, metadata=traced(api))
    span = await collector[0].call(tenant, "GetChatSession")
    assert attributes(span)["rpc.grpc.status_code"] == StatusCode.NOT_FOUND.value[0]
    assert span.status.code == Status.STATUS_CODE_UNSET


async def test_deadline_is_an_error(
    process: ServerProcess, api: Api, collector: tuple[Collector, str], tenant: str, database: str
) -> None:
    """Of the call's span, and of the statement that it cancels."""
    session = await api.session()
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 10_000)
    request = CreateChatMessageRequest(session_id=session.id, message=message)
    with session_locked(database, session.id), pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        await api.messages._stub.CreateChatMessage(request, metadata=traced(api), timeout=0.3)
    span = await collector[0].call(tenant, "CreateChatMessage")
    assert span.status.code == Status.STATUS_CODE_ERROR
    statement = collector[0].children(span)["statement"]
    assert statement.status.code == Status.STATUS_CODE_ERROR
    assert attributes(statement)["error.type"] == "CancelledError"


async def test_failed_statement_has_its_sqlstate(
    collector: tuple[Collector, str], tenant: str, fresh_database: str
) -> None:
    """No span and no log line holds the caller's data."""
    settings = {**TRACES, "OTEL_EXPORTER_OTLP_ENDPOINT": collector[1]}
    raise_on_insert(fresh_database, f"RAISE '{secret('raised')}' USING ERRCODE = 'XX000'")
    with server_process(fresh_database, **settings) as process:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            session = r.ChatSession(id=an_id())
            request = CreateChatSessionRequest(session=session)
            with refused(StatusCode.INTERNAL):
                await api.sessions._stub.CreateChatSession(
                    request, metadata=[*traced(api), ("authorization", secret("token"))]
                )
            message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content=secret("content"))
            with refused(StatusCode.NOT_FOUND):
                await api.messages._stub.CreateChatMessage(
                    CreateChatMessageRequest(session_id=an_id(), message=message),
                    metadata=traced(api),
                )
        span = await collector[0].call(tenant, "CreateChatSession")
        await collector[0].call(tenant, "CreateChatMessage")
        assert process.stop() == 0
    assert span.status.code == Status.STATUS_CODE_ERROR
    statement = collector[0].children(span)["statement"]
    assert statement.status.code == Status.STATUS_CODE_ERROR
    assert attributes(statement)["db.response.status_code"] == "XX000"
    assert not leaks(b"".join(collector[0].bodies))
    assert not leaks(process.output)


async def test_unresponsive_collector_delays_shutdown_by_a_second(
    database: str, tenant: str
) -> None:
    """Calls are not affected. The exporter alone would wait ten seconds for each batch."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with server_process(database, **TRACES, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint) as process:
            process.wait_for("serving")
            async with Api(process.address, tenant) as api:
                for _ in range(20):
                    await api.session()
            began = time.monotonic()
            assert process.stop() == 0
            assert time.monotonic() - began < 7


async def test_dead_collector_is_reported_once(database: str, tenant: str) -> None:
    """However many batches it loses, and once more when it works again."""
    statuses = {"now": 400}
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(statuses["now"])
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    async def make_call(process: ServerProcess) -> None:
        count = len(received)
        async with Api(process.address, tenant) as api:
            await api.session()
        async with asyncio.timeout(10):
            while len(received) == count:
                await asyncio.sleep(0.05)

    with http_server(Handler) as endpoint:
        settings = {**TRACES, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        with server_process(database, **settings) as process:
            process.wait_for("serving")
            for _ in range(3):
                await make_call(process)
            statuses["now"] = 200
            await make_call(process)
            again = process.wait_for("spans exported again")
            process.stop()
    lines = [line for line in process.log if line.get("level") in ("warning", "error")]
    assert [line["event"] for line in lines if "logger" not in line] == ["spans not exported"]
    [own] = [line for line in lines if "logger" in line]
    assert "code: 400" in own["event"]
    assert again["lost_spans"] > lines[-1]["lost_spans"]


def test_missing_extra_is_reported(database: str, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError\n")
    with server_process(database, CHAT_TICKET_TRACES="true", PYTHONPATH=str(tmp_path)) as process:
        assert process.popen.wait(timeout=30) == 1
        assert process.stop() == 1
    expected = "chat-ticket-svc: CHAT_TICKET_TRACES: requires the package's extra `tracing`\n"
    assert process.output == expected
