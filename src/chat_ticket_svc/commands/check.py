"""`chat-ticket-svc check`: checks the settings, the database, the keys and the running server.

Each check has a timeout, so the command always ends. No line contains a secret, even one that was
put into the wrong variable.
"""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import BaseModel

from chat_ticket.v1 import chat_session_pb2, chat_session_pb2_grpc
from chat_ticket_svc import config
from chat_ticket_svc.access.client_certificate_authenticator import ClientCertificateAuthenticator
from chat_ticket_svc.access.credential import TENANT_KEY
from chat_ticket_svc.access.jwks import JwksClient
from chat_ticket_svc.access.server_certificates import ServerCertificates
from chat_ticket_svc.addresses import format_address
from chat_ticket_svc.commands.arguments import tenant_id
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.telemetry import logs

TIMEOUT_SECONDS = 5  # of each check
MIN_POSTGRESQL_VERSION = 15
# Tokens are valid to the second, and ids and times of rows come from both clocks.
MAX_CLOCK_DIFFERENCE_SECONDS = 1.0
MIN_CERTIFICATE_DAYS = 14
DEFAULT_TENANT = "chat-ticket-svc-check"

OK, WARNING, FAILED = "ok", "warning", "FAILED"


class Line(NamedTuple):
    """One line of the output."""

    state: str
    subject: str
    text: str


class _CheckFailed(Exception):  # noqa: N818 - its text is the line to print
    """A check that failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a file with a token, for a test call to the server",
    )
    parser.add_argument(
        "--tenant", type=tenant_id, metavar="ID", help="the tenant of the test call"
    )
    parser.add_argument(
        "--probe", action="store_true", help="only call the server's health service"
    )


def run(options: argparse.Namespace) -> int:
    logs.configure(config.Settings.model_construct(log_level="error", log_format="console"))
    settings = config.load()
    if options.probe:
        return 0 if asyncio.run(probe(settings)) else 1
    token = ""
    if options.token_file is not None:
        token = config.read_file("--token-file", options.token_file).decode().strip()
    is_ok = asyncio.run(check(settings, os.environ, token=token, tenant_id=options.tenant))
    return 0 if is_ok else 1


async def check(
    settings: Settings, environment: Mapping[str, str], *, token: str, tenant_id: str | None
) -> bool:
    """Run and print all checks. Returns whether none has failed; a warning is no failure."""
    return await _print_lines(
        _check_settings(settings, environment),
        _check_database(settings),
        _check_credentials(settings),
        _check_service(settings, lambda channel: _check_call(channel, settings, token, tenant_id)),
    )


async def probe(settings: Settings) -> bool:
    """Check only the server's health service: cheap enough to run every few seconds."""
    return await _print_lines(_check_service(settings))


async def _print_lines(*checks: AsyncIterator[Line]) -> bool:
    is_ok = True
    async for state, subject, text in _run_concurrently(*checks):
        is_ok &= state != FAILED
        print(f"{state:8} {subject:12} {text}", flush=True)
    return is_ok


async def _run_concurrently(*checks: AsyncIterator[Line]) -> AsyncIterator[Line]:
    """Run the checks at the same time, and yield their lines in the order of the arguments."""

    async def collect(check: AsyncIterator[Line]) -> list[Line]:
        return [line async for line in check]

    tasks = [asyncio.create_task(collect(check)) for check in checks]
    for task in tasks:
        for line in await task:
            yield line


async def _run_check(subject: str, check: Awaitable[Line]) -> Line:
    """The line that `check` returns, or a FAILED line with its error."""
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            return await check
    except TimeoutError:
        return Line(FAILED, subject, f"no response within {TIMEOUT_SECONDS} seconds")
    except (_CheckFailed, ConfigurationError, DomainError) as error:
        return Line(FAILED, subject, str(error))


async def _check_settings(
    settings: Settings, environment: Mapping[str, str]
) -> AsyncIterator[Line]:
    changed = list(_changed_settings(settings))
    yield Line(OK, "settings", "\n".ljust(23).join(changed) or "all have their defaults")
    if unknown := config.unknown_variables(environment):
        yield Line(WARNING, "settings", f"unknown, without effect: {', '.join(unknown)}")
    if settings.exposure:
        text = f"{settings.exposure}; allowed by CHAT_TICKET_ALLOW_INSECURE"
        yield Line(WARNING, "settings", text)


def _changed_settings(settings: Settings) -> Iterator[str]:
    """The settings that differ from their defaults, without secrets."""
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        field = type(settings).model_fields[name]
        variable = str(field.validation_alias or config.variable(name))
        if isinstance(value, BaseModel):
            for part in sorted(value.model_fields_set):
                yield f"{variable}__{part.upper()}={getattr(value, part)}"
        elif value != field.default:
            yield f"{variable}={_redact(variable, value)}"


