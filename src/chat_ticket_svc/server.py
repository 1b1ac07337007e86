"""The composition root: what one server process is made of, and the order it starts and ends in."""

import asyncio
import contextlib
import gc
from collections.abc import Callable
from http.server import HTTPServer
from typing import Any

import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from chat_ticket.v1 import (
    chat_attachment_pb2,
    chat_attachment_pb2_grpc,
    chat_message_pb2,
    chat_message_pb2_grpc,
    chat_session_pb2,
    chat_session_pb2_grpc,
    chat_ticket_pb2,
    chat_ticket_pb2_grpc,
)
from chat_ticket_svc.access import method_permissions
from chat_ticket_svc.access.admission import AdmissionController
from chat_ticket_svc.access.authenticator import Authenticator
from chat_ticket_svc.access.client_certificate_authenticator import ClientCertificateAuthenticator
from chat_ticket_svc.access.jwks import JwksClient
from chat_ticket_svc.access.jwt_authenticator import JwtAuthenticator
from chat_ticket_svc.access.quotas import Quotas
from chat_ticket_svc.access.server_certificates import ServerCertificates
from chat_ticket_svc.config import MIB, ConfigurationError, Settings
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.rpc import aio_server
from chat_ticket_svc.rpc.health import HealthServicer
from chat_ticket_svc.rpc.middleware import MethodRegistrar, RpcMiddleware
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker
from chat_ticket_svc.services.attachments import ChatAttachmentService
from chat_ticket_svc.services.messages import ChatMessageService
from chat_ticket_svc.services.sessions import ChatSessionService
from chat_ticket_svc.services.tickets import ChatTicketService
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.telemetry import metrics
from chat_ticket_svc.watch.hub import WatchHub
from chat_ticket_svc.workers import PortTakenError, address_of

log = structlog.get_logger()

SERVICES = [
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (chat_session_pb2, "ChatSessionService"),
        (chat_message_pb2, "ChatMessageService"),
        (chat_attachment_pb2, "ChatAttachmentService"),
        (chat_ticket_pb2, "ChatTicketService"),
    )
]

HEALTH_CHECK_SECONDS = 1
DRAIN_NOTICE_SECONDS = 0.2
# gRPC's core cancels the calls that come after it was told to stop and before their callers were,
# by a GOAWAY: those of callers who call again at once. So new calls wait until the GOAWAY is sent,
# and that waits until the callers of those under way have called again, or none has for a while.
DRAIN_QUIET_SECONDS = 0.2
DRAIN_HOLD_SECONDS = 0.5
GOAWAY_SECONDS = 0.05

