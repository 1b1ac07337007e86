"""The command line. Each command is a module of `commands`, with its own arguments."""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

import shtab

from chat_ticket_svc.addresses import ListenError
from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.embedded import EmbeddedPostgresError
from chat_ticket_svc.errors import DomainError
from chat_ticket_svc.telemetry import logs

# Each module has `add_arguments(parser)` and `run(options)`, which returns the exit status.
COMMANDS = {
    "serve": "run the server until SIGTERM or SIGINT",
    "migrate": "apply the pending migrations to the database",
    "migrate-status": "list the applied and the pending migrations",
    "check": "check the settings, the database, the keys and the running server",
    "token": "print a development token for a server with --embedded and jwt",
    "export": "write a tenant, or one of its sessions, as JSON Lines",
    "erase": "delete a tenant and all its data; safe to repeat",
    "worker": "",  # not in the help: only `serve --workers` runs it
}


def main(arguments: Sequence[str] | None = None) -> None:
    logs.install_excepthooks()
    if arguments is None:
        arguments = sys.argv[1:]
    options = _parser(arguments).parse_args(arguments)
    try:
        status = options.run(options)
    except (ConfigurationError, DomainError, EmbeddedPostgresError, ListenError) as error:
        sys.exit(f"chat-ticket-svc: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(status)


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands.

    Only the modules of the commands in `arguments` are imported: gRPC and psycopg take half a
    second to load.
    """
    parser = argparse.ArgumentParser(
        prog="chat-ticket-svc",
        description="A gRPC system of record for AI support chats, over PostgreSQL.",
        epilog="Settings are environment variables: see docs/reference/settings.md.",
    )
    shtab.add_argument_to(
        parser, "--print-completion", help="print a completion script for this shell"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prints_completion = any(argument.startswith("--print-completion") for argument in arguments)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text) if text else commands.add_parser(name)
        if prints_completion or name in arguments:
            module = importlib.import_module(f"chat_ticket_svc.commands.{name.replace('-', '_')}")
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
