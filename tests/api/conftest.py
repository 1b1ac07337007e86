"""Fixtures for the tests of attachment URLs."""

from typing import Any

import anyio
import pytest
from support.sites import PRIVATE, Site, dns
from support.url_checkers import LONG_TIMEOUT, NewChecker, open_public

from chat_ticket_svc.services import attachment_url_policy
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker


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
