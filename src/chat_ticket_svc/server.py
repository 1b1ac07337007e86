"""The composition root: builds one server process, starts it, and stops it in order."""

import asyncio
import contextlib
import gc
from collections.abc import Callable
from http.server import HTTPServer
from typing import TYPE_CHECKING, Any

import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from chat_ticket.v1 import (
    chat_attachment_pb2,
    chat_attachment_pb2_grpc,
    chat_draft_pb2,
    chat_draft_pb2_grpc,
    chat_message_pb2,
    chat_message_pb2_grpc,
    chat_session_pb2,
    chat_session_pb2_grpc,
    chat_ticket_pb2,
    chat_ticket_pb2_grpc,
)
from chat_ticket_svc import workers
from chat_ticket_svc.access import method_permissions
from chat_ticket_svc.access.admission import AdmissionController
from chat_ticket_svc.access.authenticator import Authenticator
from chat_ticket_svc.access.draft_quotas import DraftQuotas
from chat_ticket_svc.access.quotas import QuotaEnforcer
from chat_ticket_svc.addresses import ListenError, format_address
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.limits import MIB
from chat_ticket_svc.rpc import aio_server
from chat_ticket_svc.rpc.health import HealthMonitor, HealthServicer
from chat_ticket_svc.rpc.middleware import MethodRegistrar, RpcMiddleware
from chat_ticket_svc.services.attachments import ChatAttachmentService
from chat_ticket_svc.services.drafts import ChatDraftService
from chat_ticket_svc.services.messages import ChatMessageService
from chat_ticket_svc.services.sessions import ChatSessionService
from chat_ticket_svc.services.tickets import ChatTicketService
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.store.connection_queue import tenant_connections
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.draft_commit import DraftGroupCommit
from chat_ticket_svc.store.draft_expiry import DraftExpiry
from chat_ticket_svc.store.tombstone_sweep import TombstoneSweep
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.watch.hub import WatchHub

# Optional parts are imported by the functions that make them: httpx, cryptography and PyJWT take a
# quarter of the start.
if TYPE_CHECKING:
    from chat_ticket_svc.access.jwks import JwksClient
    from chat_ticket_svc.access.server_certificates import ServerCertificates
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

log = structlog.get_logger()

SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (chat_session_pb2, "ChatSessionService"),
        (chat_message_pb2, "ChatMessageService"),
        (chat_attachment_pb2, "ChatAttachmentService"),
        (chat_ticket_pb2, "ChatTicketService"),
        (chat_draft_pb2, "ChatDraftService"),
    )
]

# How long health checks report NOT_SERVING before the drain goes on, so that balancers see it.
DRAIN_NOTICE_SECONDS = 0.2
# Once gRPC's core is told to stop, it cancels new calls. Clients learn of the stop a little later,
# by a GOAWAY. A client that calls again as soon as it has an answer would lose a call in between.
# So new calls are paused until the GOAWAY is sent. The stop waits until the clients of the calls in
# flight have called again.
#
# The clients have called again when no call has arrived for this time.
DRAIN_QUIET_SECONDS = 0.2
# The stop waits for them at most this long.
DRAIN_HOLD_SECONDS = 0.5
# The time that gRPC gets to send the GOAWAY, before the paused calls go on.
GOAWAY_SEND_SECONDS = 0.05

# Calls and streams of one connection.
MAX_CONCURRENT_STREAMS = 200

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * MIB),
    # gRPC rejects sizes between these two limits at random. Equal limits leave nothing in between.
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 8192),
    # Calls beyond this wait in the client. gRPC also refuses calls while a connection has more than
    # both numbers together in memory, as those that were answered stay there for a moment. This is
    # the protection against rapid resets. Without the second number, a client that replaces each
    # answered call with the next one is refused.
    ("grpc.max_concurrent_streams", MAX_CONCURRENT_STREAMS),
    ("grpc.http2.max_deallocating_streams", MAX_CONCURRENT_STREAMS),
    # gRPC cancels calls at random while so many wait for the event loop. The quotas should be what
    # refuses calls, because callers are told to retry then. The default is 1,000: five connections.
    ("grpc.server.max_pending_requests", 5_000),
    ("grpc.server.max_pending_requests_hard_limit", 10_000),
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.max_connection_idle_ms", 900_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Pings of clients, also while they have no calls. Clients of gRPC-Java and grpc-go send one
    # every ten seconds at most. The network may bring two of those pings closer together.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]


