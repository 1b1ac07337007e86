"""`chat-ticket-svc migrate`: applies the pending migrations, with dbmate.

Concurrent runs wait for one another: dbmate takes an advisory lock.
"""

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chat_ticket_svc import config
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import require_valid_url
from chat_ticket_svc.store.schema import MIGRATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(_: argparse.Namespace) -> int:
    return up(database_url())


def database_url() -> str:
    """The URL to migrate. Raises ConfigurationError if it is missing or names several hosts."""
    settings = config.load()
    if not settings.migrate_url:
        raise ConfigurationError("DATABASE_URL: required")
    if config.has_several_hosts(settings.migrate_url):
        raise ConfigurationError(
            "MIGRATE_DATABASE_URL: required when DATABASE_URL names several hosts:"
            " set it to the primary's URL"
        )
    if not settings.migrate_database_url:  # which may have parameters of dbmate's driver
        require_valid_url("DATABASE_URL", settings.database_url)
    return settings.migrate_url


def up(url: str, *, quiet: bool = False) -> int:
    """Create the database if it does not exist, and apply the pending migrations."""
    # The result is ignored: of several concurrent runs, only one succeeds in creating the database.
    _run(url, "create", capture_output=True)
    schema.require_utf8_database(url)
    return dbmate(url, "migrate", quiet=quiet)


def dbmate(url: str, command: str, *, quiet: bool = False) -> int:
    """Run a dbmate command on the database of `url`; returns its exit status."""
    streams = {"stdout": subprocess.DEVNULL if quiet else None, "stderr": subprocess.PIPE}
    process = _run(url, command, **streams)
    if process.returncode != 0:
        reason = _error_reason(process.stderr.decode(errors="replace"))
        print(f"chat-ticket-svc: {command} failed: {reason}", file=sys.stderr)
    return process.returncode


def _error_reason(output: str) -> str:
    """The parts of dbmate's output that contain no secret. The rest may quote the URL or a row."""
    patterns = {
        "": r"\bline: \d+, column: \d+",  # in the migration
        "network: ": r"(?<=: )(?:no such host|i/o timeout|connect: [a-z ]+)$",
        "SQLSTATE ": r"(?<=\()[0-9A-Z]{5}(?=\)$)",
    }
    reasons = [
        kind + match[0]
        for kind, pattern in patterns.items()
        if (match := re.search(pattern, output, re.MULTILINE))
    ]
    return ", ".join(reasons) or "run dbmate directly for the reason; its output may show the URL"


def _run(url: str, command: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(  # noqa: S603 - our own binary
        [
            Path(sysconfig.get_path("scripts")) / "dbmate",
            "--migrations-dir",
            MIGRATIONS,
            "--migration-lock",
            "--no-dump-schema",
            command,
        ],
        # In the environment, because every user can read arguments, and the URL holds a password.
        env={**os.environ, "DATABASE_URL": _with_libpq_tls_default(url)},
        check=False,
        **streams,
    )


def _with_libpq_tls_default(url: str) -> str:
    """The URL with libpq's default for TLS, `prefer`. dbmate's default requires TLS."""
    parts = urlsplit(url)
    if "sslmode=" in parts.query or "PGSSLMODE" in os.environ:
        return url
    return parts._replace(query="&".join(filter(None, [parts.query, "sslmode=prefer"]))).geturl()
