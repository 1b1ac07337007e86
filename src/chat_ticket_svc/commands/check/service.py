"""Checks the running server: its health service, and a call."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chat_ticket.v1 import chat_session_pb2, chat_session_pb2_grpc
from chat_ticket_svc.access.credential import TENANT_KEY
from chat_ticket_svc.access.server_certificates import ServerCertificates
from chat_ticket_svc.addresses import format_address
from chat_ticket_svc.commands.check.line import (
    FAILED,
    OK,
    TIMEOUT_SECONDS,
    WARNING,
    CheckFailed,
    Line,
    run_check,
)
from chat_ticket_svc.config import ConfigurationError, Settings

DEFAULT_TENANT = "chat-ticket-svc-check"


async def check_service(
    settings: Settings, call: Callable[[grpc.aio.Channel], Awaitable[Line]] | None = None
) -> AsyncIterator[Line]:
    """Call the health service of the server that has these settings, and then `call`."""
    address = format_address(_client_host(settings.host), settings.port)
    if "mtls" in settings.auth:
        # A probe that succeeded without calling the server would never fail.
        state = FAILED if call is None else WARNING
        text = f"{address} was not called: it accepts only the client certificates of its policy"
        yield Line(state, "service", text)
        return
    try:
        channel = _open_channel(settings, address)
    except (ConfigurationError, x509.ExtensionNotFound):
        text = f"{address} was not called: its certificate is invalid or has no alternative name"
        yield Line(FAILED, "service", text)
        return
    async with channel:
        health = await run_check("service", _check_health(channel, address))
        yield health
        if health.state == OK and call is not None:
            yield await run_check("call", call(channel))


def _client_host(host: str) -> str:
    """The host to connect to, for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)  # noqa: S104


def _open_channel(settings: Settings, address: str) -> grpc.aio.Channel:
    """A channel to the server. With TLS, it trusts only the certificate in the server's file."""
    certificates = ServerCertificates.from_settings(settings)
    if certificates is None:
        return grpc.aio.insecure_channel(address)
    own = certificates.certificate
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    [name, *_] = names.get_values_for_type(x509.DNSName) or [settings.host]
    pem = own.public_bytes(Encoding.PEM)
    options = [("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), options=options)


async def _check_health(channel: grpc.aio.Channel, address: str) -> Line:
    health: Any = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest()
    try:
        response = await health.Check(request, timeout=TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        raise CheckFailed(f"{address} does not respond: {error.code().name}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise CheckFailed(f"{address} reports {name}")
    return Line(OK, "service", f"{address} reports {name}")


async def check_call(
    channel: grpc.aio.Channel, settings: Settings, token: str, tenant_id: str | None
) -> Line:
    """Make a read, which passes through every part of the server and the database."""
    sessions = chat_session_pb2_grpc.ChatSessionServiceStub(channel)
    metadata = []
    if tenant_id or (settings.auth == "none" and not token):  # a token names its tenant
        metadata.append((TENANT_KEY, tenant_id or DEFAULT_TENANT))
    if token:
        metadata.append(("authorization", f"Bearer {token}"))
    request = chat_session_pb2.ListChatSessionsRequest(page_size=1)
    started_at = time.perf_counter()
    try:
        await sessions.ListChatSessions(request, metadata=metadata, timeout=TIMEOUT_SECONDS)
    except grpc.aio.AioRpcError as error:
        needs_token = error.code() is grpc.StatusCode.UNAUTHENTICATED and not token
        if needs_token and "jwt" in settings.auth:
            text = "the server requires a token, as it should; pass --token-file to call it"
            return Line(OK, "call", text)
        details = error.details() or ""
        hint = "; pass --token-file to call it with a token" if needs_token else ""
        raise CheckFailed(
            f"ListChatSessions failed: {error.code().name}: {details}{hint}"
        ) from error
    milliseconds = 1000 * (time.perf_counter() - started_at)
    return Line(OK, "call", f"ListChatSessions took {milliseconds:.1f} ms")
