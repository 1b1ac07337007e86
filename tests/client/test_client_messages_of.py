"""`messages_of` of the Python client: a list of messages that resumes when its stream breaks."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from support.client import an_id
from support.client_calls import NewClient, create_message, create_session_id
from support.client_servers import free_port

from chat_ticket import errors
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest
from chat_ticket_svc.server import Server

COUNT = 400


class CuttingProxy:
    """A network to the server whose connections end after so many bytes of the server's."""

    def __init__(self, server_port: int):
        self._server_port = server_port
        self.port = 0
        self.bytes_until_cut = 1024 * 1024
        self.cuts = 0
        self._connections: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator["CuttingProxy"]:
        listener = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = listener.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            listener.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(asyncio.create_task(self._connected(reader, writer)))

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        requests = asyncio.create_task(self._pass_on(reader, to_writer))
        left = self.bytes_until_cut
        try:
            while left > 0 and (data := await to_reader.read(64 * 1024)):
                writer.write(data)
                await writer.drain()
                left -= len(data)
            self.cuts += left <= 0
        finally:
            writer.transport.abort()
            to_writer.transport.abort()
            requests.cancel()
            await asyncio.gather(requests, return_exceptions=True)

    @staticmethod
    async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(64 * 1024):
                writer.write(data)
                await writer.drain()


@pytest_asyncio.fixture
async def proxy(server: Server) -> AsyncIterator[CuttingProxy]:
    async with CuttingProxy(server.port).listening() as proxy:
        yield proxy


@pytest_asyncio.fixture
async def session_id(server: Server, connect: NewClient) -> str:
    """A session of messages that no connection of the proxy carries all."""
    client = connect(server.port)
    session_id = await create_session_id(client)
    for _ in range(COUNT // 100):
        batch = BatchCreateChatMessagesRequest(session_id=session_id)
        for _ in range(100):
            batch.messages.add(role=r.CHAT_MESSAGE_ROLE_USER, content="0123456789abcdef" * 512)
        await client.messages.BatchCreateChatMessages(batch)
    return session_id


async def test_lists_every_message_once_over_broken_connections(
    server: Server, connect: NewClient, proxy: CuttingProxy, session_id: str
) -> None:
    """In order, and to the end that the first stream would have had."""
    sequences = []
    async with asyncio.timeout(60):
        async for message in connect(proxy.port).messages_of(session_id):
            if not sequences:
                await create_message(connect(server.port), session_id, "too late for this list")
            sequences.append(message.sequence)
    assert sequences == list(range(1, COUNT + 1))
    assert proxy.cuts >= 2

    rest = [m.sequence async for m in connect(server.port).messages_of(session_id, COUNT - 1)]
    assert rest == [COUNT, COUNT + 1]


async def test_session_that_is_deleted_during_a_break_is_not_found(
    server: Server, connect: NewClient, proxy: CuttingProxy, session_id: str
) -> None:
    """Also one that never was."""
    with pytest.raises(errors.NotFoundError):
        await anext(connect(server.port).messages_of(an_id()))
    messages = connect(proxy.port).messages_of(session_id)
    await anext(messages)
    delete = DeleteChatSessionRequest(session_id=session_id)
    await connect(server.port).sessions.DeleteChatSession(delete)
    async with asyncio.timeout(30):
        with pytest.raises(errors.NotFoundError):
            async for _ in messages:
                pass


async def test_gives_up_in_time_when_nothing_arrives(connect: NewClient) -> None:
    """With the last error: that of the connection, or that nothing came in time."""
    start = time.monotonic()
    with pytest.raises((errors.UnavailableError, errors.DeadlineExceededError)):
        await anext(connect(free_port()).messages_of(an_id(), timeout=1))
    assert time.monotonic() - start < 30
