"""`chat-ticket-svc check`: checks the settings, the database, the keys and the running server.

Each check has a timeout, so the command always ends. No line contains a secret, even one that was
put into the wrong variable.
"""

import argparse
import asyncio
import os
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from chat_ticket_svc import config
from chat_ticket_svc.commands import arguments
from chat_ticket_svc.commands.check.credentials import check_credentials
from chat_ticket_svc.commands.check.database import check_database
from chat_ticket_svc.commands.check.line import FAILED, Line
from chat_ticket_svc.commands.check.service import check_call, check_service
from chat_ticket_svc.commands.check.settings import check_settings
from chat_ticket_svc.commands.check.tls_tunnel import client_context
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.telemetry import logs

# Of printable ASCII, as it travels in metadata.
TOKEN = re.compile(r"[!-~]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="a file with a token, for a test call to the server",
    )
    parser.add_argument(
        "--tenant", type=arguments.tenant_id, metavar="ID", help="the tenant of the test call"
    )
    parser.add_argument(
        "--port",
        type=arguments.port,
        help="the port of the server, if `serve --port` chose it; overrides CHAT_TICKET_PORT",
    )
    parser.add_argument(
        "--client-certificate",
        type=Path,
        metavar="FILE",
        help="a PEM file with a client certificate, for a server that requires one",
    )
    parser.add_argument("--client-key", type=Path, metavar="FILE", help="a PEM file with its key")
    parser.add_argument(
        "--probe", action="store_true", help="only call the server's health service"
    )


def run(options: argparse.Namespace) -> int:
    logs.configure(config.Settings.model_construct(log_level="error", log_format="console"))
    settings = config.load(**({} if options.port is None else {"port": options.port}))
    client = _client_certificate(options.client_certificate, options.client_key)
    if options.probe:
        return 0 if asyncio.run(probe(settings, client)) else 1
    token = "" if options.token_file is None else _read_token(options.token_file)
    is_ok = asyncio.run(
        check(settings, os.environ, token=token, tenant_id=options.tenant, client=client)
    )
    return 0 if is_ok else 1


def _read_token(path: Path) -> str:
    token = config.read_file("--token-file", path).decode(errors="replace").strip()
    if not TOKEN.fullmatch(token):
        raise ConfigurationError("--token-file: must contain one token, and nothing else")
    return token


def _client_certificate(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ConfigurationError("--client-certificate: required with --client-key, and vice versa")
    for option, path in {"--client-certificate": certificate, "--client-key": key}.items():
        config.read_file(option, path)
    context = client_context()
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")
    except ssl.SSLError as error:
        raise ConfigurationError(
            "--client-certificate: must contain PEM certificates, and --client-key their"
            " unencrypted key"
        ) from error
    return context


async def check(
    settings: Settings,
    environment: Mapping[str, str],
    *,
    token: str,
    tenant_id: str | None,
    client: ssl.SSLContext | None,
) -> bool:
    """Run and print all checks. Returns whether none has failed; a warning is no failure."""
    return await _print_lines(
        check_settings(settings, environment),
        check_database(settings),
        check_credentials(settings, token),
        check_service(
            settings, client, lambda channel: check_call(channel, settings, token, tenant_id)
        ),
    )


async def probe(settings: Settings, client: ssl.SSLContext | None) -> bool:
    """Check only the server's health service: cheap enough to run every few seconds."""
    return await _print_lines(check_service(settings, client))


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
