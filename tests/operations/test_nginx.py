"""docs/nginx.conf: every kind of call works through nginx as without it."""

from collections.abc import AsyncIterator
from pathlib import Path

import grpc.aio
import pytest
import pytest_asyncio
from grpc import StatusCode
from support import balancer
from support.client import Api, an_id, refused
from support.watching import watching

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import BatchCreateChatMessagesRequest
from chat_ticket_svc.server import Server

pytestmark = pytest.mark.skipif(balancer.program() is None, reason="nginx is not installed")


@pytest_asyncio.fixture(scope="module")
async def address(server: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The address of an nginx in front of the worker's server, which is both backends."""
    directory: Path = tmp_path_factory.mktemp("nginx")
    servers = [f"127.0.0.1:{server.port}"] * 2
    with balancer.nginx(directory, servers) as address:
        yield address


@pytest_asyncio.fixture
async def through(address: str, tenant: str) -> AsyncIterator[Api]:
    async with Api(address, tenant) as api:
        yield api


async def test_writes_reads_and_streams(through: Api) -> None:
    """Also a message of nearly as much as the service takes."""
    session = await through.session()
    async with watching(through, session.id) as watcher:
        message = await through.message(session.id, "x" * 200_000)
        await watcher.until_revision(message.sequence)
        assert watcher.messages[message.id] == message


async def test_largest_error_trailers(through: Api, api: Api) -> None:
    """Its details fill the trailers."""
    session = await through.session()
    messages = [r.ChatMessage(id="x" * 30, content="", metadata_json="{")] * 500
    request = BatchCreateChatMessagesRequest(session_id=session.id, messages=messages)
    with refused(StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT") as refusal:
        await through.messages.BatchCreateChatMessages(request)
    with refused(StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT") as directly:
        await api.messages.BatchCreateChatMessages(request)
    assert refusal.details["BadRequest"] == directly.details["BadRequest"]


async def test_too_large_a_request(through: Api) -> None:
    """The service rejects it, and its status reaches the caller."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await through.message(an_id(), "x" * (4 * 1024 * 1024))
    assert caught.value.code() is StatusCode.RESOURCE_EXHAUSTED


async def test_no_backend_is_available(tmp_path: Path, tenant: str) -> None:
    """Is UNAVAILABLE, as without nginx."""
    with balancer.nginx(tmp_path, ["127.0.0.1:1"] * 2) as address:
        async with Api(address, tenant) as api:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.session()
            assert caught.value.code() is StatusCode.UNAVAILABLE
