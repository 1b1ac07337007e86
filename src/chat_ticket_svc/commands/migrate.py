"""`chat-ticket-svc migrate`: bring the database to the newest schema, by dbmate.

Concurrent runs wait for one another, by an advisory lock.
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
from chat_ticket_svc.store.schema import MIGRATIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(_: argparse.Namespace) -> int:
    return up(database_url())


def database_url() -> str:
    """The URL to migrate. Raises ConfigurationError without one, or for one of several hosts."""
    settings = config.load()
    if not settings.migrate_url:
        raise ConfigurationError("DATABASE_URL: is required")
    if config.has_several_hosts(settings.migrate_url):
        raise ConfigurationError(
            "MIGRATE_DATABASE_URL: is required when DATABASE_URL names several hosts;"
            " it names the primary"
        )
    return settings.migrate_url


def up(url: str, *, quiet: bool = False) -> int:
    """Bring a database to the newest schema, creating it first when there is none."""
    # Of several runs that create the database at once, all but one fail at that, and may go on.
    _run(url, "create", capture_output=True)
    return dbmate(url, "migrate", quiet=quiet)


def dbmate(url: str, command: str, *, quiet: bool = False) -> int:
    """Run a dbmate command on the database of `url`; returns its exit status."""
    streams = {"stdout": subprocess.DEVNULL if quiet else None, "stderr": subprocess.PIPE}
    done = _run(url, command, **streams)
    if done.returncode != 0:
        reason = _reason(done.stderr.decode(errors="replace"))
        print(f"chat-ticket-svc: {command} failed: {reason}", file=sys.stderr)
    return done.returncode


def _reason(text: str) -> str:
    """The parts of dbmate's output that hold no secret: the rest may quote the URL or a row."""
    patterns = {
        "": r"\bline: \d+, column: \d+",  # in the migration
        "network: ": r"(?<=: )(?:no such host|i/o timeout|connect: [a-z ]+)$",
        "SQLSTATE ": r"(?<=\()[0-9A-Z]{5}(?=\)$)",
    }
    found = [
        kind + match[0]
        for kind, pattern in patterns.items()
        if (match := re.search(pattern, text, re.MULTILINE))
    ]
    return ", ".join(found) or "run dbmate itself for the reason; its output may show the URL"


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
        # In the environment: every user can read the arguments, and the URL holds a password.
        env={**os.environ, "DATABASE_URL": _with_libpq_tls_default(url)},
        check=False,
        **streams,
    )


def _with_libpq_tls_default(url: str) -> str:
    """dbmate insists on TLS where libpq only prefers it."""
    parts = urlsplit(url)
    if "sslmode=" in parts.query or "PGSSLMODE" in os.environ:
        return url
    return parts._replace(query="&".join(filter(None, [parts.query, "sslmode=prefer"]))).geturl()
