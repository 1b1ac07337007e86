"""The access log: the lines of each call, and the request id that leads from an error to them."""

import asyncio
import contextlib
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from io import FileIO
from typing import Any

import grpc.aio
import pytest
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from support.client import REQUEST_ID, Api, an_id, refused
from support.process import ServerProcess, server_process
from test_errors import locked
from test_watch import watching

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


async def line(process: ServerProcess, event: str, **of: str) -> dict[str, Any]:
    """The one with this event and these values; a line follows its call by a moment."""
    async with asyncio.timeout(10):
        while True:
            found = [
                each
                for each in process.log
                if each["event"] == event and of.items() <= each.items()
            ]
            if found:
                assert len(found) == 1
                return found[0]
            await asyncio.sleep(0.01)


async def test_a_call_is_one_line(process: ServerProcess, api: Api, tenant: str) -> None:
    """Who called what, how it ended, and how long and how large it was."""
    session = await api.session()
    request = GetChatSessionRequest(session_id=session.id)
    response = await api.sessions.GetChatSession(request)
    fields = await line(process, "finished call", method=GET, tenant=tenant)
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


async def test_a_refused_call_has_its_reason(process: ServerProcess, api: Api, tenant: str) -> None:
    with refused(StatusCode.NOT_FOUND):
        await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
    fields = await line(process, "finished call", method=GET, tenant=tenant)
    assert (fields["code"], fields["reason"]) == ("NOT_FOUND", "CHAT_SESSION_NOT_FOUND")
    assert (fields["responses"], fields["response_bytes"]) == (0, 0)


async def test_a_call_whose_deadline_passed_says_so(
    process: ServerProcess, api: Api, tenant: str, database: str
) -> None:
    """gRPC cancels it; the caller has not left."""
    session = await api.session()
    message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="x" * 10_000)
    request = CreateChatMessageRequest(session_id=session.id, message=message)
    stub, metadata = api.messages._stub, [("x-tenant-id", tenant)]
    with locked(database, session.id), pytest.raises(grpc.aio.AioRpcError):
        await stub.CreateChatMessage(request, metadata=metadata, timeout=0.3)
    fields = await line(process, "finished call", method=CREATE, tenant=tenant)
    assert fields["code"] == "DEADLINE_EXCEEDED"


async def test_a_call_without_a_tenant_has_none(process: ServerProcess) -> None:
    async with Api(process.address, "") as api:
        with refused(StatusCode.UNAUTHENTICATED, "TENANT_REQUIRED"):
            await api.sessions.GetChatSession(GetChatSessionRequest(session_id=an_id()))
    assert "tenant" not in await line(process, "finished call", reason="TENANT_REQUIRED")


async def test_a_stream_is_logged_when_it_starts_and_when_it_finishes(
    process: ServerProcess, api: Api, tenant: str
) -> None:
    """The second with what went through it."""
    session = await api.session()
    await api.message(session.id)
    sent = [
        each
        async for each in api.messages.ListChatMessages(
            ListChatMessagesRequest(session_id=session.id)
        )
    ]
    started = await line(process, "started call", method=LIST, tenant=tenant)
    finished = await line(process, "finished call", method=LIST, tenant=tenant)
    assert started["session_id"] == finished["session_id"] == session.id
    assert started["request_id"] == finished["request_id"]
    assert "code" not in started
    assert finished["code"] == "OK"
    assert finished["responses"] == len(sent) > 0
    assert finished["response_bytes"] == sum(each.ByteSize() for each in sent)


async def test_a_stream_that_its_caller_left_is_cancelled(
    process: ServerProcess, api: Api, tenant: str
) -> None:
    session = await api.session()
    async with watching(api, session.id):
        await line(process, "started call", method=WATCH, tenant=tenant)
    finished = await line(process, "finished call", method=WATCH, tenant=tenant)
    assert finished["code"] == "CANCELLED"


async def test_a_stream_that_is_rejected_is_not_logged_as_started(process: ServerProcess) -> None:
    own = f"of-{an_id()}"
    async with Api(process.address, "") as api:
        request = WatchChatSessionRequest(session_id=an_id())
        call = api.sessions._stub.WatchChatSession(request, metadata=[("x-request-id", own)])
        with refused(StatusCode.UNAUTHENTICATED):
            await call.read()
    assert (await line(process, "finished call", request_id=own))["code"] == "UNAUTHENTICATED"
    events = [each["event"] for each in process.log if each.get("request_id") == own]
    assert events == ["finished call"]


