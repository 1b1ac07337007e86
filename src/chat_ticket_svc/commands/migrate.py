"""`chat-ticket-svc migrate`: applies the pending migrations, with dbmate.

Concurrent runs wait for one another: dbmate takes an advisory lock.
"""

import argparse
import contextlib
import os
import re
import secrets
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, NoReturn, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

from tqdm import tqdm

from chat_ticket_svc import config
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store import schema
from chat_ticket_svc.store.connection import libpq_parameters, require_valid_url, start_options
from chat_ticket_svc.store.driver_errors import describe
from chat_ticket_svc.store.migration_progress import (
    SESSION_SETTINGS,
    Activity,
    IndexBuild,
    MigrationProgress,
)
from chat_ticket_svc.store.schema import MIGRATIONS

POLL_SECONDS = 1.0
DEFAULT_COLUMNS, DEFAULT_ROWS = 80, 24

# The parameters of libpq that dbmate's driver, lib/pq, knows too. It sends others to PostgreSQL as
# settings, which refuses them, and it refuses to start with most of their environment variables.
DRIVER_PARAMETERS = {
    *("application_name", "client_encoding", "connect_timeout", "dbname"),
    *("fallback_application_name", "host", "hostaddr", "load_balance_hosts"),
    *("max_protocol_version", "min_protocol_version", "options", "passfile", "password", "port"),
    *("service", "servicefile", "ssl_max_protocol_version", "ssl_min_protocol_version"),
    *("sslcert", "sslkey", "sslmode", "sslnegotiation", "sslrootcert", "sslsni"),
    *("target_session_attrs", "user"),
}


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
    with _start(url, "create", SESSION_SETTINGS, stdout=DEVNULL, stderr=DEVNULL):
        pass
    schema.require_utf8_database(url)
    return dbmate(url, "migrate", quiet=quiet)


def dbmate(url: str, command: str, *, quiet: bool = False) -> int:
    """Run a dbmate command on the database of `url`; returns its exit status.

    Unless `quiet`, says what it waits for, who waits for it, and how far an index is.
    """
    name = f"chat-ticket-svc {command} {secrets.token_hex(4)}"
    with (
        contextlib.closing(MigrationProgress(url, name)) as progress,
        tempfile.TemporaryFile() as errors,
        _start(
            url,
            command,
            progress.session_settings(),
            application_name=name,
            stdout=PIPE,
            stderr=errors,
        ) as process,
        _Report(process, quiet=quiet) as report,
    ):
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(POLL_SECONDS)
                break
            if not quiet:
                report.show(progress.activities())
        errors.seek(0)
        output = errors.read().decode(errors="replace")
    if process.returncode != 0:
        where = f" in {report.file}" if report.file else ""
        reason = _error_reason(output, has_begun=bool(report.file))
        print(f"chat-ticket-svc: {command} failed{where}: {reason}", file=sys.stderr)
    if report.output_error is not None:
        raise report.output_error
    return process.returncode


class _Report:
    """Prints what dbmate prints, and in between what it waits for."""

    def __init__(self, process: subprocess.Popen[bytes], *, quiet: bool):
        self.file = ""  # the migration that was begun last
        self.output_error: OSError | None = None  # standard output cannot be written to
        self._process = process
        self._quiet = quiet
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._last: list[str] = []
        self._said: set[str] = set()
        self._bar: tqdm[NoReturn] | None = None
        self._bar_of = ("", "")

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.join()
        self._show_index(None)

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker
        for line in map(bytes.decode, self._process.stdout):
            if match := re.match(r"(?:Applying|Rolling back): (\S+)", line):
                self.file = match[1]
            if self._quiet or self.output_error is not None:
                continue  # read all the same: dbmate must not be stopped by a full pipe
            try:
                tqdm.write(line, file=sys.stdout, end="")
                sys.stdout.flush()
            except OSError as error:
                self.output_error = error

    def show(self, activities: list[Activity]) -> None:
        """Say once what has lasted since the last call, and move the bar."""
        now = [line for activity in activities for line in self._lines(activity)]
        for line in now:
            if line in self._last and line not in self._said:
                self._said.add(line)
                tqdm.write(f"chat-ticket-svc: {line}", file=sys.stderr)
        self._last = now
        self._show_index(next((a.index_build for a in activities if a.index_build), None))

    def _lines(self, activity: Activity) -> Iterator[str]:
        lock = "another run, of" if activity.waits_for_migration else "a lock of"
        for blocker in activity.blockers:
            yield f"waits for {lock} process {blocker}"
        if activity.exclusive:
            yield f"{self.file}: reads and writes of {', '.join(activity.exclusive)} wait for it"
        if activity.shared:
            yield f"{self.file}: writes of {', '.join(activity.shared)} wait for it"

    def _show_index(self, index: IndexBuild | None) -> None:
        if self._bar is not None and (index is None or self._bar_of != index[:2]):
            self._bar.close()
            self._bar = None
        if index is None:
            return
        if self._bar is None:
            self._bar_of = (index.table, index.phase)
            self._bar = tqdm(
                desc=f"index of {index.table}, {index.phase}",
                bar_format="{desc}: {percentage:3.0f}% {bar} {elapsed}",
                disable=None,
                leave=False,
                **_bar_size(),
            )
        self._bar.total = index.total
        self._bar.n = index.done
        self._bar.refresh()


