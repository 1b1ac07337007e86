"""Settings for servers that tests kill, and options for clients that reconnect to them soon."""

import socket

SETTINGS = {
    "CHAT_TICKET_DRAIN_SECONDS": "1",
    "CHAT_TICKET_WATCH_HEARTBEAT_SECONDS": "0.3",
    "CHAT_TICKET_QUOTAS__TENANT_CALLS_PER_SECOND": "100000",
}


OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),  # the servers are back sooner than anywhere else
    # It is also how long gRPC lets an attempt to connect take, TLS handshake included.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 500),
]


def free_port() -> int:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]  # type: ignore[no-any-return]
