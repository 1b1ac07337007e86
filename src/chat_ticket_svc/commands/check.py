"""`chat-ticket-svc check`: what an operator wants to know first, in one screen.

Every look has a few seconds, so that nothing hangs. No line has a secret, nor what was put into a
variable by mistake.
"""

import argparse
import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
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
from chat_ticket_svc.commands.arguments import tenant_id
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.telemetry import logs
from chat_ticket_svc.workers import address_of

SECONDS = 5
OLDEST_POSTGRESQL = 15
# Tokens are valid to the second, and ids and times of rows come from both clocks.
CLOCK_SECONDS = 1.0
EXPIRES_DAYS = 14
TENANT = "chat-ticket-svc-check"

OK, WARNING, FAILED = "ok", "warning", "FAILED"

Line = tuple[str, str, str]  # how it is, what it is about, and what is to be said


class _CheckFailed(Exception):  # noqa: N818 - its text is the line to print
    """A check that failed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="holds a token for a call to the server"
    )
    parser.add_argument("--tenant", type=tenant_id, metavar="ID", help="the tenant of that call")
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
    """Print the lines; whether all is well, apart from warnings."""
    return await _printed(
        _settings(settings, environment),
        _database(settings),
        _keys(settings),
        _service(settings, lambda channel: _call(channel, settings, token, tenant_id)),
    )


async def probe(settings: Settings) -> bool:
    """Only whether the server says that it serves, for those who ask every few seconds."""
    return await _printed(_service(settings))


async def _printed(*looks: AsyncIterator[Line]) -> bool:
    well = True
    async for state, about, text in _together(*looks):
        well &= state != FAILED
        print(f"{state:8} {about:12} {text}", flush=True)
    return well


async def _together(*looks: AsyncIterator[Line]) -> AsyncIterator[Line]:
    """In their order, though they look at the same time."""

    async def lines(look: AsyncIterator[Line]) -> list[Line]:
        return [line async for line in look]

    tasks = [asyncio.create_task(lines(look)) for look in looks]
    for task in tasks:
        for line in await task:
            yield line


async def _look(about: str, work: Awaitable[Line]) -> Line:
    """The line of `work`, or why there is none."""
    try:
        async with asyncio.timeout(SECONDS):
            return await work
    except TimeoutError:
        return FAILED, about, f"no answer within {SECONDS} seconds"
    except (_CheckFailed, ConfigurationError, DomainError) as error:
        return FAILED, about, str(error)


async def _settings(settings: Settings, environment: Mapping[str, str]) -> AsyncIterator[Line]:
    set_ = list(_set(settings))
    yield OK, "settings", "\n".ljust(23).join(set_) or "all as by default"
    if unknown := config.unknown_variables(environment):
        yield WARNING, "settings", f"not known, so not in effect: {', '.join(unknown)}"
    if settings.exposure:
        yield WARNING, "settings", f"{settings.exposure}, as CHAT_TICKET_ALLOW_INSECURE wants it"


def _set(settings: Settings) -> Iterator[str]:
    """What is not as by default, without its secrets."""
    for name in sorted(settings.model_fields_set):
        value = getattr(settings, name)
        field = type(settings).model_fields[name]
        variable = str(field.validation_alias or config.variable(name))
        if isinstance(value, BaseModel):
            for part in sorted(value.model_fields_set):
                yield f"{variable}__{part.upper()}={getattr(value, part)}"
        elif value != field.default:
            yield f"{variable}={_masked(variable, value)}"


def _masked(variable: str, value: Any) -> str:
    """Of URLs the scheme, the host and the database; of what should be a file, and is not, nothing:
    it may be a key.
    """
    if variable.endswith("_URL"):
        parts = urlsplit(value)
        if "@" in parts.path:  # of a user or password whose special characters are not %XX
            return "***"
        user = "***@" if "@" in parts.netloc else ""
        query = "?***" if parts.query else ""
        return f"{parts.scheme}://{user}{parts.netloc.rpartition('@')[2]}{parts.path}{query}"
    if isinstance(value, Path) or variable == "CHAT_TICKET_JWKS":
        with contextlib.suppress(OSError, ValueError):
            return str(value) if Path(value).is_file() else "***"
        return "***"
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return "***" if "@" in text else text  # a URL with a password, put there by mistake


async def _database(settings: Settings) -> AsyncIterator[Line]:
    if not settings.database_url:
        yield FAILED, "database", "DATABASE_URL: is required"
        return
    look = asyncio.create_task(_facts("DATABASE_URL", settings.database_url))

    async def database() -> Line:
        facts = await look
        text = f"PostgreSQL {facts.version}, answers in {1000 * facts.seconds:.1f} ms"
        if facts.version_number < OLDEST_POSTGRESQL * 10_000:
            raise _CheckFailed(f"{text}: {OLDEST_POSTGRESQL} or newer is needed")
        if facts.is_read_only:
            raise _CheckFailed(f"{text}, but is read-only: a standby?")
        return OK, "database", text

    async def migrated() -> Line:
        facts = await look
        if facts.missing:
            raise _CheckFailed(f"lacks {', '.join(facts.missing)}: run chat-ticket-svc migrate")
        newer = f", and {facts.newer} of a newer version" if facts.newer else ""
        return OK, "schema", f"has all migrations of this version{newer}"

    async def clock() -> Line:
        facts = await look
        text = f"{facts.clock_ahead:+.3f} s from the database's"
        return OK if abs(facts.clock_ahead) < CLOCK_SECONDS else WARNING, "clock", text

    first = await _look("database", database())
    yield first
    if look.done() and not look.cancelled() and look.exception() is None:
        yield await _look("schema", migrated())
        yield await _look("clock", clock())
    if settings.listen_url != settings.database_url:

        async def listen() -> Line:
            facts = await _facts("DATABASE_LISTEN_URL", settings.listen_url)
            return OK, "listen", f"answers in {1000 * facts.seconds:.1f} ms"

        yield await _look("listen", listen())


async def _facts(variable: str, url: str) -> schema.Facts:
    require_valid_url(variable, url)
    return await schema.facts(url)


async def _keys(settings: Settings) -> AsyncIterator[Line]:
    async def certificate() -> Line:
        certificates = ServerCertificates.from_settings(settings)
        assert certificates is not None  # noqa: S101 - for the type checker
        left = (certificates.certificate.not_valid_after_utc - datetime.now(UTC)).days
        text = f"is that of the key, and expires in {left} days"
        return OK if left >= EXPIRES_DAYS else WARNING, "certificate", text

    async def callers() -> Line:
        assert settings.mtls_policy is not None  # noqa: S101 - for the type checker
        return (
            OK,
            "callers",
            f"{len(ClientCertificateAuthenticator(settings.mtls_policy))} are listed",
        )

    async def keys() -> Line:
        return (
            OK,
            "keys",
            f"of tokens: {', '.join(await JwksClient(settings.jwks).fetch_key_ids())}",
        )

    if settings.tls_certificate is not None:
        yield await _look("certificate", certificate())
    if "mtls" in settings.auth:
        yield await _look("callers", callers())
    if "jwt" in settings.auth:
        yield await _look("keys", keys())


async def _service(
    settings: Settings, call: Callable[[grpc.aio.Channel], Awaitable[Line]] | None = None
) -> AsyncIterator[Line]:
    """Whether the server that has these settings serves, and what comes of a call to it."""
    address = address_of(_reachable(settings.host), settings.port)
    if "mtls" in settings.auth:
        # A probe that could not fail would be none.
        state = FAILED if call is None else WARNING
        yield state, "service", f"{address} was not called: only listed certificates may"
        return
    try:
        channel = _channel(settings, address)
    except (ConfigurationError, x509.ExtensionNotFound):
        yield FAILED, "service", f"{address} was not called, for want of a certificate with a name"
        return
    async with channel:
        health = await _look("service", _health(channel, address))
        yield health
        if health[0] == OK and call is not None:
            yield await _look("call", call(channel))


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "[::1]"}.get(host, host)  # noqa: S104


def _channel(settings: Settings, address: str) -> grpc.aio.Channel:
    """Whoever answers has to have the certificate that is in the file."""
    certificates = ServerCertificates.from_settings(settings)
    if certificates is None:
        return grpc.aio.insecure_channel(address)
    own = certificates.certificate
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    [name, *_] = names.get_values_for_type(x509.DNSName) or [settings.host]
    pem = own.public_bytes(Encoding.PEM)
    options = [("grpc.ssl_target_name_override", name)]
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(pem), options=options)


async def _health(channel: grpc.aio.Channel, address: str) -> Line:
    health: Any = health_pb2_grpc.HealthStub(channel)
    try:
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    except grpc.aio.AioRpcError as error:
        raise _CheckFailed(f"{address} does not answer: {error.code().name}") from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise _CheckFailed(f"{address} says {name}")
    return OK, "service", f"{address} says {name}"


async def _call(
    channel: grpc.aio.Channel, settings: Settings, token: str, tenant_id: str | None
) -> Line:
    """A read, which goes through everything down to the database."""
    sessions = chat_session_pb2_grpc.ChatSessionServiceStub(channel)
    metadata = []
    if tenant_id or (settings.auth == "none" and not token):  # a token has its own
        metadata.append((TENANT_KEY, tenant_id or TENANT))
    if token:
        metadata.append(("authorization", f"Bearer {token}"))
    request = chat_session_pb2.ListChatSessionsRequest(page_size=1)
    began = time.perf_counter()
    try:
        await sessions.ListChatSessions(request, metadata=metadata, timeout=SECONDS)
    except grpc.aio.AioRpcError as error:
        asked = error.code() is grpc.StatusCode.UNAUTHENTICATED and not token
        if asked and "jwt" in settings.auth:
            text = "asks for a token, as it should: --token-file has a call made with one"
            return OK, "call", text
        text = error.details() or ""
        hint = ": --token-file makes it with one" if asked else ""
        raise _CheckFailed(f"a call failed: {error.code().name}: {text}{hint}") from error
    return OK, "call", f"ListChatSessions took {1000 * (time.perf_counter() - began):.1f} ms"