OPTIONS = [
    ("grpc.max_receive_message_length", 4 * MIB),
    # Between the two, which are far apart by default, gRPC refuses at random.
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 8192),
    ("grpc.max_concurrent_streams", 200),
    ("grpc.max_connection_age_ms", 1_800_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    ("grpc.max_connection_idle_ms", 900_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
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
        self._probe = schema.Probe(settings.database_url)
        self._follow = WatchHub(
            self._db,
            settings.listen_url,
            watch_poll_interval_seconds=settings.watch_poll_interval_seconds,
            watch_heartbeat_seconds=settings.watch_heartbeat_seconds,
            readers=max(1, settings.pool_size // 2),
        )
        self._urls = _url_checker(settings)
        self._certificates = ServerCertificates.from_settings(settings)
        self._keys = JwksClient(settings.jwks) if "jwt" in settings.auth else None
        self._middleware = RpcMiddleware(
            AdmissionController(_authenticators(settings, self._keys), Quotas(settings.quotas)),
            unary_timeout_seconds=settings.unary_timeout_seconds,
            stream_write_timeout_seconds=settings.stream_write_timeout_seconds,
            access_log=settings.access_log,
        )
        self._health = HealthServicer(SERVICES)
        # On by default, and then a second server silently shares the port.
        share_port = ("grpc.so_reuseport", int(settings.workers > 1))
        self._grpc = aio_server.create_server(options=[*OPTIONS, share_port])
        self._health_task: asyncio.Task[None] | None = None
        self._metrics: HTTPServer | None = None

    async def start(self) -> None:
        """Listen. A database that is reachable and not migrated raises schema.StaleSchemaError.

        One that cannot be reached does not: the health service says NOT_SERVING until it can.
        """
        try:
            self._register()
            self._listen()
            self._report()
            if self._keys is not None:
                await self._keys.open()
            await self._check_schema()
        except BaseException:
            await self._close()
            raise
        await self._db.open()
        self._follow.start()
        if self._certificates is not None:
            self._certificates.start_reloading()
        await self._health.set_all(serving=False)
        self._health_task = asyncio.create_task(self._watch_health())
        await self._grpc.start()

    async def wait_for_termination(self) -> None:
        """Return when it has been stopped; raise what has ended it otherwise."""
        await self._grpc.wait_for_termination()

    async def stop(self) -> None:
        """Drain: tell health checks and followers first, let calls finish, then let go."""
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await asyncio.sleep(DRAIN_NOTICE_SECONDS)
        self._follow.drain()
        await self._middleware.pause(
            quiet_seconds=DRAIN_QUIET_SECONDS, max_seconds=DRAIN_HOLD_SECONDS
        )
        stopping = asyncio.create_task(self._grpc.stop(self._settings.drain_seconds))
        await asyncio.sleep(GOAWAY_SECONDS)
        self._middleware.resume()
        await stopping
        await self._middleware.wait_for_handlers(timeout=1)
        await self._follow.stop()
        await self._close()

    async def _close(self) -> None:
        if self._metrics is not None:
            await asyncio.to_thread(self._metrics.shutdown)
            self._metrics.server_close()
        if self._certificates is not None:
            await self._certificates.close()
        if self._keys is not None:
            await self._keys.close()
        await self._probe.close()
        await self._db.close()

    def _listen(self) -> None:
        address = address_of(self._settings.host, self._settings.port)
        try:
            if self._certificates is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, self._certificates.credentials())
        except RuntimeError as error:
            raise PortTakenError(address) from error

    def _report(self) -> None:
        self._db.register_metrics()
        # Without self, which metrics would keep: gRPC's thread complains at the end of Python when
        # there still is a server that was not started.
        follow = self._follow
        metrics.WATCHERS.set_function(lambda: follow.watchers)
        host, port = self._settings.host, self._settings.metrics_port
        if port is None:
            return
        try:
            self._metrics = metrics.serve(host, port)
        except OSError as error:
            raise PortTakenError(address_of(host, port)) from error
        log.info("metrics", host=host, port=self._metrics.server_port)

    def _register(self) -> None:
        db, follow, settings = self._db, self._follow, self._settings
        server: Any = MethodRegistrar(self._grpc, self._middleware)
        chat_session_pb2_grpc.add_ChatSessionServiceServicer_to_server(
            ChatSessionService(db, follow, settings), server
        )
        chat_message_pb2_grpc.add_ChatMessageServiceServicer_to_server(
            ChatMessageService(db, follow, self._urls, settings), server
        )
        chat_attachment_pb2_grpc.add_ChatAttachmentServiceServicer_to_server(
            ChatAttachmentService(db, follow, self._urls, settings), server
        )
        chat_ticket_pb2_grpc.add_ChatTicketServiceServicer_to_server(
            ChatTicketService(db, follow, settings), server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = [*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME]
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(  # type: ignore[no-untyped-call]
                reflection.aio.ReflectionServicer(names), server
            )
        method_permissions.require_permission_rules(server.names)

    async def _check_schema(self) -> None:
        try:
            missing = await self._probe.missing()
        except DomainError as error:
            log.warning("the database cannot be reached yet", reason=error.reason)
            return
        if missing:
            raise schema.StaleSchemaError(missing)

    async def _watch_health(self) -> None:
        """Keep the health service's answer at what the database allows."""
        was = None
        while True:
            try:
                missing = await self._probe.missing()
                now = f"the database lacks {', '.join(missing)}" if missing else ""
                if was and not now:
                    await self._db.check()  # the pool may take longer to come back
            except Exception as error:  # whatever it is, it is no health
                now = str(error) if isinstance(error, DomainError) else type(error).__qualname__
            if now != was:
                was = now
                if now:
                    await self._health.set_all(serving=False)
                    log.warning("not serving", because=now)
                else:
                    await self._health.set_all(serving=True)
                    log.info("serving")
            await asyncio.sleep(HEALTH_CHECK_SECONDS)


def _authenticators(settings: Settings, keys: JwksClient | None) -> list[Authenticator]:
    authenticators: list[Authenticator] = []
    if settings.mtls_policy is not None and "mtls" in settings.auth:
        authenticators.append(ClientCertificateAuthenticator(settings.mtls_policy))
    if keys is not None:
        authenticators.append(
            JwtAuthenticator(
                keys,
                issuer=settings.jwt_issuer,
                audience=settings.jwt_audience,
                algorithms=settings.jwt_algorithms,
            )
        )
    return authenticators


def _url_checker(settings: Settings) -> AttachmentUrlChecker | None:
    if not settings.attachment_url_check:
        return None
    try:
        return AttachmentUrlChecker(
            schemes=settings.attachment_url_schemes,
            allowed_hosts=settings.attachment_url_allowed_hosts,
        )
    except ValueError as error:
        raise ConfigurationError(f"CHAT_TICKET_ATTACHMENT_URL_ALLOWED_HOSTS: {error}") from error


async def run(settings: Settings, stop: asyncio.Event, listening: Callable[[int], None]) -> None:
    """Serve until `stop` is set; `listening` is told the port."""
    if settings.exposure:
        log.warning(f"{settings.exposure}, as CHAT_TICKET_ALLOW_INSECURE wants it")
    server = Server(settings)
    await server.start()
    log.info("listening", host=settings.host, port=server.port, auth=settings.auth)
    listening(server.port)
    # What a server consists of stays: looking through it for garbage would stop every call.
    gc.freeze()
    stopping = asyncio.create_task(stop.wait())
    ending = asyncio.create_task(server.wait_for_termination())
    try:
        await asyncio.wait({stopping, ending}, return_when=asyncio.FIRST_COMPLETED)
        if ending.done():  # nothing listens any more: whoever supervises us has to know
            await ending
    finally:
        stopping.cancel()
        log.info("draining")
        with contextlib.suppress(asyncio.CancelledError):
            await server.stop()
