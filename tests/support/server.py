"""A server in the process of the tests."""

import contextlib
from collections.abc import AsyncIterator

import pytest

from chat_ticket_svc import config, server
from chat_ticket_svc.server import Server
from support import pooler


@contextlib.asynccontextmanager
async def serving(database_url: str, **settings: object) -> AsyncIterator[Server]:
    """A server in this process, on a free port, with high quotas.

    Its drain is whole when the test sets `drain_seconds`. Otherwise balancers and callers, of which
    there are none by then, get no time to notice it: half a second for each server.
    """
    defaults = {
        "port": 0,
        "attachment_url_check": False,
        "drain_seconds": 0.2,
        "quotas": {"tenant_calls_per_second": 100_000},
    }
    database = {
        name.removeprefix(config.PREFIX).lower() if name.startswith(config.PREFIX) else name: value
        for name, value in pooler.environment(database_url).items()
    }
    started = Server(config.load(**{**database, **defaults, **settings}))
    await started.start()
    try:
        yield started
    finally:
        with pytest.MonkeyPatch.context() as patch:
            if "drain_seconds" not in settings:
                for name in ("DRAIN_NOTICE_SECONDS", "DRAIN_QUIET_SECONDS", "GOAWAY_SEND_SECONDS"):
                    patch.setattr(server, name, 0)
            await started.stop()