def _redact(variable: str, value: Any) -> str:
    """A value without its secrets.

    Of a URL, only the scheme, the host and the path are shown. A path is shown only if it names a
    file: otherwise the variable may hold a key by mistake.
    """
    if variable.endswith("_URL"):
        parts = urlsplit(value)
        if "@" in parts.path:  # unescaped special characters have moved the password into the path
            return "***"
        user = "***@" if "@" in parts.netloc else ""
        query = "?***" if parts.query else ""
        return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
    if isinstance(value, Path) or variable == "CHAT_TICKET_JWKS":
        with contextlib.suppress(OSError, ValueError):
            return str(value) if Path(value).is_file() else "***"
        return "***"
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return "***" if "@" in text else text  # may be a URL with a password, set by mistake


async def _check_database(settings: Settings) -> AsyncIterator[Line]:
    if not settings.database_url:
        yield Line(FAILED, "database", "DATABASE_URL: required")
        return
    reading = asyncio.create_task(_read_facts("DATABASE_URL", settings.database_url))

    async def database() -> Line:
        facts = await reading
        text = f"PostgreSQL {facts.version}, responds in {1000 * facts.seconds:.1f} ms"
        if facts.version_number < MIN_POSTGRESQL_VERSION * 10_000:
            raise _CheckFailed(f"{text}: version {MIN_POSTGRESQL_VERSION} or newer is required")
        if facts.is_read_only:
            raise _CheckFailed(f"{text}: is read-only, perhaps a standby")
        return Line(OK, "database", text)

    async def migrations() -> Line:
        facts = await reading
        if facts.missing:
            names = ", ".join(facts.missing)
            raise _CheckFailed(f"lacks migrations {names}: run chat-ticket-svc migrate")
        newer = f", and {facts.newer} of a newer version" if facts.newer else ""
        return Line(OK, "schema", f"has all migrations of this version{newer}")

    async def clock() -> Line:
        facts = await reading
        is_close = abs(facts.clock_ahead) < MAX_CLOCK_DIFFERENCE_SECONDS
        text = f"{facts.clock_ahead:+.3f} s compared to the database's clock"
        return Line(OK if is_close else WARNING, "clock", text)

    yield await _run_check("database", database())
    if reading.done() and not reading.cancelled() and reading.exception() is None:
        yield await _run_check("schema", migrations())
        yield await _run_check("clock", clock())
    if settings.listen_url != settings.database_url:

        async def listen() -> Line:
            facts = await _read_facts("DATABASE_LISTEN_URL", settings.listen_url)
            return Line(OK, "listen", f"responds in {1000 * facts.seconds:.1f} ms")

        yield await _run_check("listen", listen())


async def _read_facts(variable: str, url: str) -> schema.Facts:
    require_valid_url(variable, url)
    return await schema.facts(url)


async def _check_credentials(settings: Settings) -> AsyncIterator[Line]:
    """The server's certificate, the client certificates and the keys of tokens."""

    async def certificate() -> Line:
        certificates = ServerCertificates.from_settings(settings)
        assert certificates is not None  # noqa: S101 - for the type checker
        days = (certificates.certificate.not_valid_after_utc - datetime.now(UTC)).days
        state = OK if days >= MIN_CERTIFICATE_DAYS else WARNING
        return Line(state, "certificate", f"matches its key, expires in {days} days")

    async def policy() -> Line:
        assert settings.mtls_policy is not None  # noqa: S101 - for the type checker
        count = len(ClientCertificateAuthenticator(settings.mtls_policy))
        return Line(OK, "policy", f"client certificates listed: {count}")

    async def jwks() -> Line:
        key_ids = await JwksClient(settings.jwks).fetch_key_ids()
        return Line(OK, "jwks", f"key ids: {', '.join(key_ids)}")

    if settings.tls_certificate is not None:
        yield await _run_check("certificate", certificate())
    if "mtls" in settings.auth:
        yield await _run_check("policy", policy())
    if "jwt" in settings.auth:
        yield await _run_check("jwks", jwks())


async def _check_service(
    settings: Settings, check_call: Callable[[grpc.aio.Channel], Awaitable[Line]] | None = None
) -> AsyncIterator[Line]:
    """Call the health service of the server that has these settings, and then `check_call`."""
    address = format_address(_client_host(settings.host), settings.port)
    if "mtls" in settings.auth:
        # A probe that succeeded without calling the server would never fail.
        state = FAILED if check_call is None else WARNING
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
        health = await _run_check("service", _check_health(channel, address))
        yield health
        if health.state == OK and check_call is not None:
            yield await _run_check("call", check_call(channel))


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
        raise _CheckFailed(f"{address} does not respond: {error.code().name}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)
    if response.status != health_pb2.HealthCheckResponse.SERVING:
        raise _CheckFailed(f"{address} reports {name}")
    return Line(OK, "service", f"{address} reports {name}")


async def _check_call(
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
        raise _CheckFailed(
            f"ListChatSessions failed: {error.code().name}: {details}{hint}"
        ) from error
    milliseconds = 1000 * (time.perf_counter() - started_at)
    return Line(OK, "call", f"ListChatSessions took {milliseconds:.1f} ms")
