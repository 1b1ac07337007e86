"""The command line: serve, migrate, migrate-status."""

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from chat_ticket_svc import config, migrate
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.embedded import EmbeddedPostgres, EmbeddedPostgresError


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="chat-ticket-svc",
        description="A gRPC system of record for AI support chats, over PostgreSQL.",
        epilog="Settings are environment variables; the README lists them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve until SIGTERM or SIGINT")
    serve.add_argument("--port", type=int, help="overrides CHAT_TICKET_PORT")
    serve.add_argument(
        "--embedded",
        type=Path,
        metavar="DIRECTORY",
        help="run a private PostgreSQL on this data directory, migrated, for development",
    )
    commands.add_parser("migrate", help="bring the database to the newest schema")
    commands.add_parser("migrate-status", help="list the applied and the pending migrations")
    options = parser.parse_args(arguments)
    try:
        status = _serve(options) if options.command == "serve" else _migrate(options.command)
    except (ConfigurationError, EmbeddedPostgresError) as error:
        sys.exit(f"chat-ticket-svc: {error}")
    sys.exit(status)


def _migrate(command: str) -> int:
    settings = config.load()
    if not settings.migrate_url:
        raise ConfigurationError("DATABASE_URL: is required")
    if command == "migrate":
        return migrate.up(settings.migrate_url)
    return migrate.dbmate(settings.migrate_url, "status")


def _serve(options: argparse.Namespace) -> int:
    # Imported here: gRPC takes half a second that the other commands need not wait for.
    import uvloop

    from chat_ticket_svc import server

    overrides = {} if options.port is None else {"port": options.port}
    end = _End()
    with _database(options.embedded) as embedded:
        settings = config.load(**overrides, **embedded)
        if not settings.database_url:
            raise ConfigurationError("DATABASE_URL: is required (or serve --embedded DIRECTORY)")
        _configure_log(settings)

        async def until_signalled() -> None:
            stop = asyncio.Event()
            loop = asyncio.get_running_loop()
            end.request = lambda: loop.call_soon_threadsafe(stop.set)
            await server.run(settings, stop)

        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(until_signalled())
        except (server.StaleSchemaError, server.PortTakenError) as error:
            sys.exit(f"chat-ticket-svc: {error}")
    return 0


class _End:
    """Makes the first SIGTERM or SIGINT end the process in order, and later ones do nothing.

    Not by the event loop's own handlers: those begin and end with the loop, and a signal has to
    leave through the end of the embedded PostgreSQL also before and after.
    """

    def __init__(self) -> None:
        self.request: Callable[[], object] = sys.exit
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.request()


@contextlib.contextmanager
def _database(directory: Path | None) -> Iterator[dict[str, str]]:
    """The settings that an embedded PostgreSQL brings, while it runs."""
    if directory is None:
        yield {}
        return
    with EmbeddedPostgres(directory) as postgres:
        url = postgres.url("chat_ticket")
        if migrate.up(url, quiet=True) != 0:
            raise EmbeddedPostgresError(f"the database in {directory} could not be migrated")
        yield dict.fromkeys(("DATABASE_URL", "DATABASE_LISTEN_URL"), url)


def _configure_log(settings: Settings) -> None:
    """One form for all lines, those of the libraries included."""
    for_people = settings.log_format == "console" or (
        settings.log_format == "auto" and sys.stderr.isatty()
    )
    renderer = (
        structlog.dev.ConsoleRenderer() if for_people else structlog.processors.JSONRenderer()
    )
    common: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[*common, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*common, structlog.stdlib.add_logger_name],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
