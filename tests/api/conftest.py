"""Fixtures for the tests of attachment URLs, and of drafts that several servers serve."""

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
import pytest_asyncio
from support.client import Api
from support.server import serving
from support.sites import PRIVATE, Site, dns
from support.url_checkers import LONG_TIMEOUT, NewChecker, open_public

from chat_ticket_svc.server import Server
from chat_ticket_svc.services import attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

# So long that only a notification can arrive sooner.
NO_POLL = 3600


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> NewChecker:
    """Makes checkers to which PUBLIC is a public address, and a site's port the port of http."""
    open_public(monkeypatch)

    def checker(site: Site, **settings: Any) -> AttachmentUrlChecker:
        monkeypatch.setitem(attachment_url_policy.DEFAULT_PORTS, "http", site.port)
        return AttachmentUrlChecker(
            schemes=("http",), **{"resolver": dns({}), **LONG_TIMEOUT, **settings}
        )

    return checker


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses connected to, of which only PRIVATE answers."""
    attempts = []
    connect = anyio.connect_tcp

    async def connect_tcp(remote_host: Any, remote_port: int, **options: Any) -> Any:
        attempts.append(f"{remote_host} {remote_port}")
        if str(remote_host) != PRIVATE:
            raise OSError("no route to host")
        return await connect(remote_host, remote_port, **options)

    monkeypatch.setattr(anyio, "connect_tcp", connect_tcp)
    return attempts


@pytest_asyncio.fixture(scope="session")
async def second_server(database: str) -> AsyncIterator[Server]:
    """Another server on the worker's database, which never polls."""
    async with serving(database, watch_poll_interval_seconds=NO_POLL) as server:
        yield server


@pytest_asyncio.fixture
async def another_server(second_server: Server, tenant: str) -> AsyncIterator[Api]:
    """A client of it, acting for the same tenant as `api`."""
    async with Api(f"127.0.0.1:{second_server.port}", tenant) as api:
        yield api
