"""All Prometheus metrics of a server process, and the HTTP server that exposes them.

The metrics of calls have the names and labels of other gRPC implementations
(grpc_server_handled_total), so that existing dashboards work. No label holds an id, so the number
of time series is bounded.
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

from chat_ticket_svc.telemetry.call_metrics import CallMetrics

REGISTRY = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

CALLS = CallMetrics(SECONDS)
REGISTRY.register(CALLS)

STREAMS = Gauge(
    "chat_ticket_streams_open",
    "Open streams, by method.",
    ("grpc_service", "grpc_method"),
    registry=REGISTRY,
)
REJECTED = Counter(
    "chat_ticket_rejected",
    "Calls and streams refused with RESOURCE_EXHAUSTED, by quota or reason.",
    ("limit",),
    registry=REGISTRY,
)
WATCHERS = Gauge("chat_ticket_watchers", "Streams that watch a session.", registry=REGISTRY)
WATCH_DELIVERY_SECONDS = Histogram(
    "chat_ticket_watch_delivery_seconds",
    "Time from when this process learns of a change until its watchers receive it.",
    buckets=SECONDS,
    registry=REGISTRY,
)
NOTIFY_BATCH_SESSIONS = Histogram(
    "chat_ticket_notify_batch_sessions",
    "Sessions in one NOTIFY to the other processes.",
    buckets=(1, 2, 4, 8, 16, 27),
    registry=REGISTRY,
)
FEED_FOLLOWERS = Gauge(
    "chat_ticket_feed_followers", "Streams of the change feeds of tenants.", registry=REGISTRY
)
FEED_CHANGES = Counter(
    "chat_ticket_feed_changes",
    "Changed sessions and tickets, and deletions, that were read for the change feeds of tenants.",
    registry=REGISTRY,
)
FEED_DELIVERY_SECONDS = Histogram(
    "chat_ticket_feed_delivery_seconds",
    "Time from when this process learns of a change until the followers of the feed receive it.",
    buckets=SECONDS,
    registry=REGISTRY,
)
FEED_HELD_UP_SECONDS = Gauge(
    "chat_ticket_feed_held_up_seconds",
    "How long changes have been waiting for older transactions to end before the feed tells them.",
    registry=REGISTRY,
)
DRAFT_WRITERS = Gauge("chat_ticket_draft_writers", "Streams that write a draft.", registry=REGISTRY)
DRAFT_PIECES = Counter(
    "chat_ticket_draft_pieces", "Pieces of text that were added to drafts.", registry=REGISTRY
)
DRAFT_BYTES = Counter(
    "chat_ticket_draft_bytes", "Bytes of text that were added to drafts.", registry=REGISTRY
)
DRAFT_COMMIT_SECONDS = Histogram(
    "chat_ticket_draft_commit_seconds",
    "Time of a statement that adds text to drafts, with its commit.",
    buckets=SECONDS,
    registry=REGISTRY,
)
DRAFT_COMMIT_DRAFTS = Histogram(
    "chat_ticket_draft_commit_drafts",
    "Drafts in one statement that adds text.",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    registry=REGISTRY,
)
DRAFT_TAKEOVERS = Counter(
    "chat_ticket_draft_takeovers",
    "Open drafts that a stream took over, mostly those of writers that resumed.",
    registry=REGISTRY,
)
DRAFTS_EXPIRED = Counter(
    "chat_ticket_drafts_expired",
    "Drafts of lost writers that this process has finished.",
    registry=REGISTRY,
)
TOMBSTONES_SWEPT = Counter(
    "chat_ticket_tombstones_swept",
    "Ids of sessions and tickets deleted long ago that this process has forgotten.",
    registry=REGISTRY,
)
POOL_CONNECTIONS = Gauge(
    "chat_ticket_pool_connections", "Connections in the database pool.", registry=REGISTRY
)
POOL_IDLE = Gauge(
    "chat_ticket_pool_idle_connections", "Idle connections in the database pool.", registry=REGISTRY
)
POOL_WAITING = Gauge(
    "chat_ticket_pool_waiting_calls",
    "Calls that wait for a connection from the pool.",
    registry=REGISTRY,
)
POOL_WAIT_SECONDS = Histogram(
    "chat_ticket_pool_wait_seconds",
    "Time that calls waited for a connection, when they got one.",
    buckets=SECONDS,
    registry=REGISTRY,
)
DATABASE_UP = Gauge(
    "chat_ticket_database_up",
    "1 while the database can be reached and has all migrations, else 0.",
    registry=REGISTRY,
)
TLS_CERTIFICATE_NOT_AFTER = Gauge(
    "chat_ticket_tls_certificate_not_after_timestamp_seconds",
    "When the server's TLS certificate expires, in seconds since the epoch. 0 without TLS.",
    registry=REGISTRY,
)
BUILD = Info(
    "chat_ticket_build",
    "The version of the service, of Python and of grpcio, as labels. The value is 1.",
    registry=REGISTRY,
)
BUILD.info(
    {
        "version": importlib.metadata.version("chat-ticket-svc"),
        "python": platform.python_version(),
        "grpcio": importlib.metadata.version("grpcio"),
    }
)


def serve(host: str, port: int) -> HTTPServer:
    """Serve GET /metrics on a thread until `shutdown`. Raises OSError if the port is in use."""
    server, _ = start_http_server(port, host.strip("[]"), REGISTRY)
    return server
