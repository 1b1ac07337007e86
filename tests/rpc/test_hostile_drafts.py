"""Streams that write drafts as no writer should: below gRPC, and left in every way."""

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import pytest_asyncio
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.drafts import (
    a_start,
    get_draft,
    leave_draft,
    list_drafts,
    unstarted,
    write_message,
    writing,
)
from support.http2 import Headers, Http2, WireAnswer, frame
from support.process import ServerProcess, server_process
from support.quotas import eventually, exceeds_quota

from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest, WriteChatDraftResponse
from chat_ticket_svc.server import Server
from chat_ticket_svc.store.draft_commit import DraftWriter
from chat_ticket_svc.telemetry import metrics

OK = "grpc-status 0"
INVALID_ARGUMENT = "grpc-status 3"


@pytest.fixture(scope="module")
def process(database: str) -> Iterator[ServerProcess]:
    settings = {
        "CHAT_TICKET_STREAM_WRITE_TIMEOUT_SECONDS": "0.5",
        "CHAT_TICKET_QUOTAS__TENANT_DRAFTS": "2",
    }
    with server_process(database, **settings) as process:
        yield process


@pytest_asyncio.fixture
async def writer(process: ServerProcess, tenant: str) -> AsyncIterator[Api]:
    """A client of the process, which afterwards has no internal error in its log."""
    async with Api(process.address, tenant) as api:
        yield api
        assert (await api.session()).tenant_id == tenant
    assert not [line for line in process.log if line["event"] == "internal error"]


def headers(api: Api) -> Headers:
    return [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/chat_ticket.v1.ChatDraftService/WriteChatDraft"),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"x-tenant-id", api.tenant.encode()),
    ]


def requests(*each: dict[str, Any]) -> bytes:
    return b"".join(frame(WriteChatDraftRequest(**one).SerializeToString()) for one in each)


def responses(answer: WireAnswer) -> list[WriteChatDraftResponse]:
    data, found = answer.data, []
    while data:
        end = 5 + int.from_bytes(data[1:5], "big")
        found.append(WriteChatDraftResponse.FromString(data[5:end]))
        data = data[end:]
    return found


def send(api: Api, data: bytes) -> WireAnswer:
    """A stream with these bytes, on a connection of its own."""
    with Http2(api.address) as connection:
        stream = connection.open(headers(api))
        connection.send(stream, data)
        return connection.answer(stream)


class TestWire:
    @pytest.mark.parametrize(
        "data", [b"", b"\0\0\0\0", frame(b"abc", length=100), frame(b"\xff"), frame(b"")]
    )
    async def test_stream_that_begins_with_no_start(self, writer: Api, data: bytes) -> None:
        """INVALID_ARGUMENT at once."""
        assert str(await asyncio.to_thread(send, writer, data)) == INVALID_ARGUMENT

    @pytest.mark.parametrize(
        "rest", [b"", frame(b"abc", length=100), frame(b"\xff\xff"), frame(b"\x0b" * 200)]
    )
    async def test_stream_that_ends_with_no_finish(self, writer: Api, rest: bytes) -> None:
        """INVALID_ARGUMENT, and the draft stays open with what was stored."""
        session, draft_id = await writer.session(), an_id()
        begun = requests(
            {"start": a_start(session.id, draft_id)}, {"append": {"offset": 0, "text": "hello"}}
        )
        answer = await asyncio.to_thread(send, writer, begun + rest)
        assert str(answer) == INVALID_ARGUMENT
        async with writing(writer, session.id, draft_id) as stream:
            await stream.append("hello", offset=0)
            assert (await stream.finish()).content == "hello"

    async def test_thousands_of_tiny_requests_at_once(self, writer: Api) -> None:
        """They are added together, and acknowledged together."""
        session, draft_id = await writer.session(), an_id()
        text = "abcdefghij" * 300
        data = requests(
            {"start": a_start(session.id, draft_id)},
            *({"append": {"offset": n, "text": letter}} for n, letter in enumerate(text)),
            *[{"append": {"offset": len(text)}}] * 2000,
            {"finish": {}},
        )
        answer = await asyncio.to_thread(send, writer, data)
        assert str(answer) == OK
        started, *written, finished = responses(answer)
        assert started.HasField("started")
        assert finished.finished.message.content == text
        assert 1 <= len(written) < (len(text) + 2000) / 2

    async def test_writer_that_never_reads(self, writer: Api) -> None:
        """The server waits for it no longer than for any other reader."""
        session = await writer.session()

        def write() -> Http2:
            connection = Http2(writer.address, window=0)
            for _ in range(2):
                stream = connection.open(headers(writer))
                data = requests({"start": a_start(session.id, an_id())})
                connection.send(stream, data, end=False)
            return connection

        with await asyncio.to_thread(write):
            async with asyncio.timeout(10):
                while len(await list_drafts(writer, session.id)) < 2:
                    await asyncio.sleep(0.01)
            with exceeds_quota("tenant_drafts", 2, writer):
                await write_message(writer, session.id)
            await eventually(lambda: write_message(writer, session.id))

    @pytest.mark.parametrize("how", ["reset", "disconnect"])
    async def test_stream_that_breaks(self, writer: Api, how: str) -> None:
        """In the middle of a request: what was acknowledged is kept."""
        session, draft_id = await writer.session(), an_id()

        def write() -> None:
            with Http2(writer.address) as connection:
                stream = connection.open(headers(writer))
                begun = requests(
                    {"start": a_start(session.id, draft_id)},
                    {"append": {"offset": 0, "text": "hello"}},
                )
                connection.send(stream, begun + frame(b"abc", length=100), end=False)
                while not any(each.written.length == 5 for each in received(connection, stream)):
                    connection.receive(10)
                if how == "reset":
                    connection.h2.reset_stream(stream)
                    connection.flush()

        await asyncio.to_thread(write)
        assert (await get_draft(writer, draft_id)).content == "hello"


