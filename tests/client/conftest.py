"""The tests of the Python client run for the asyncio client and for the synchronous one."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from support.client_calls import NewClient
from support.client_servers import OPTIONS
from support.threaded import ThreadedClient

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket_svc.server import Server


@pytest.fixture(
    params=[AsyncChatTicketClient, ThreadedClient], ids=lambda client_class: client_class.__name__
)
def client_class(request: pytest.FixtureRequest) -> type[AsyncChatTicketClient]:
    """The asyncio client, or the synchronous one in threads, which looks the same."""
    return request.param  # type: ignore[no-any-return]


@pytest_asyncio.fixture
async def connect(
    client_class: type[AsyncChatTicketClient], tenant: str
) -> AsyncIterator[NewClient]:
    """`connect(port, …)`: a client of a server on this machine, for the test's tenant."""
    async with contextlib.AsyncExitStack() as stack:

        def connect(port: int, **arguments: Any) -> AsyncChatTicketClient:
            arguments = {"tenant": tenant, "options": OPTIONS, **arguments}
            client = client_class(f"localhost:{port}", **arguments)
            stack.push_async_callback(client.close)
            return client

        yield connect


@pytest_asyncio.fixture
async def client(server: Server, connect: NewClient) -> AsyncChatTicketClient:
    """A client of the worker's server."""
    return connect(server.port)