class TestRequestId:
    """x-request-id, by which a caller's report leads to the line."""

    async def call(self, api: Api, *values: str) -> str:
        """The request id that an error carries."""
        metadata = [("x-tenant-id", api.tenant), *(("x-request-id", each) for each in values)]
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
        given = f"of-{tenant[-12:]}"
        assert await self.call(api, given) == given
        await line(process, "finished call", request_id=given)

    async def test_without_one_a_call_gets_one(self, process: ServerProcess, api: Api) -> None:
        first, second = await self.call(api), await self.call(api)
        assert first != second
        await line(process, "finished call", request_id=first)

    @pytest.mark.parametrize("given", ["", "two words", "x" * 129], ids=["", "space", "long"])
    async def test_what_is_no_id_is_replaced(self, api: Api, given: str) -> None:
        """It has to fit into a line, and to be found in it."""
        assert len(await self.call(api, given)) == 16


async def test_what_is_no_session_id_is_in_no_line(process: ServerProcess, api: Api) -> None:
    """It may be anything that a caller takes for one."""
    hostile = f"content {an_id()}"
    with refused(StatusCode.INVALID_ARGUMENT):
        await api.sessions.WatchChatSession(WatchChatSessionRequest(session_id=hostile)).read()
    await line(process, "finished call", code="INVALID_ARGUMENT")
    assert hostile not in process.output


async def test_health_checks_are_not_logged(process: ServerProcess, api: Api, tenant: str) -> None:
    """They come every few seconds, for ever."""
    await api.health.Check(health_pb2.HealthCheckRequest())
    await api.session()
    await line(process, "finished call", tenant=tenant)
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
    """They wait for one another for a moment, which may be the last."""
    with server_process(database) as process:
        process.wait_for("serving")
        async with Api(process.address, tenant) as api:
            session = await api.session()
            async with watching(api, session.id):
                await line(process, "started call")
                assert process.stop() == 0
        finished = [each for each in process.log if each["event"] == "finished call"]
        assert WATCH in [each["method"] for each in finished]


def plain(output: str) -> str:
    """Without its colours."""
    return re.sub(r"\x1b\[\d*m", "", output)


async def test_people_get_lines_for_people(database: str, tenant: str) -> None:
    """On a terminal, or when asked for: no JSON."""
    with server_process(database, CHAT_TICKET_LOG_FORMAT="console") as process:
        async with asyncio.timeout(30):
            while "serving" not in process.output:
                await asyncio.sleep(0.05)
        port = re.search(r"port=(\d+)", plain(process.output))[1]
        async with Api(f"127.0.0.1:{port}", tenant) as api:
            await api.session()
        process.stop()
        [printed] = [
            each for each in plain(process.output).splitlines() if "CreateChatSession" in each
        ]
        assert "finished call" in printed
        assert "code=OK" in printed
        assert "{" not in printed


@contextlib.contextmanager
def pipe() -> Iterator[tuple[FileIO, FileIO]]:
    ours, theirs = (FileIO(number, mode) for number, mode in zip(os.pipe(), "rw", strict=True))
    with ours, theirs:
        yield ours, theirs


class TestReader:
    """Of the log: calls do not wait for it."""

    @pytest.mark.parametrize("reader", ["stops", "leaves"])
    async def test_calls_go_on_without_it(self, database: str, tenant: str, reader: str) -> None:
        """And so does the end."""
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
                told = b""
                while b'"serving"' not in told:
                    told += await asyncio.to_thread(ours.read, 10_000)
                if reader == "leaves":
                    ours.close()
                port = re.search(rb'"port": (\d+)', told)[1].decode()
                async with Api(f"127.0.0.1:{port}", tenant) as api:
                    # Of lines of 300 bytes a pipe holds 200.
                    for _ in range(30):
                        await asyncio.gather(*(api.session() for _ in range(20)))
                process.terminate()
                assert await asyncio.to_thread(process.wait, 20) == 0
            finally:
                process.kill()
                process.wait()

    def test_it_misses_nothing_where_writes_do_not_block(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a parent that shares its terminal or pipe may have set it."""
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

    def test_it_is_told_how_many_lines_it_missed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """When it reads again."""
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
            kept = read.count(b"\n")
            assert kept < 300, "it was full"
            deadline = time.monotonic() + 10
            while "log lines dropped" not in (out := capsys.readouterr().out):
                assert time.monotonic() < deadline
            assert f"lines={500 - kept}" in re.sub(r"\x1b\[\d*m", "", out)