def received(connection: Http2, stream: int) -> list[WriteChatDraftResponse]:
    return responses(connection.answers[stream])


async def cancel(api: Api, session_id: str, draft_id: str) -> None:
    await leave_draft(api, session_id, "hello", draft_id)


async def cancel_while_text_is_written(api: Api, session_id: str, draft_id: str) -> None:
    async with writing(api, session_id, draft_id) as stream:
        for _ in range(5):
            await stream.append("x" * 100)


async def be_refused(api: Api, session_id: str, draft_id: str) -> None:
    async with writing(api, session_id, draft_id) as stream:
        await stream.append("x", offset=9999)
        with refused(StatusCode.OUT_OF_RANGE, "DRAFT_GAP"):
            await stream.until_error()


async def disconnect(api: Api, session_id: str, draft_id: str) -> None:
    async with Api(api.address, api.tenant) as another:
        stream = writing(another, session_id, draft_id)
        await (await stream.__aenter__()).append("hello")


async def finish(api: Api, session_id: str, _: str) -> None:
    await write_message(api, session_id)


async def never_begin(api: Api, *_: str) -> None:
    async with unstarted(api) as stream:
        with contextlib.suppress(TimeoutError):
            await stream.next(timeout=0.01)


async def until_nothing_is_left(server: Server) -> None:
    """No writer, no text and no statement."""
    commit = server._draft_commit
    async with asyncio.timeout(10):
        while commit._writers or commit._dirty or commit._tasks or commit._writing:
            await asyncio.sleep(0.02)
        while [each for each in gc.get_objects() if isinstance(each, DraftWriter)]:
            gc.collect()
            await asyncio.sleep(0.05)
    [gauge] = metrics.DRAFT_WRITERS.collect()
    assert gauge.samples[0].value == 0


@pytest.mark.parametrize(
    "leave",
    [cancel, cancel_while_text_is_written, be_refused, disconnect, finish, never_begin],
    ids=lambda leave: leave.__name__,
)
async def test_stream_leaves_nothing_in_the_server(api: Api, server: Server, leave: Any) -> None:
    """However it ends. The draft stays, unless it was finished."""
    session = await api.session()
    draft_id = await leave_draft(api, session.id, "hello")
    await until_nothing_is_left(server)
    tasks = len(asyncio.all_tasks())
    for _ in range(40):
        await leave(api, session.id, draft_id)
    await until_nothing_is_left(server)
    assert len(asyncio.all_tasks()) <= tasks + 5
    assert [draft.id for draft in await list_drafts(api, session.id)] == [draft_id]
