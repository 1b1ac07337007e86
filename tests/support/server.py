"""A server in the process of the tests."""

import contextlib
from collections.abc import AsyncIterator

from chat_ticket_svc import config
from chat_ticket_svc.server import Server
from support import pooler


@contextlib.asynccontextmanager
async def serving(database_url: str, **settings: object) -> AsyncIterator[Server]:
    """A server in this process, on a free port, with a short drain and high quotas."""
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
    server = Server(config.load(**{**database, **defaults, **settings}))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
