"""`chat-ticket-svc serve`: runs the server, or several server processes on one port."""

import argparse
import asyncio
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import structlog

from chat_ticket_svc import config, event_engine, workers
from chat_ticket_svc.commands import arguments, migrate
from chat_ticket_svc.config import ConfigurationError, Settings
from chat_ticket_svc.embedded import EmbeddedPostgres, EmbeddedPostgresError
from chat_ticket_svc.shutdown import ShutdownSignals, run_until_shutdown
from chat_ticket_svc.telemetry import logs

log = structlog.get_logger()

# A warning in the log, when the switch to prevent it has no effect.
EVENT_ENGINE_READS = "gRPC's EventEngine reads the connections, which costs more CPU time"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--port", type=arguments.port, help="the port to listen on; overrides CHAT_TICKET_PORT"
    )
    parser.add_argument(
        "--workers",
        type=arguments.integer(1, config.MAX_WORKERS),
        metavar="N",
        help="the number of server processes; overrides CHAT_TICKET_WORKERS",
    )
    parser.add_argument(
        "--embedded",
        type=Path,
        metavar="DIRECTORY",
        help="for development: run and migrate a PostgreSQL of its own in this data directory",
    )


def run(options: argparse.Namespace) -> int:
    given = {"port": options.port, "workers": options.workers}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    shutdown = ShutdownSignals(with_terminal=options.embedded is not None)
    with _embedded_settings(options.embedded) as embedded:
        overrides |= embedded
        settings = config.load(**overrides)
        if not settings.database_url:
            raise ConfigurationError("DATABASE_URL: required without --embedded")
        logs.configure(settings)
        if unknown := config.unknown_variables(os.environ):
            log.warning("unknown settings have no effect", variables=unknown)

        def on_listening(port: int) -> None:
            if options.embedded is not None:
                example = _example_call(settings, port, options.embedded.parent)
                # For other commands, to be run while this server runs.
                url = f"export DATABASE_URL={shlex.quote(settings.database_url)}"
                # Not print(): with PYTHONUNBUFFERED it writes the newline separately, and the
                # logging thread could write a line in between.
                sys.stdout.write(f"{example}\n{url}\n")
                sys.stdout.flush()

        if settings.workers == 1:
            return run_server(settings, shutdown, on_listening)
        return _run_workers(settings, overrides, shutdown, on_listening)


def run_server(
    settings: Settings, shutdown: ShutdownSignals, on_listening: Callable[[int], None]
) -> int:
    """Serve in this process until a signal; returns the exit status."""
    # gRPC's threads wake one another many times per call. Under SCHED_BATCH they do not preempt one
    # another, which saves a seventh of the CPU time. Threads that start later inherit the policy.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    # By default gRPC prints a line to stderr for each failed handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    event_engine.disable_listener(os.environ)
    # Imported here, because gRPC takes half a second to load, and the supervisor must not load it.
    import uvloop

    from chat_ticket_svc import server
    from chat_ticket_svc.telemetry import tracing

    if settings.traces:
        tracing.configure()

    def report_listening(port: int) -> None:
        if event_engine.is_listening():
            log.warning(EVENT_ENGINE_READS)
        on_listening(port)

    async def serve(stop: asyncio.Event) -> int:
        await server.run(settings, stop, report_listening)
        return 0

    try:
        return run_until_shutdown(serve, shutdown, uvloop.new_event_loop)
    finally:
        tracing.shutdown()


def _run_workers(
    settings: Settings,
    overrides: Mapping[str, Any],
    shutdown: ShutdownSignals,
    on_listening: Callable[[int], None],
) -> int:
    with workers.reserve_port(settings.host, settings.port) as port:
        overrides = {**overrides, "port": port, "workers": settings.workers}
        variables = {config.variable(name): str(value) for name, value in overrides.items()}

        async def supervise(stop: asyncio.Event) -> int:
            supervisor = workers.Supervisor(settings.workers, {**os.environ, **variables}, stop)
            return await supervisor.run(lambda: on_listening(port))

        return run_until_shutdown(supervise, shutdown)


@contextlib.contextmanager
def _embedded_settings(directory: Path | None) -> Iterator[dict[str, str]]:
    """Run an embedded PostgreSQL, and yield the settings of a server that uses it."""
    if directory is None:
        yield {}
        return
    with EmbeddedPostgres(directory) as postgres:
        url = postgres.url("chat_ticket")
        if migrate.up(url, quiet=True) != 0:
            raise EmbeddedPostgresError(f"{directory}: cannot migrate the database")
        overrides = dict.fromkeys(("DATABASE_URL", "DATABASE_LISTEN_URL"), url)
        if "jwt" in os.environ.get("CHAT_TICKET_AUTH", "") and not os.environ.get(
            "CHAT_TICKET_JWKS"
        ):
            from chat_ticket_svc.commands import token

            overrides |= token.development_settings(directory.parent)
        yield overrides


def _example_call(settings: Settings, port: int, directory: Path) -> str:
    """A grpcurl command that calls this server, ready to paste into a shell."""
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
        from chat_ticket_svc.commands import token

        bearer = "TOKEN"
        if settings.jwt_issuer == token.ISSUER:
            command = [python, "-m", "chat_ticket_svc", "token", "--tenant", "acme"]
            bearer = f"$({shlex.join([*command, '--directory', str(directory)])})"
        line += f' -H "authorization: Bearer {bearer}"'
    else:
        line += " -H 'x-tenant-id: acme'"
    return f"{line} localhost:{port} chat_ticket.v1.ChatSessionService/ListChatSessions"
