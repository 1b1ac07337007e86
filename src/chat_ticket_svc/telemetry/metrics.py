"""What a server process measures of itself, for Prometheus: every metric is declared here.

Calls have the names and labels of the other gRPC implementations (grpc_server_handled_total), so
that their dashboards fit. No label has an id, so that there are always as many series.
"""

import importlib.metadata
import platform
from http.server import HTTPServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    start_http_server,
)

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
CALL = ("grpc_type", "grpc_service", "grpc_method", "grpc_code")

HANDLED = Counter(
    "grpc_server_handled", "Calls and streams that have ended.", CALL, registry=REGISTRY
)
HANDLING_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "How long unary calls took, from when they were taken in.",
    CALL,
    buckets=SECONDS,
    registry=REGISTRY,
)
STREAMS = Gauge(
    "chat_ticket_streams_open",
    "Streams that are open.",
    ("grpc_service", "grpc_method"),
    registry=REGISTRY,
)
REJECTED = Counter(
    "chat_ticket_rejected",
    "Calls refused with RESOURCE_EXHAUSTED, by the quota or the reason.",
    ("limit",),
    registry=REGISTRY,
)
WATCHERS = Gauge("chat_ticket_watchers", "Streams that follow a session.", registry=REGISTRY)
WATCH_DELIVERY_SECONDS = Histogram(
    "chat_ticket_watch_delivery_seconds",
    "From when this process heard of a change until its watchers were told.",
    buckets=SECONDS,
    registry=REGISTRY,
)
NOTIFY_BATCH_SESSIONS = Histogram(
    "chat_ticket_notify_batch_sessions",
    "Sessions of which one NOTIFY told the other processes.",
    buckets=(1, 2, 4, 8, 16, 27),
    registry=REGISTRY,
)
POOL_CONNECTIONS = Gauge(
    "chat_ticket_pool_connections", "Connections to the database.", registry=REGISTRY
)
POOL_IDLE = Gauge("chat_ticket_pool_idle_connections", "Those that nobody uses.", registry=REGISTRY)
POOL_WAITING = Gauge(
    "chat_ticket_pool_waiting_calls", "Calls that wait for a connection.", registry=REGISTRY
)
POOL_WAIT_SECONDS = Histogram(
    "chat_ticket_pool_wait_seconds",
    "How long calls waited for a connection that they got.",
    buckets=SECONDS,
    registry=REGISTRY,
)
Info("chat_ticket_build", "What runs.", registry=REGISTRY).info(
    {
        "version": importlib.metadata.version("chat-ticket-svc"),
        "python": platform.python_version(),
        "grpcio": importlib.metadata.version("grpcio"),
    }
)


def serve(host: str, port: int) -> HTTPServer:
    """Answer GET /metrics, in a thread, until `shutdown`; raises OSError when the port is taken."""
    server, _ = start_http_server(port, host.strip("[]"), REGISTRY)
    return server
