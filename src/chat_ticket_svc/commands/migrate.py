"""`chat-ticket-svc migrate`: applies the pending migrations, with dbmate, and builds the search
index where there are messages.

Concurrent runs wait for one another: dbmate takes an advisory lock, and the build of the index
another one.
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
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import Any, Self
from urllib.parse import quote, unquote, urlencode, urlsplit

from tqdm import tqdm

from chat_ticket_svc import config
from chat_ticket_svc.commands.migration_report import MigrationReport
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.store import schema, search_index
from chat_ticket_svc.store.connection import (
    MIGRATION_APPLICATION_NAME,
    libpq_parameters,
    require_valid_url,
    start_options,
)
from chat_ticket_svc.store.driver_errors import describe
from chat_ticket_svc.store.migration_progress import SESSION_SETTINGS, MigrationProgress
from chat_ticket_svc.store.schema import MIGRATIONS

POLL_SECONDS = 1.0

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
# How it sends values: not for the session.
PARAMETERS_OF_DRIVER_ALONE = {"binary_parameters", "disable_prepared_binary_result"}


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
    """Create the database if it does not exist, apply the pending migrations, and build the index.

    Returns dbmate's exit status. Otherwise raises what `build_search_index` raises.
    """
    # The result is ignored: of several concurrent runs, only one succeeds in creating the database.
    with _start(url, "create", SESSION_SETTINGS, stdout=DEVNULL, stderr=DEVNULL):
        pass
    schema.require_utf8_database(url)
    status = dbmate(url, "migrate", quiet=quiet)
    if status == 0:
        build_search_index(url, quiet=quiet)
    return status


def build_search_index(url: str, *, renew: bool = False, quiet: bool = False) -> None:
    """Build the search index, unless it is there. Reports as `dbmate` does.

    With `renew`, also if another major version of PostgreSQL has built it. Raises
    ConfigurationError and UnavailableError; then another run goes on.
    """

    def is_due(connection: search_index.Connection) -> bool:
        if not search_index.is_migrated(connection):
            return False
        state = search_index.state(connection)
        return not state.is_built or (renew and state.is_stale)

    url = _libpq_url(url)
    with search_index.connect(url, MIGRATION_APPLICATION_NAME) as connection:
        if not is_due(connection):
            return
    with _turn(url, quiet=quiet) as connection:
        if is_due(connection):  # no other run has built it
            _say(f"Building: {search_index.INDEX}", quiet=quiet)
            started_at = time.monotonic()
            search_index.build(connection)
            seconds = time.monotonic() - started_at
            _say(f"Built: {search_index.INDEX} in {seconds:.1f}s", quiet=quiet)


def drop_unused_search_indexes(url: str) -> None:
    """Drop the search index of the version before, and what killed runs left. As above."""
    with _turn(_libpq_url(url), quiet=False) as connection:
        for name in search_index.drop_unused(connection):
            _say(f"Dropped: {name}", quiet=False)


def _say(line: str, *, quiet: bool) -> None:
    if not quiet:
        print(line, flush=True)


@contextlib.contextmanager
def _turn(url: str, *, quiet: bool) -> Iterator[search_index.Connection]:
    """A connection that alone changes the search index. Unless `quiet`, reports what it does.

    A thread reports, as Ctrl-C interrupts a statement of the main thread.
    """
    name = f"chat-ticket-svc migrate {secrets.token_hex(4)}"
    if quiet:
        with search_index.turn(url, name, lambda _: None) as connection:
            yield connection
        return
    has_ended = threading.Event()
    report = MigrationReport()

    def show() -> None:
        with contextlib.closing(MigrationProgress(url, name)) as progress:
            while not has_ended.wait(POLL_SECONDS):
                report.show(progress.activities())

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        with search_index.turn(url, name, report.say_waits_for_run) as connection:
            yield connection
    finally:
        has_ended.set()
        thread.join()
        report.close()


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


class _Report(MigrationReport):
    """Prints what dbmate prints, and in between what it waits for."""

    def __init__(self, process: subprocess.Popen[bytes], *, quiet: bool):
        super().__init__()
        self.output_error: OSError | None = None  # standard output cannot be written to
        self._process = process
        self._quiet = quiet
        self._reader = threading.Thread(target=self._read, daemon=True)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.join()
        self.close()

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


def _libpq_url(url: str) -> str:
    """A URL for dbmate's driver, as libpq can read it: what it does not know sets the session."""
    parts = urlsplit(url)
    url_options = None
    settings = {}
    others = []
    for parameter in filter(None, parts.query.split("&")):
        key, _, value = parameter.partition("=")
        if key == "options":
            url_options = unquote(value)
        elif key in libpq_parameters():
            others.append(parameter)
        elif key not in PARAMETERS_OF_DRIVER_ALONE:
            settings[key] = unquote(value)
    if url_options is not None or settings:
        options = {"options": start_options(url_options, settings)}
        others.append(urlencode(options, quote_via=quote))
    return parts._replace(query="&".join(others)).geturl()


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