def _bar_size() -> dict[str, Any]:
    """The size for a bar on a terminal that has none. Otherwise tqdm takes the terminal's."""
    with contextlib.suppress(OSError):  # not a terminal: no bar is shown
        if 0 in os.get_terminal_size(sys.stderr.fileno()):
            return {"ncols": DEFAULT_COLUMNS, "nrows": DEFAULT_ROWS}
    return {}


def _error_reason(output: str, *, has_begun: bool) -> str:
    """The parts of dbmate's output that contain no secret. The rest may quote the URL or a row."""
    patterns = {
        "": r"\bline: \d+, column: \d+",  # in the migration
        "network: ": r"(?<=: )(?:no such host|i/o timeout|connect: [a-z ]+)$",
    }
    reasons = [
        kind + match[0]
        for kind, pattern in patterns.items()
        if (match := re.search(pattern, output, re.MULTILINE))
    ]
    error = r"(?:.*pq: (?P<text>.*?)(?: at position [\d:]+)? )?\((?P<state>[0-9A-Z]{5})\)\s*\Z"
    if match := re.search(error, output, re.DOTALL):
        # Before the first migration, names may be those of options in the URL.
        may_quote_url = not has_begun and match["state"] != "42501"
        text = "" if may_quote_url else (match["text"] or "")
        reasons.append(describe(match["state"], " ".join(text.split())))
    return ", ".join(reasons) or "run dbmate directly for the reason; its output may show the URL"


def _start(
    url: str,
    command: str,
    settings: Mapping[str, str],
    *,
    application_name: str = "",
    **streams: Any,
) -> subprocess.Popen[bytes]:
    variables = _parameters_of_libpq_alone().values()
    return subprocess.Popen(  # noqa: S603 - our own binary
        [
            Path(sysconfig.get_path("scripts")) / "dbmate",
            "--migrations-dir",
            MIGRATIONS,
            "--migration-lock",
            "--no-dump-schema",
            command,
        ],
        # In the environment, because every user can read arguments, and the URL holds a password.
        env={
            **{name: value for name, value in os.environ.items() if name not in variables},
            "DATABASE_URL": _with_session(url, settings, application_name),
            # dbmate's driver refuses any others.
            "PGCLIENTENCODING": "UTF8",
            "PGDATESTYLE": "ISO, MDY",
        },
        **streams,
    )


def _with_session(url: str, settings: Mapping[str, str], application_name: str) -> str:
    """The URL with settings for the session, after those of its own.

    Without the parameters that dbmate's driver would refuse.
    """
    parts = urlsplit(_with_libpq_tls_default(url))
    dropped = {"application_name", "client_encoding", *_parameters_of_libpq_alone()}
    url_options = None
    others = []
    for parameter in filter(None, parts.query.split("&")):
        key, _, value = parameter.partition("=")
        if key == "options":
            url_options = unquote(value)
        elif key not in dropped:
            others.append(parameter)
    added = {
        "options": start_options(url_options, settings),
        "application_name": application_name or "chat-ticket-svc",
    }
    query = "&".join([*others, urlencode(added, quote_via=quote)])
    return parts._replace(query=query).geturl()


def _parameters_of_libpq_alone() -> dict[str, str]:
    """Each with its environment variable."""
    known = libpq_parameters().items()
    return {name: variable for name, variable in known if name not in DRIVER_PARAMETERS}


def _with_libpq_tls_default(url: str) -> str:
    """The URL with libpq's default for TLS, `prefer`. dbmate's default requires TLS."""
    parts = urlsplit(url)
    if "sslmode=" in parts.query or "PGSSLMODE" in os.environ:
        return url
    return parts._replace(query="&".join(filter(None, [parts.query, "sslmode=prefer"]))).geturl()
