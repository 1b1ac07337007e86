"""The command line: serve, migrate, migrate-status, check, token, export, erase."""

import argparse
import asyncio
import contextlib
import os
import shlex
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO
from uuid import UUID

import shtab
import structlog

from chat_ticket_svc import config, logs, migrate, workers
from chat_ticket_svc.access.credential import TENANT_ID, Permission
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.embedded import EmbeddedPostgres, EmbeddedPostgresError
from chat_ticket_svc.errors import DomainError

if TYPE_CHECKING:  # it takes a while that others need not wait for
    from chat_ticket_svc.store.database import Database

# Counting a large tenant is not a call.
LONG_MS = 600_000

log = structlog.get_logger()


def main(arguments: list[str] | None = None) -> None:
    logs.guard()
    parser = argparse.ArgumentParser(
        prog="chat-ticket-svc",
        description="A gRPC system of record for AI support chats, over PostgreSQL.",
        epilog="Settings are environment variables; the README lists them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser("serve", help="serve until SIGTERM or SIGINT")
    serve.add_argument("--port", type=int, help="overrides CHAT_TICKET_PORT")
    serve.add_argument(
        "--workers", type=int, metavar="N", help="server processes; overrides CHAT_TICKET_WORKERS"
    )
    serve.add_argument(
        "--embedded",
        type=Path,
        metavar="DIRECTORY",
        help="run a private PostgreSQL on this data directory, migrated, for development",
    )
    worker = commands.add_parser("worker")  # for `serve` alone, so the help does not list it
    worker.add_argument("parent", type=int)
    worker.add_argument("number", type=int)
    commands.add_parser("migrate", help="bring the database to the newest schema")
    commands.add_parser("migrate-status", help="list the applied and the pending migrations")
    check = commands.add_parser(
        "check", help="look at the settings, the database, the keys and the running server"
    )
    check.add_argument(
        "--token-file", type=Path, metavar="FILE", help="has a token for a call to the server"
    )
    check.add_argument("--tenant", type=_tenant_id, metavar="ID", help="the tenant of that call")
    token = commands.add_parser(
        "token", help="print a token for a server that `serve --embedded` runs with jwt"
    )
    check.add_argument(
        "--probe", action="store_true", help="only ask the server for its health, as containers do"
    )
    token.add_argument(
        "--tenant",
        action="append",
        default=[],
        type=_tenant_id,
        metavar="ID",
        help="a tenant that the token is for; may be repeated; without it, all tenants",
    )
    token.add_argument(
        "--permission",
        action="append",
        default=[],
        choices=[permission.value for permission in Permission],
        help="may be repeated; without it, all of them",
    )
    token.add_argument(
        "--seconds", type=int, default=3600, help="how long it is valid (default: %(default)s)"
    )
    token.add_argument(
        "--directory",
        type=Path,
        default=Path(".data"),
        help="where `serve --embedded DIRECTORY/...` has its key; made when there is none"
        " (default: %(default)s)",
    )
    export = commands.add_parser(
        "export", help="write a tenant, or one of its sessions, as JSON Lines"
    )
    export.add_argument("--tenant", type=_tenant_id, required=True, metavar="ID")
    export.add_argument("--session", type=_uuid, metavar="ID", help="only this session")
    export.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="which is there when it is whole; without it, the standard output",
    )
    erase = commands.add_parser(
        "erase", help="delete a tenant with all it has; to be repeated when it was cut off"
    )
    erase.add_argument("--tenant", type=_tenant_id, required=True, metavar="ID")
    erase.add_argument("--dry-run", action="store_true", help="only count what would go")
    erase.add_argument(
        "--active-tickets",
        action="store_true",
        help="erase also tickets that are open or pending, for which it is refused otherwise",
    )
    erase.add_argument("--yes", action="store_true", help="do not ask for the tenant to be typed")
    shtab.add_argument_to(
        parser, "--print-completion", help="print the completion of a shell, to be sourced by it"
    )
    options = parser.parse_args(arguments)
    try:
        match options.command:
            case "serve":
                status = _serve(options)
            case "worker":
                status = _work(options.parent, options.number)
            case "token":
                status = _token(options)
            case "check":
                status = _check(options)
            case "export":
                status = _on_database(lambda db: _export(db, options))
            case "erase":
                status = _on_database(lambda db: _erase(db, options))
            case command:
                status = _migrate(command)
    except (
        ConfigurationError,
        DomainError,
        EmbeddedPostgresError,
        workers.PortTakenError,
    ) as error:
        sys.exit(f"chat-ticket-svc: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(status)


def _tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("is not 1 to 255 printable ASCII characters")
    return text


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError("is not a UUID") from error


def _check(options: argparse.Namespace) -> int:
    from chat_ticket_svc.check import check, probe

    logs.configure(config.Settings.model_construct(log_level="error", log_format="console"))
    settings = config.load()
    if options.probe:
        return 0 if asyncio.run(probe(settings)) else 1
    token = ""
    if options.token_file is not None:
        token = config.contents("--token-file", options.token_file).decode().strip()
    well = asyncio.run(check(settings, os.environ, token=token, tenant_id=options.tenant))
    return 0 if well else 1


def _on_database(work: Callable[["Database"], Coroutine[Any, Any, int]]) -> int:
    """Run `work` on a migrated database. It is read and written as by a server, but for longer."""
    from chat_ticket_svc.store import schema
    from chat_ticket_svc.store.database import Database, require_readable

    settings = config.load()
    if not settings.database_url:
        raise ConfigurationError("DATABASE_URL: is required")
    require_readable("DATABASE_URL", settings.database_url)

    async def run() -> int:
        facts = await schema.facts(settings.database_url)
        if facts.missing:
            raise schema.StaleSchemaError(facts.missing)
        db = Database(
            settings.database_url,
            pool_size=2,
            prepare_statements=settings.prepare_statements,
            statement_timeout_ms=LONG_MS,
            # An erase that was killed may hold its locks until PostgreSQL is done with them.
            lock_timeout_ms=LONG_MS,
        )
        await db.open()
        try:
            return await work(db)
        finally:
            await db.close()

    return asyncio.run(run())


async def _export(db: "Database", options: argparse.Namespace) -> int:
    from chat_ticket_svc.export import export, whole

    async def exported(file: TextIO) -> None:
        if not await export(db, options.tenant, options.session, file):
            raise ConfigurationError(f"the tenant {options.tenant} has nothing")

    try:
        if options.output is None:
            await exported(sys.stdout)
        else:
            with whole(options.output) as file:
                await exported(file)
    except OSError as error:
        if options.output is None:  # Python would complain of what it still has to write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # who reads has enough
            return 128 + signal.SIGPIPE
        where = options.output or "the standard output"
        print(f"chat-ticket-svc: cannot write {where}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


async def _erase(db: "Database", options: argparse.Namespace) -> int:
    from chat_ticket_svc.erase import erase

    return await erase(
        db,
        options.tenant,
        dry_run=options.dry_run,
        active_tickets=options.active_tickets,
        confirmed=options.yes,
    )


def _token(options: argparse.Namespace) -> int:
    from chat_ticket_svc import development

    print(
        development.token(
            options.directory,
            tenants=options.tenant,
            permissions=options.permission,
            seconds=options.seconds,
        )
    )
    return 0


def _migrate(command: str) -> int:
    settings = config.load()
    if not settings.migrate_url:
        raise ConfigurationError("DATABASE_URL: is required")
    if config.has_several_hosts(settings.migrate_url):
        raise ConfigurationError(
            "MIGRATE_DATABASE_URL: is required, of the primary, by a DATABASE_URL of several hosts"
        )
    if command == "migrate":
        return migrate.up(settings.migrate_url)
    return migrate.dbmate(settings.migrate_url, "status")


def _serve(options: argparse.Namespace) -> int:
    given = {"port": options.port, "workers": options.workers}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    end = _End(with_terminal=options.embedded is not None)
    with _database(options.embedded) as embedded:
        overrides |= embedded
        settings = config.load(**overrides)
        if not settings.database_url:
            raise ConfigurationError("DATABASE_URL: is required (or serve --embedded DIRECTORY)")
        logs.configure(settings)
        if unknown := config.unknown(os.environ):
            log.warning("unknown settings are not in effect", variables=unknown)

        def listening(port: int) -> None:
            if options.embedded is not None:
                example = _an_example(settings, port, options.embedded.parent)
                # For the commands that need it, as long as this runs.
                url = f"export DATABASE_URL={shlex.quote(settings.database_url)}"
                # With PYTHONUNBUFFERED, print() writes the newline by itself: a line of the log,
                # which another thread writes to the same terminal, would come before it.
                sys.stdout.write(f"{example}\n{url}\n")
                sys.stdout.flush()

        if settings.workers == 1:
            return _run_server(settings, end, listening)
        return _run_workers(settings, overrides, end, listening)


def _run_server(settings: Settings, end: "_End", listening: Callable[[int], None]) -> int:
    # The threads of gRPC wake one another many times in a call; without pushing one another aside
    # they take a seventh less time for it. Threads to come inherit it.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # One line for each handshake that fails is gRPC's default, in a form of its own.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Imported here: gRPC takes half a second that others need not wait for.
    import uvloop

    from chat_ticket_svc import server, tracing

    if settings.traces:
        tracing.configure()

    async def serve(stop: asyncio.Event) -> int:
        await server.run(settings, stop, listening)
        return 0

    try:
        return _run(serve, end, uvloop.new_event_loop)
    finally:
        tracing.shutdown()


def _run_workers(
    settings: Settings,
    overrides: Mapping[str, Any],
    end: "_End",
    listening: Callable[[int], None],
) -> int:
    with workers.reserved(settings.host, settings.port) as port:
        overrides = {**overrides, "port": port, "workers": settings.workers}
        variables = {config.variable(name): str(value) for name, value in overrides.items()}

        async def supervise(stop: asyncio.Event) -> int:
            parent = workers.Parent(settings.workers, {**os.environ, **variables}, stop)
            return await parent.run(lambda: listening(port))

        return _run(supervise, end)


def _work(parent: int, number: int) -> int:
    """Be one of the workers of a `serve`, which has looked at the settings."""
    workers.end_with_parent(parent)
    end = _End(with_terminal=False)
    settings = config.load()
    if settings.metrics_port:  # each has its own, one after the other
        settings = config.load(metrics_port=settings.metrics_port + number)
    logs.configure(settings)
    return _run_server(settings, end, lambda _: workers.tell_parent_of_listening())


def _run(
    work: Callable[[asyncio.Event], Coroutine[Any, Any, int]],
    end: "_End",
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> int:
    """Run `work`, whose event is set by the signal to end; returns the exit status."""

    async def until_signalled() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        end.request = lambda: loop.call_soon_threadsafe(stop.set)
        if end.requested:  # and SystemExit was lost: where import cleans up, exceptions are ignored
            stop.set()
        loop.set_exception_handler(logs.background_error)
        return await work(stop)

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(until_signalled())


class _End:
    """Makes the first SIGTERM or SIGINT end the process in order, and later ones do nothing.

    Not by the event loop's own handlers: those begin and end with the loop, and a signal has to
    leave through the end of the embedded PostgreSQL also before and after.

    So does SIGHUP when the process is to end with its terminal, unless nohup says otherwise. A
    server's operators mean by it that files are to be read again, which they are by themselves.
    """

    def __init__(self, *, with_terminal: bool) -> None:
        self.request: Callable[[], object] = sys.exit
        self.requested = False
        self._signals = [signal.SIGTERM, signal.SIGINT]
        if with_terminal and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            self._signals.append(signal.SIGHUP)
        else:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in self._signals:
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        for number in self._signals:
            signal.signal(number, signal.SIG_IGN)
        self.requested = True
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
        overrides = dict.fromkeys(("DATABASE_URL", "DATABASE_LISTEN_URL"), url)
        if "jwt" in os.environ.get("CHAT_TICKET_AUTH", "") and not os.environ.get(
            "CHAT_TICKET_JWT_KEYS"
        ):
            from chat_ticket_svc import development

            overrides |= development.settings(directory.parent)
        yield overrides


def _an_example(settings: Settings, port: int, directory: Path) -> str:
    """A call of this server, to be pasted into a shell."""
    python = os.path.relpath(sys.executable)
    words = [str(Path(python).with_name("grpcurl"))]
    if settings.tls_certificate is None:
        words.append("-plaintext")
    else:
        words += ["-cacert", "AUTHORITY.pem"]
    if "mtls" in settings.auth:
        words += ["-cert", "CLIENT.pem", "-key", "CLIENT-KEY.pem"]
    line = shlex.join(words)
    if "jwt" in settings.auth:
        from chat_ticket_svc import development

        token = "TOKEN"  # noqa: S105 - the place of one
        if settings.jwt_issuer == development.ISSUER:
            command = [python, "-m", "chat_ticket_svc", "token", "--tenant", "acme"]
            token = f"$({shlex.join([*command, '--directory', str(directory)])})"
        line += f' -H "authorization: Bearer {token}"'
    else:
        line += " -H 'x-tenant-id: acme'"
    return f"{line} localhost:{port} chat_ticket.v1.ChatSessionService/ListChatSessions"