class Server:
    """One server process: `start`, then `stop`. Not reusable."""

    port: int

    def __init__(self, settings: Settings):
        self._settings = settings
        require_valid_url("DATABASE_URL", settings.database_url)
        require_valid_url("DATABASE_LISTEN_URL", settings.listen_url)
        self._db = Database(
            settings.database_url,
            pool_size=settings.pool_size,
            prepare_statements=settings.prepare_statements,
            statement_timeout_ms=settings.statement_timeout_ms,
            lock_timeout_ms=settings.lock_timeout_ms,
        )
        self._schema_probe = schema.Probe(settings.database_url)
        self._watch_hub = WatchHub(
            self._db,
            settings.listen_url,
            watch_poll_interval_seconds=settings.watch_poll_interval_seconds,
            watch_heartbeat_seconds=settings.watch_heartbeat_seconds,
            max_concurrent_reads=max(1, settings.pool_size // 2),
        )
        self._draft_commit = DraftGroupCommit(
            self._db,
            lease_seconds=settings.draft_seconds,
            on_written=self._watch_hub.notify_draft,
        )
        self._watch_hub.set_draft_writers(self._draft_commit)
        self._draft_expiry = DraftExpiry(
            self._db,
            default_search_language=settings.search_language,
            on_finished=self._on_drafts_ended,
        )
        self._tombstone_sweep = TombstoneSweep(self._db, days=settings.session_tombstone_days)
        self._url_checker = _url_checker(settings)
        self._certificates = _server_certificates(settings)
        self._jwks_client = _jwks_client(settings)
        self._middleware = RpcMiddleware(
            AdmissionController(
                _authenticators(settings, self._jwks_client),
                QuotaEnforcer(settings.quotas, settings.tenant_calls_per_second),
            ),
            unary_timeout_seconds=settings.unary_timeout_seconds,
            stream_write_timeout_seconds=settings.stream_write_timeout_seconds,
            access_log=settings.access_log,
        )
        self._health = HealthServicer(SERVICES)
        self._health_monitor = HealthMonitor(self._health, self._schema_probe, self._db)
        # gRPC shares ports by default: a second server would start on the same port unnoticed.
        share_port = ("grpc.so_reuseport", int(settings.workers > 1))
        self._grpc = aio_server.create_server(
            request_timeout_seconds=settings.unary_timeout_seconds,
            options=[*OPTIONS, share_port],
        )
        self._metrics: HTTPServer | None = None

    async def start(self) -> None:
        """Start to serve.

        Raises StaleSchemaError when the database lacks migrations, and EncodingError when it does
        not store UTF-8.

        An unreachable database raises nothing: the health service reports NOT_SERVING until the
        database can be reached.
        """
        try:
            self._register_services()
            self._listen()
            self._start_metrics()
            if self._jwks_client is not None:
                await self._jwks_client.open()
            await self._check_schema()
        except BaseException:
            await self._close()
            raise
        await self._db.open()
        self._watch_hub.start()
        self._draft_expiry.start()
        self._tombstone_sweep.start()
        if self._certificates is not None:
            self._certificates.start_reloading()
        await self._health_monitor.start()
        await self._grpc.start()

    async def wait_for_termination(self) -> None:
        """Return after `stop`; raise the error if the server ends on its own."""
        await self._grpc.wait_for_termination()

    async def stop(self) -> None:
        """Drain and stop.

        Health checks report NOT_SERVING first, then watches and the writing of drafts end, then
        calls in flight finish, and last the connections are closed.
        """
        await self._health_monitor.close()
        self._health.drain()
        await asyncio.sleep(DRAIN_NOTICE_SECONDS)
        self._watch_hub.drain()
        self._draft_commit.drain()
        await self._middleware.pause(
            quiet_seconds=DRAIN_QUIET_SECONDS, max_seconds=DRAIN_HOLD_SECONDS
        )
        stopping = asyncio.create_task(self._grpc.stop(self._settings.drain_seconds))
        await asyncio.sleep(GOAWAY_SEND_SECONDS)
        self._middleware.resume()
        await stopping
        await self._middleware.wait_for_handlers(timeout=1)
        await self._draft_expiry.stop()
        await self._tombstone_sweep.stop()
        await self._draft_commit.close()
        await self._watch_hub.stop()
        await self._close()

    async def _close(self) -> None:
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.shutdown)
            self._metrics.server_close()
        if self._certificates is not None:
            await self._certificates.close()
        if self._jwks_client is not None:
            await self._jwks_client.close()
        await self._schema_probe.close()
        await self._db.close()

    def _listen(self) -> None:
        settings = self._settings
        address = format_address(settings.host, settings.port)
        if settings.port and settings.workers == 1:
            # gRPC prints a line of its own for a port that is not free. Workers have theirs.
            with workers.reserve_port(settings.host, settings.port):
                pass
        try:
            if self._certificates is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, self._certificates.credentials())
        except RuntimeError as error:
            raise ListenError(address) from error

    def _start_metrics(self) -> None:
        self._db.register_metrics()
        # The callback must not keep `self` alive: gRPC's thread reports an error at interpreter
        # exit when a server that was never started still exists.
        watch_hub = self._watch_hub
        metrics.WATCHERS.set_function(lambda: watch_hub.watcher_count)
        change_feeds = watch_hub.change_feeds
        metrics.FEED_FOLLOWERS.set_function(lambda: change_feeds.follower_count)
        metrics.FEED_HELD_UP_SECONDS.set_function(lambda: change_feeds.held_up_seconds)
        certificates = self._certificates
        if certificates is not None:
            metrics.TLS_CERTIFICATE_NOT_AFTER.set_function(
                lambda: certificates.certificate.not_valid_after_utc.timestamp()
            )
        host, port = self._settings.host, self._settings.metrics_port
        if port is None:
            return
        try:
            self._metrics = metrics.serve(host, port)
        except OSError as error:
            raise ListenError(format_address(host, port)) from error
        log.info("serving metrics", host=host, port=self._metrics.server_port)

    def _register_services(self) -> None:
        db, watch_hub, settings = self._db, self._watch_hub, self._settings
        server: Any = MethodRegistrar(self._grpc, self._middleware)
        chat_session_pb2_grpc.add_ChatSessionServiceServicer_to_server(
            ChatSessionService(db, watch_hub, settings, on_deleted=self._on_drafts_ended), server
        )
        chat_message_pb2_grpc.add_ChatMessageServiceServicer_to_server(
            ChatMessageService(db, watch_hub, self._url_checker, settings), server
        )
        chat_attachment_pb2_grpc.add_ChatAttachmentServiceServicer_to_server(
            ChatAttachmentService(db, watch_hub, self._url_checker, settings), server
        )
        chat_ticket_pb2_grpc.add_ChatTicketServiceServicer_to_server(
            ChatTicketService(db, watch_hub, settings), server
        )
        chat_draft_pb2_grpc.add_ChatDraftServiceServicer_to_server(
            ChatDraftService(
                db,
                self._draft_commit,
                DraftQuotas(
                    settings.quotas, tenant_transactions=tenant_connections(settings.pool_size)
                ),
                self._url_checker,
                settings,
                on_changed=watch_hub.notify_draft,
                on_ended=self._on_drafts_ended,
            ),
            server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = [*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
                reflection.aio.ReflectionServicer(names), server
            )
        method_permissions.require_permission_rules(server.names)

    def _on_drafts_ended(self, tenant_id: str, session_id: str) -> None:
        """Drafts of a session are gone: tell those who watch it, and those who write here."""
        self._watch_hub.notify_changed(tenant_id, session_id)
        self._watch_hub.notify_draft(tenant_id, session_id)
        self._draft_commit.check_drafts((tenant_id, session_id))

    async def _check_schema(self) -> None:
        try:
            missing = await self._schema_probe.missing()
            if missing:
                raise schema.StaleSchemaError(missing)
            search_index = await self._schema_probe.search_index()
        except DomainError as error:
            log.warning("starting without a database", problem=str(error))
            return
        if not search_index.is_built:
            log.warning(
                "the search index is missing, searches are slow: run chat-ticket-svc migrate"
            )


def _server_certificates(settings: Settings) -> "ServerCertificates | None":
    if settings.tls_certificate is None:
        return None
    from chat_ticket_svc.access.server_certificates import ServerCertificates

    return ServerCertificates.from_settings(settings)


def _jwks_client(settings: Settings) -> "JwksClient | None":
    if "jwt" not in settings.auth:
        return None
    from chat_ticket_svc.access.jwks import JwksClient

    return JwksClient(settings.jwks)


def _authenticators(settings: Settings, jwks_client: "JwksClient | None") -> list[Authenticator]:
    authenticators: list[Authenticator] = []
    if settings.mtls_policy is not None and "mtls" in settings.auth:
        from chat_ticket_svc.access.client_certificate_authenticator import (
            ClientCertificateAuthenticator,
        )

        authenticators.append(ClientCertificateAuthenticator(settings.mtls_policy))
    if jwks_client is not None:
        from chat_ticket_svc.access.jwt_authenticator import JwtAuthenticator

        authenticators.append(JwtAuthenticator.from_settings(jwks_client, settings))
    return authenticators


def _url_checker(settings: Settings) -> "AttachmentUrlChecker | None":
    if not settings.attachment_url_check:
        return None
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

    try:
        return AttachmentUrlChecker(
            schemes=settings.attachment_url_schemes,
            allowed_hosts=settings.attachment_url_allowed_hosts,
        )
    except ValueError as error:
        raise ConfigurationError(f"CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS: {error}") from error


async def run(settings: Settings, stop: asyncio.Event, on_listening: Callable[[int], None]) -> None:
    """Serve until `stop` is set. `on_listening` is called with the port."""
    if settings.exposure:
        log.warning(f"{settings.exposure}; allowed by CHAT_TICKET_ALLOW_INSECURE")
    server = Server(settings)
    await server.start()
    log.info("listening", host=settings.host, port=server.port, auth=settings.auth)
    on_listening(server.port)
    # The server's objects live as long as the process. Without this the garbage collector would
    # scan them again and again, and every call would wait for it.
    gc.freeze()
    stop_requested = asyncio.create_task(stop.wait())
    terminated = asyncio.create_task(server.wait_for_termination())
    try:
        await asyncio.wait({stop_requested, terminated}, return_when=asyncio.FIRST_COMPLETED)
        if terminated.done():  # nothing listens any more: raise, so that the supervisor restarts us
            await terminated
    finally:
        stop_requested.cancel()
        log.info("draining")
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop()
