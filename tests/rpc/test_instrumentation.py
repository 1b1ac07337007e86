"""The access log: the lines of each call, and the request id that leads from an error to them."""

import asyncio
import contextlib
import logging
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from io import FileIO
from typing import Any

import grpc.aio
import pytest
import structlog
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from support.client import REQUEST_ID, Api, an_id, refused
from support.database import session_locked
from support.process import ServerProcess, log_line, server_process
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import CreateChatMessageRequest, ListChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import GetChatSessionRequest, WatchChatSessionRequest
from chat_ticket_svc.telemetry import log_writer

GET = "chat_ticket.v1.ChatSessionService/GetChatSession"
CREATE = "chat_ticket.v1.ChatMessageService/CreateChatMessage"
LIST = "chat_ticket.v1.ChatMessageService/ListChatMessages"
WATCH = "chat_ticket.v1.ChatSessionService/WatchChatSession"


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    with server_process(database) as process:
        process.wait_for("serving")
        yield process


@pytest.fixture
async def api(process: ServerProcess, tenant: str) -> Any:
    async with Api(process.address, tenant) as api:
        yield api


async def test_a_call_is_one_line(process: ServerProcess, api: Api, tenant: str) -> None:
    """The line has the method, the tenant, the code, the duration and the sizes."""
    session = await api.session()
    request = GetChatSessionRequest(session_id=session.id)
    response = await api.sessions.GetChatSession(request)
    fields = await log_line(process, "finished call", method=GET, tenant=tenant)
    assert fields.pop("timestamp").endswith("Z")
    assert 0 < fields.pop("duration_ms") < 60_000
    assert fields == {
        "request_id": REQUEST_ID,
        "event": "finished call",
        "level": "info",
        "method": GET,
        "tenant": tenant,
        "code": "OK",
        "request_bytes": request.ByteSize(),
        "responses": 1,
        "response_bytes": response.ByteSize(),
    }


async def test_rejected_call_is_logged_with_its_reason(
    process: ServerProcess, api: Api, tenant: str
) -> None:
    with refused(StatusCode.NOT_FOUND):
        await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
    fields = await log_line(process, "finished call", method=GET, tenant=tenant)
    assert (fields["code"], fields["reason"]) == ("NOT_FOUND", "CHAT_SESSION_NOT_FOUND")
    assert (fields["responses"], fields["response_bytes"]) == (0, 0)


async def test_call_past_its_deadline_is_logged_as_deadline_exceeded(
    process: ServerProcess, api: Api, tenant: str, database: str
) -> None:
    """gRPC cancels the call at its deadline; the caller did not cancel it."""
    session = await api.session()
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 10_000)
    request = CreateChatMessageRequest(session_id=session.id, message=message)
    stub, metadata = api.messages._stub, [("x-tenant-id", tenant)]
    with session_locked(database, session.id), pytest.raises(grpc.aio.AioRpcError):
        await stub.CreateChatMessage(request, metadata=metadata, timeout=0.3)
    fields = await log_line(process, "finished call", method=CREATE, tenant=tenant)
    assert fields["code"] == "DEADLINE_EXCEEDED"


async def test_call_without_a_tenant_is_logged_without_one(process: ServerProcess) -> None:
    async with Api(process.address, "") as api:
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
    assert "tenant" not in await log_line(process, "finished call", reason="TENANT_REQUIRED")


async def test_a_stream_is_logged_when_it_starts_and_when_it_finishes(
    process: ServerProcess, api: Api, tenant: str
) -> None:
    """The line of the finish has the counts of messages and bytes."""
    session = await api.session()
    await api.message(session.id)
    sent = [
        each
        async for each in api.messages.ListChatMessages(
            ListChatMessagesRequest(session_id=session.id)
        )
    ]
    started = await log_line(process, "started call", method=LIST, tenant=tenant)
    finished = await log_line(process, "finished call", method=LIST, tenant=tenant)
    assert started["session_id"] == finished["session_id"] == session.id
    assert started["request_id"] == finished["request_id"]
    assert "code" not in started
    assert finished["code"] == "OK"
    assert finished["responses"] == len(sent) > 0
    assert finished["response_bytes"] == sum(response.ByteSize() for response in sent)


async def test_a_stream_that_its_caller_left_is_cancelled(
    process: ServerProcess, api: Api, tenant: str
) -> None:
    session = await api.session()
    async with watching(api, session.id):
        await log_line(process, "started call", method=WATCH, tenant=tenant)
    finished = await log_line(process, "finished call", method=WATCH, tenant=tenant)
    assert finished["code"] == "CANCELLED"


