"""`chat-ticket-svc migrate-status`: lists the applied and the pending migrations."""

import argparse

from chat_ticket_svc.commands import migrate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def run(_: argparse.Namespace) -> int:
    return migrate.dbmate(migrate.database_url(), "status")
