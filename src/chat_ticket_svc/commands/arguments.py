"""Arguments that several commands share."""

import argparse
from collections.abc import Callable
from uuid import UUID

from chat_ticket_svc.access.credential import TENANT_ID
from chat_ticket_svc.services import single_line

MAX_USER_ID = 255


def add_required_tenant(parser: argparse.ArgumentParser, help_text: str) -> None:
    parser.add_argument("--tenant", type=tenant_id, required=True, metavar="ID", help=help_text)


def add_user(parser: argparse._ActionsContainer, help_text: str) -> None:
    parser.add_argument("--user", type=user_id, metavar="ID", help=help_text)


def describe(tenant_id: str, user_id: str | None) -> str:
    """Whose data a command is about, for people."""
    return f"tenant {tenant_id}" if user_id is None else f"user {user_id} of tenant {tenant_id}"


def tenant_id(text: str) -> str:
    if not TENANT_ID.fullmatch(text):
        raise argparse.ArgumentTypeError("not 1 to 255 printable ASCII characters")
    return text


def user_id(text: str) -> str:
    # The command line has bytes that are no text as unpaired surrogates.
    is_text = not any("\ud800" <= character <= "\udfff" for character in text)
    if not is_text or not 1 <= len(text) <= MAX_USER_ID or any(single_line.violations(text)):
        raise argparse.ArgumentTypeError(f"not 1 to {MAX_USER_ID} printable characters")
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