async def test_a_stream_that_is_rejected_is_not_logged_as_started(process: ServerProcess) -> None:
    own = f"of-{an_id()}"
    async with Api(process.address, "") as api:
        request = WatchChatSessionRequest(session_id=an_id())
        call = api.sessions._stub.WatchChatSession(request, metadata=[("x-request-id", own)])
        with refused(StatusCode.UNAUTHENTICATED):
            await call.read()
    assert (await log_line(process, "finished call", request_id=own))["code"] == "UNAUTHENTICATED"
    events = [line["event"] for line in process.log if line.get("request_id") == own]
    assert events == ["finished call"]


class TestRequestId:
    """x-request-id, by which a caller's report leads to the line."""

    async def call(self, api: Api, *values: str) -> str:
        """The request id that an error carries."""
        metadata = [("x-tenant-id", api.tenant), *(("x-request-id", value) for value in values)]
        stub = api.sessions._stub
        with refused(StatusCode.NOT_FOUND) as refusal:
            await stub.GetChatSession(
                GetChatSessionRequest(session_id=an_id()), metadata=metadata, timeout=60
            )
        request_id: str = refusal.details["RequestInfo"].request_id
        return request_id

    async def test_the_callers_is_in_the_line_and_in_the_error(
        self, process: ServerProcess, api: Api, tenant: str
    ) -> None:
        request_id = f"of-{tenant[-12:]}"
        assert await self.call(api, request_id) == request_id
        await log_line(process, "finished call", request_id=request_id)

    async def test_without_one_a_call_gets_one(self, process: ServerProcess, api: Api) -> None:
        first, second = await self.call(api), await self.call(api)
        assert first != second
        await log_line(process, "finished call", request_id=first)

    @pytest.mark.parametrize("request_id", ["", "two words", "x" * 129], ids=["", "space", "long"])
    async def test_invalid_request_id_is_replaced(self, api: Api, request_id: str) -> None:
        """An id must fit into a log line and be searchable."""
        assert len(await self.call(api, request_id)) == 16


async def test_invalid_session_id_is_not_logged(process: ServerProcess, api: Api) -> None:
    """It may be any text of the caller."""
    hostile = f"content {an_id()}"
    with refused(StatusCode.INVALID_ARGUMENT):
        await api.sessions.WatchChatSession(WatchChatSessionRequest(session_id=hostile)).read()
    await log_line(process, "finished call", code="INVALID_ARGUMENT")
    assert hostile not in process.output


async def test_health_checks_are_not_logged(process: ServerProcess, api: Api, tenant: str) -> None:
    """They would be logged every few seconds."""
    await api.health.Check(health_pb2.HealthCheckRequest())
    await api.session()
    await log_line(process, "finished call", tenant=tenant)
    assert "grpc.health" not in process.output


async def test_the_lines_can_be_turned_off(database: str, tenant: str) -> None:
    with server_process(database, CHAT_TICKET_ACCESS_LOG="false") as process:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            await api.session()
        assert process.stop() == 0
        assert "draining" in process.output
        assert "CreateChatSession" not in process.output


async def test_the_last_lines_are_written_before_the_end(database: str, tenant: str) -> None:
    """The writer batches lines, and shutdown must flush the last batch."""
    with server_process(database) as process:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            session = await api.session()
            async with watching(api, session.id):
                await log_line(process, "started call")
                assert process.stop() == 0
        finished = [line for line in process.log if line["event"] == "finished call"]
        assert WATCH in [line["method"] for line in finished]


def plain(output: str) -> str:
    """Without its colours."""
    return re.sub(r"\x1b\[\d*m", "", output)


async def test_console_format_is_for_terminals(database: str, tenant: str) -> None:
    """On a terminal, or with CHAT_TICKET_LOG_FORMAT=console, lines are not JSON."""
    with server_process(database, CHAT_TICKET_LOG_FORMAT="console") as process:
        async with asyncio.timeout(30):
            while "serving" not in process.output:
                await asyncio.sleep(0.05)
        port = re.search(r"port=(\d+)", plain(process.output))[1]
        async with Api(f"127.0.0.1:{port}", tenant) as api:
            await api.session()
        process.stop()
        [printed] = [
            line for line in plain(process.output).splitlines() if "CreateChatSession" in line
        ]
        assert "finished call" in printed
        assert "code=OK" in printed
        assert "{" not in printed


