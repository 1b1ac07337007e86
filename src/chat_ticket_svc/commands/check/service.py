"""Checks the running server: its health service, and a call."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
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
from chat_ticket_svc.commands.check.tls_tunnel import client_context, open_tunnel
from chat_ticket_svc.config import ConfigurationError, Settings

DEFAULT_TENANT = "chat-ticket-svc-check"


async def check_service(
    settings: Settings,
    client: ssl.SSLContext | None = None,
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
        async with _open_channel(settings, client) as channel:
            health = await run_check("service", _check_health(channel, address))
            yield health
            if health.state == OK and call is not None:
                yield await run_check("call", call(channel))
    except ConfigurationError as error:
        yield Line(FAILED, "service", f"{address} was not called: {error}")
    except CheckFailed as error:
        yield Line(FAILED, "service", f"{address} {error}")
    except TimeoutError:
        yield Line(FAILED, "service", f"no response within {TIMEOUT_SECONDS} seconds")


def _client_host(host: str) -> str:
    """The host to connect to, for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)  # noqa: S104


@contextlib.asynccontextmanager
async def _open_channel(
    settings: Settings, client: ssl.SSLContext | None
) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to the server. With TLS, it trusts only the certificate in the server's file."""
    host = _client_host(settings.host)
    certificates = ServerCertificates.from_settings(settings)
    async with contextlib.AsyncExitStack() as cleanup:
        if certificates is None:
            target = format_address(host, settings.port)
        else:
            tunnel = open_tunnel(
                host.strip("[]"),
                settings.port,
                certificates.certificate,
                client or client_context(),
            )
            async with asyncio.timeout(TIMEOUT_SECONDS):
                target = await cleanup.enter_async_context(tunnel)
        yield await cleanup.enter_async_context(grpc.aio.insecure_channel(target))


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
