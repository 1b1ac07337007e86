"""Checks the running server: its health service, and a call."""

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
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


@dataclass(frozen=True, kw_only=True)
class ClientCertificate:
    """A certificate of a caller, and its key, as PEM."""

    certificate: bytes
    key: bytes


async def check_service(
    settings: Settings,
    client: ClientCertificate | None = None,
    call: Callable[[grpc.aio.Channel], Awaitable[Line]] | None = None,
) -> AsyncIterator[Line]:
    """Call the health service of the server that has these settings, and then `call`."""
    address = format_address(_client_host(settings.host), settings.port)
    if "mtls" in settings.auth and client is None:
        # A probe that succeeded without calling the server would never fail.
        state = FAILED if call is None else WARNING
        text = f"{address} was not called: pass --client-certificate and --client-key to call it"
        yield Line(state, "service", text)
        return
    try:
        channel = _open_channel(settings, address, client)
    except ConfigurationError as error:
        yield Line(FAILED, "service", f"{address} was not called: {error}")
        return
    async with channel:
        health = await run_check("service", _check_health(channel, address))
        yield health
        if health.state == OK and call is not None:
            yield await run_check("call", call(channel))


def _client_host(host: str) -> str:
    """The host to connect to, for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)  # noqa: S104


def _open_channel(
    settings: Settings, address: str, client: ClientCertificate | None
) -> grpc.aio.Channel:
    """A channel to the server. With TLS, it trusts only the certificate in the server's file."""
    certificates = ServerCertificates.from_settings(settings)
    if certificates is None:
        return grpc.aio.insecure_channel(address)
    own = certificates.certificate
    pem = own.public_bytes(Encoding.PEM)
    credentials = (
        grpc.ssl_channel_credentials(pem)
        if client is None
        else grpc.ssl_channel_credentials(pem, client.key, client.certificate)
    )
    options = [("grpc.ssl_target_name_override", _name(own))]
    return grpc.aio.secure_channel(address, credentials, options=options)


def _name(certificate: x509.Certificate) -> str:
    """A name that gRPC accepts the certificate for. Its key alone says which server it is."""
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        for name in names.get_values_for_type(x509.DNSName):
            return name.replace("*", "any", 1)
        for address in names.get_values_for_type(x509.IPAddress):
            return str(address)
    # gRPC compares no URIs, such as SPIFFE ids.
    for attribute in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        return str(attribute.value)
    raise ConfigurationError(
        "CHAT_TICKET_TLS_CERTIFICATE: has no DNS name, IP address or common name"
    )


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
