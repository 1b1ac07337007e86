"""Runs dbmate over the migrations. The lock makes concurrent runs wait for one another."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from chat_ticket_svc.store.schema import MIGRATIONS


def up(url: str, *, quiet: bool = False) -> int:
    """Bring a database to the newest schema, creating it first when there is none."""
    # In two steps: of several that create at once all but one fail, and need not.
    _run(url, "create", capture_output=True)
    return dbmate(url, "migrate", quiet=quiet)


def dbmate(url: str, command: str, *, quiet: bool = False) -> int:
    """Run a dbmate command on the database of `url`; returns its exit status."""
    streams = {"stdout": subprocess.DEVNULL if quiet else None, "stderr": subprocess.PIPE}
    done = _run(url, command, **streams)
    if done.returncode != 0:
        why = _why(done.stderr.decode(errors="replace"))
        print(f"chat-ticket-svc: {command} failed: {why}", file=sys.stderr)
    return done.returncode


def _why(text: str) -> str:
    """What can be shown of dbmate's words, which may quote the URL, or what a row holds."""
    known = {
        "": r"\bline: \d+, column: \d+",  # in the migration
        "network: ": r"(?<=: )(?:no such host|i/o timeout|connect: [a-z ]+)$",
        "SQLSTATE ": r"(?<=\()[0-9A-Z]{5}(?=\)$)",
    }
    found = [
        kind + match[0]
        for kind, each in known.items()
        if (match := re.search(each, text, re.MULTILINE))
    ]
    return ", ".join(found) or "dbmate itself would tell more, the URL included"


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
        # Not as an argument: the URL holds a password, and arguments are there for all to see.
        env={**os.environ, "DATABASE_URL": _like_libpq(url)},
        check=False,
        **streams,
    )


def _like_libpq(url: str) -> str:
    """dbmate insists on TLS where libpq only prefers it."""
    parts = urlsplit(url)
    if "sslmode=" in parts.query or "PGSSLMODE" in os.environ:
        return url
    return parts._replace(query="&".join(filter(None, [parts.query, "sslmode=prefer"]))).geturl()
