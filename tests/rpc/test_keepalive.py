"""Pings of clients: how often a client may check that its connection is alive.

gRPC's clients ping while they have no calls if they are told so, as meshes and load balancers do.
A server that does not allow that closes the connection after the fourth ping.
"""

import asyncio
import time
from pathlib import Path

import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined] # has no stubs
from support.http2 import Http2
from support.server import serving

from chat_ticket_svc import server

INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
# Of gRPC-Java and grpc-go, whose clients never ping more often.
SHORTEST_CLIENT_INTERVAL_SECONDS = 10
ENHANCE_YOUR_CALM = 11


def ping(address: str, count: int, seconds: float, wait_seconds: float) -> int | None:
    """Send pings, `seconds` apart, without any call. Returns the code of a GOAWAY.

    It is awaited for `wait_seconds` after the last ping.
    """
    with Http2(address) as connection:
        for number in range(count):
            if connection.goaway is not None:
                break
            connection.h2.ping(number.to_bytes(8, "big"))
            is_last = number == count - 1
            if seconds or is_last:  # at once in one write: between two, the server may close
                connection.flush()
            end = time.monotonic() + (wait_seconds if is_last else seconds)
            while (remaining := end - time.monotonic()) > 0 and not connection.is_closed:
                connection.receive(remaining)
        return connection.goaway


@pytest.mark.parametrize(
    ("seconds", "wait_seconds", "goaway"), [(0.15, 0.5, None), (0, 10, ENHANCE_YOUR_CALM)]
)
async def test_pings_without_calls(
    database: str,
    monkeypatch: pytest.MonkeyPatch,
    seconds: float,
    wait_seconds: float,
    goaway: int | None,
) -> None:
    """Allowed at the server's interval, which is short here. More frequent ones are not."""
    options = {**dict(server.OPTIONS), INTERVAL: 30}
    monkeypatch.setattr(server, "OPTIONS", list(options.items()))
    async with serving(database) as running:
        address = f"localhost:{running.port}"
        assert await asyncio.to_thread(ping, address, 8, seconds, wait_seconds) == goaway


def test_interval_suits_the_clients_that_ping_most_often() -> None:
    """With a margin, as the network may bring two pings closer together."""
    assert dict(server.OPTIONS)[INTERVAL] <= 1000 * SHORTEST_CLIENT_INTERVAL_SECONDS / 2
    assert dict(server.OPTIONS)["grpc.keepalive_permit_without_calls"] == 1


def test_grpc_knows_every_option() -> None:
    """It ignores those that it does not know, so a misspelt one has no effect."""
    library = Path(cygrpc.__file__).read_bytes()
    assert not [name for name, _ in server.OPTIONS if name.encode() + b"\0" not in library]