def test_lines_of_calls_are_as_structlog_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte: the other lines are made by structlog."""
    generator = random.Random(1)
    texts = ["", "GetChatSession", 'a "quoted" \\ ö \u2028 \x7f', "\ud83d\ude00", "tenant 1"]
    lines = [
        {
            name: generator.choice([*texts, 0, -7, 2**40, 0.125, 1e-7, 123456.789, None, True])
            for name in generator.sample(["method", "tenant", "code", "reason", "duration_ms"], 4)
        }
        for _ in range(100)
    ]
    times = [generator.uniform(1.7e9, 1.9e9) for _ in lines]
    times[:4] = [1.8e9, 1.8e9 + 0.9999996, 1.8e9 + 0.0000004, 1.8e9 - 0.000001]
    written: list[str] = []
    monkeypatch.setattr(log_writer.writer, "write", written.append)
    ours = log_writer.AccessLogger()
    ours.configure(min_level=logging.INFO, json_lines=True, common_fields={"pid": 7})
    for seconds, fields in zip(times, lines, strict=True):
        ours._lines.append(("info", "finished call", seconds, fields))
    ours.flush()
    render = structlog.processors.JSONRenderer()
    assert "".join(written).splitlines() == [
        render(
            None,
            "info",
            {
                "timestamp": datetime.fromtimestamp(seconds, UTC).isoformat()[:-6] + "Z",
                **fields,
                "event": "finished call",
                "level": "info",
                "pid": 7,
            },
        )
        for seconds, fields in zip(times, lines, strict=True)
    ]


@contextlib.contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    ours, theirs = (FileIO(number, mode) for number, mode in zip(os.pipe(), "rw", strict=True))
    with ours, theirs:
        yield ours, theirs


class TestReader:
    """Of the log: calls do not wait for it."""

    @pytest.mark.parametrize("reader", ["stops", "leaves"])
    async def test_calls_continue_when_nobody_reads_the_log(
        self, database: str, tenant: str, reader: str
    ) -> None:
        """The server also ends without a delay."""
        settings = {
            "DATABASE_URL": database,
            "CHAT_TICKET_PORT": "0",
            "CHAT_TICKET_LOG_FORMAT": "json",
            "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "10000",
        }
        with pipe() as (ours, theirs):
            process = subprocess.Popen(  # noqa: ASYNC220 - it does not take long
                [sys.executable, "-m", "chat_ticket_svc", "serve"],
                env={**os.environ, **settings},
                stderr=theirs,
            )
            try:
                theirs.close()
                output = b""
                while b'"serving"' not in output:
                    output += await asyncio.to_thread(ours.read, 10_000)
                if reader == "leaves":
                    ours.close()
                port = re.search(rb'"port": (\d+)', output)[1].decode()
                async with Api(f"127.0.0.1:{port}", tenant) as api:
                    # Of lines of 300 bytes a pipe holds 200.
                    for _ in range(30):
                        await asyncio.gather(*(api.session() for _ in range(20)))
                process.terminate()
                assert await asyncio.to_thread(process.wait, 20) == 0
            finally:
                process.kill()
                process.wait()

    def test_no_line_is_dropped_on_a_non_blocking_stream(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A parent process may have set O_NONBLOCK on a shared terminal or pipe."""
        with pipe() as (ours, theirs):
            monkeypatch.setattr(log_writer, "STANDARD_ERROR", theirs.fileno())
            os.set_blocking(theirs.fileno(), False)
            output = log_writer.StderrWriter()
            output.start()
            output.write(("x" * 999 + "\n") * 500)
            read = b""
            while read.count(b"\n") < 500:
                assert select.select([ours], [], [], 10)[0], "no more comes"
                read += ours.read(10_000)
            output.drain()

    def test_dropped_lines_are_counted_in_the_log(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """When the reader continues."""
        with pipe() as (ours, theirs):
            monkeypatch.setattr(log_writer, "STANDARD_ERROR", theirs.fileno())
            monkeypatch.setattr(log_writer, "MAX_BUFFERED_CHARACTERS", 100_000)
            output = log_writer.StderrWriter()
            output.start()
            line = "x" * 999 + "\n"
            for _ in range(500):
                output.write(line)
            os.set_blocking(ours.fileno(), False)
            read, is_written = b"", False
            while not is_written:
                is_written = not output._pending_characters
                read += ours.read(1_000_000) or b""
            assert read.count(b"\n") < 300, "it was full"
            deadline = time.monotonic() + 10
            out, dropped = "", 0
            while dropped + read.count(b"\n") < 500:
                assert time.monotonic() < deadline
                read += ours.read(1_000_000) or b""
                out += capsys.readouterr().out
                counts = re.findall(r"lines dropped.* lines=(\d+)", re.sub(r"\x1b\[\d*m", "", out))
                dropped = sum(map(int, counts))
            assert dropped + read.count(b"\n") == 500
