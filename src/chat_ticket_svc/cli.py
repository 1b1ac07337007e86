"""The command line. Each command is a module of `commands`, with its own arguments.

This module itself imports little: `main` first prepares the standard streams.
"""

import argparse
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

# Each module has `add_arguments(parser)` and `run(options)`, which returns the exit status.
COMMANDS = {
    "serve": "run the server until SIGTERM or SIGINT",
    "migrate": "apply the pending migrations to the database, and build the search index",
    "migrate-status": "list the applied and the pending migrations",
    "check": "check the settings, the database, the keys and the running server",
    "token": "print a development token for a server with --embedded and jwt",
    "tenant": "set or show the search language of a tenant",
    "reindex": "bring messages to the search languages of their tenants; safe to repeat",
    "export": "write a tenant, or one of its users or sessions, as JSON Lines",
    "expire": "delete sessions whose last change is too long ago; safe to repeat",
    "erase": "delete a tenant, or one of its users, and all their data; safe to repeat",
}
# Not in the help, the errors and the completion: only `serve --workers` runs it.
WORKER = "worker"


def main(arguments: Sequence[str] | None = None) -> None:
    _open_standard_streams()
    from chat_ticket_svc.addresses import ListenError
    from chat_ticket_svc.config import ConfigurationError
    from chat_ticket_svc.embedded import EmbeddedPostgresError
    from chat_ticket_svc.errors import DomainError
    from chat_ticket_svc.telemetry import logs

    logs.install_excepthooks()
    try:
        status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (ConfigurationError, DomainError, EmbeddedPostgresError, ListenError) as error:
        sys.exit(f"chat-ticket-svc: {error}")
    except OutputError as error:
        # What is left in the buffer is discarded. Python would fail to flush it at exit, and print
        # a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:  # the reader, such as `head`, has what it wants
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(f"chat-ticket-svc: cannot write standard output: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(status)


def _run(arguments: Sequence[str]) -> str | int | None:
    """Run the command, and return its exit status."""
    try:
        options = _parser(arguments).parse_args(arguments)
    except SystemExit as end:  # of argparse, after the help or an error
        return end.code
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # set by __main__ for the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status: int = options.run(options)
    return status


class OutputError(OSError):
    """Standard output cannot be written to."""


class _StandardOutput(io.FileIO):
    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OutputError(error.errno, error.strerror) from error


def _open_standard_streams() -> None:
    """Make the three standard streams usable, also where the caller has closed one.

    Otherwise the next file or socket would take the descriptor of a closed stream, and receive the
    output. What is read from, or written to, a closed stream fails: an export must not seem to
    succeed. Text that an encoding lacks is escaped.
    """
    for number, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for the life of the process
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if sys.stdout is sys.__stdout__:  # not one that a test has put in its place
        raw = _StandardOutput(1, "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw),
            encoding="utf-8" if sys.stdout is None else sys.stdout.encoding,
            errors="backslashreplace",
            line_buffering=raw.isatty() or bool(os.environ.get("PYTHONUNBUFFERED")),
        )
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")


class _Version(argparse.Action):
    """`--version`. The version is looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import importlib.metadata

        print(f"chat-ticket-svc {importlib.metadata.version('chat-ticket-svc')}")
        parser.exit()


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Only the modules of the commands in `arguments` are imported: gRPC and psycopg take half a
    second to load.
    """
    parser = argparse.ArgumentParser(
        prog="chat-ticket-svc",
        allow_abbrev=False,
        description="A gRPC system of record for AI support chats, over PostgreSQL.",
        epilog="Settings are environment variables: see docs/reference/settings.md.",
    )
    import shtab

    shtab.add_argument_to(
        parser, "--print-completion", help="print a completion script for this shell"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prints_completion = any(argument.startswith("--print-completion") for argument in arguments)
    is_worker = list(arguments[:1]) == [WORKER]
    for name, text in ({WORKER: ""} if is_worker else COMMANDS).items():
        command = commands.add_parser(name, help=text)
        if prints_completion or name in arguments:
            module = importlib.import_module(f"chat_ticket_svc.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
