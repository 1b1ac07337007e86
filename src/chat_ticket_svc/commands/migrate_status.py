"""`chat-ticket-svc migrate-status`: lists the applied and the pending migrations."""

import argparse

from chat_ticket_svc.commands import migrate
from chat_ticket_svc.store import schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(_: argparse.Namespace) -> int:
    url = migrate.database_url()
    schema.require_readable_migrations(url)
    return migrate.dbmate(url, "status")
