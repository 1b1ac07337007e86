"""Argument types that several commands share."""

import argparse
from uuid import UUID

from chat_ticket_svc.access.credential import TENANT_ID


def tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("not 1 to 255 printable ASCII characters")
    return text


def uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError("not a UUID") from error
