"""Traces as a collector receives them, from a server that really sends them."""

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
from support.process import ServerProcess, server_process
from test_errors import locked, raise_on_insert
from test_instrumentation import line
from test_leaks import leaks, secret

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
        """The span of the only call of a method in a trace that `tenant` names."""
        async with asyncio.timeout(10):
            while True:
                for span in self.spans:
                    if span.trace_id == trace_of(tenant) and span.name.endswith(f"/{method}"):
                        return span
                await asyncio.sleep(0.05)

    def parts(self, call: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == call.span_id}


def trace_of(tenant: str) -> bytes:
    """A trace of its own for each test, named by its tenant's UUID."""
    return bytes.fromhex(tenant[-36:].replace("-", ""))


def traced(api: Api) -> list[tuple[str, str]]:
    """The metadata of a call whose caller traces it."""
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


async def test_a_call_is_a_span_in_the_trace_of_its_caller(
    process: ServerProcess, api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    """With the service, the method and the status; the line of the log names the trace."""
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
    await line(process, "finished call", trace_id=trace_of(tenant).hex())


async def test_the_wait_for_a_connection_and_the_statement_are_its_parts(
    api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    await api.sessions._stub.ListChatSessions(ListChatSessionsRequest(), metadata=traced(api))
    span = await collector[0].call(tenant, "ListChatSessions")
    parts = collector[0].parts(span)
    assert parts.keys() == {"pool wait", "statement"}
    statement = attributes(parts["statement"])
    assert statement["db.system.name"] == "postgresql"
    assert "FROM chat_sessions" in statement["db.query.text"]
    assert parts["pool wait"].end_time_unix_nano <= parts["statement"].start_time_unix_nano


@pytest.mark.parametrize("method", ["GetChatSession", "CreateChatMessage"])
async def test_a_statement_that_calls_share_is_a_part_of_each(
    api: Api, collector: tuple[Collector, str], tenant: str, method: str
) -> None:
    """Reads by id and small messages have no connection of their own."""
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
    assert "chat_sessions" in attributes(collector[0].parts(span)["statement"])["db.query.text"]


async def test_what_the_caller_did_wrong_is_no_error(
    api: Api, collector: tuple[Collector, str], tenant: str
) -> None:
    """By OpenTelemetry's conventions for servers."""
    with refused(StatusCode.NOT_FOUND):
        request = GetChatSessionRequest(session_id=an_id())
        await api.sessions._stub.GetChatSession(request, metadata=traced(api))
    span = await collector[0].call(tenant, "GetChatSession")
    assert attributes(span)["rpc.grpc.status_code"] == StatusCode.NOT_FOUND.value[0]
    assert span.status.code == Status.STATUS_CODE_UNSET


async def test_a_deadline_is_an_error(
    process: ServerProcess, api: Api, collector: tuple[Collector, str], tenant: str, database: str
) -> None:
    """Of the call, and of the statement that it cut off."""
    session = await api.session()
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 10_000)
    request = CreateChatMessageRequest(session_id=session.id, message=message)
    with locked(database, session.id), pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        await api.messages._stub.CreateChatMessage(request, metadata=traced(api), timeout=0.3)
    span = await collector[0].call(tenant, "CreateChatMessage")
    assert span.status.code == Status.STATUS_CODE_ERROR
    statement = collector[0].parts(span)["statement"]
    assert statement.status.code == Status.STATUS_CODE_ERROR
    assert attributes(statement)["error.type"] == "CancelledError"


async def test_a_failing_statement_is_an_error_by_its_sqlstate(
    collector: tuple[Collector, str], tenant: str, fresh_database: str
) -> None:
    """And nothing that callers entrust to us is in any span, nor in what the server writes."""
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
    statement = collector[0].parts(span)["statement"]
    assert statement.status.code == Status.STATUS_CODE_ERROR
    assert attributes(statement)["db.response.status_code"] == "XX000"
    assert not leaks(b"".join(collector[0].bodies))
    assert not leaks(process.output)


async def test_a_dead_collector_costs_a_second_at_the_end(database: str, tenant: str) -> None:
    """Of what it takes to drain; no call notices. It would be ten, for each batch."""
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


def test_without_the_extra_it_says_so(database: str, tmp_path: Path) -> None:
    (tmp_path / "opentelemetry.py").write_text("raise ImportError\n")
    with server_process(database, CHAT_TICKET_TRACES="true", PYTHONPATH=str(tmp_path)) as process:
        assert process.popen.wait(timeout=30) == 1
        assert process.stop() == 1
    said = "chat-ticket-svc: CHAT_TICKET_TRACES: needs the wheel's extra, tracing\n"
    assert process.output == said
