"""`chat-ticket-svc worker`: one of the server processes of `serve --workers`."""

import argparse

from chat_ticket_svc import config, workers
from chat_ticket_svc.commands import serve
from chat_ticket_svc.shutdown import ShutdownSignals
from chat_ticket_svc.telemetry import logs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("supervisor_pid", type=int)
    parser.add_argument("number", type=int)


def run(options: argparse.Namespace) -> int:
    """Serve with the settings of the supervisor, which has validated them."""
    workers.die_with_supervisor(options.supervisor_pid)
    shutdown = ShutdownSignals(with_terminal=False)
    settings = config.load()
    if settings.metrics_port:  # worker N serves its metrics on the setting's port plus N
        settings = config.load(metrics_port=settings.metrics_port + options.number)
    logs.configure(settings)
    return serve.run_server(settings, shutdown, lambda _: workers.report_listening())
