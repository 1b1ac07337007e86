"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from uuid import UUID

from chat_ticket_svc.access.credential import TENANT_ID


def add_required_tenant(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--tenant", type=tenant_id, required=True, metavar="ID", help=help_text)


def tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("not 1 to 255 printable ASCII characters")
    return text


def uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError("not a UUID") from error


def integer(lowest: int, highest: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number within these bounds."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = lowest - 1
        if not lowest <= number <= highest:
            raise argparse.ArgumentTypeError(f"not a whole number from {lowest} to {highest}")
        return number

    return parse


port = integer(0, 65535)
