"""`chat-ticket-svc check`: checks the settings, the database, the keys and the running server.

Each check has a timeout, so the command always ends. No line contains a secret, even one that was
put into the wrong variable.
"""

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from chat_ticket_svc import config
from chat_ticket_svc.commands.arguments import tenant_id
from chat_ticket_svc.commands.check.credentials import check_credentials
from chat_ticket_svc.commands.check.database import check_database
from chat_ticket_svc.commands.check.line import FAILED, Line
from chat_ticket_svc.commands.check.service import check_call, check_service
from chat_ticket_svc.commands.check.settings import check_settings
from chat_ticket_svc.config import Settings
from chat_ticket_svc.telemetry import logs


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
        check_settings(settings, environment),
        check_database(settings),
        check_credentials(settings, token),
        check_service(settings, lambda channel: check_call(channel, settings, token, tenant_id)),
    )


async def probe(settings: Settings) -> bool:
    """Check only the server's health service: cheap enough to run every few seconds."""
    return await _print_lines(check_service(settings))


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
