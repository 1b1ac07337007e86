"""Page tokens, and pages that fit into a response.

A token is opaque to callers: the position of the last entity of a page, and a digest of the call
it belongs to. It is no secret and no credential: whoever forges one only moves within what the
call could read anyway.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from google.protobuf.message import Message

from chat_ticket_svc.services import convert
from chat_ticket_svc.services.validate import Check, is_uuid

T = TypeVar("T")
M = TypeVar("M", bound=Message)

# Where a list that goes back in time starts.
END_OF_TIME = convert.to_datetime(253_402_300_799_999_999)  # the last microsecond of 9999

# A stream's pages double from the first of these to the last: the first one comes soon.
FIRST_PAGE = 32
LARGEST_PAGE = 500

# Callers refuse responses over 4 MiB by default.
RESPONSE_BYTES = 3 * 1024 * 1024


def _digest(tenant_id: str, request: Message) -> str:
    """What a token is bound to: the call and its filters, but not how far it goes."""
    filters = type(request)()
    filters.CopyFrom(request)
    filters.ClearField("page_size")
    filters.ClearField("page_token")
    name = request.DESCRIPTOR.full_name
    content = json.dumps([tenant_id, name]).encode() + filters.SerializeToString(deterministic=True)
    return hashlib.sha256(content).hexdigest()[:16]


def token(tenant_id: str, request: Message, *position: str | int | float) -> str:
    """The token for the page of `request` that starts behind `position`."""
    content = json.dumps([_digest(tenant_id, request), *position], separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def time_of(value: Any) -> datetime:
    return convert.to_datetime(integer_of(value))


def integer_of(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def number_of(value: Any) -> float:
    """A PostgreSQL real."""
    if type(value) is not float or not (value == 0 or 1e-37 < abs(value) < 3e38):
        raise ValueError
    return value


def id_of(value: Any) -> str:
    if not is_uuid(value):
        raise ValueError
    return str(value)


def position(
    check: Check, tenant_id: str, request: Any, start: Sequence[Any], *kinds: Callable[[Any], Any]
) -> Sequence[Any]:
    """The position in `request.page_token`, read by one of `kinds` each; `start` without a token.

    A token that is damaged, or another call's or tenant's, is a violation.
    """
    if not request.page_token:
        return start
    try:
        padded = request.page_token + "=" * (-len(request.page_token) % 4)
        digest, *values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        if digest != _digest(tenant_id, request):
            raise ValueError
        return [kind(value) for kind, value in zip(kinds, values, strict=True)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        check.add("page_token", "is not a page token of a call with these filters")
        return start


def fill(
    rows: Sequence[T],
    page_size: int,
    to_message: Callable[[T], M],
    to_token: Callable[[T], str],
) -> tuple[list[M], str]:
    """As many of `rows` as a page and a response take, and the token for what follows.

    `rows` holds one row more than the page when there is one.
    """
    taken: list[M] = []
    room = RESPONSE_BYTES
    for message in map(to_message, rows[:page_size]):
        room -= message.ByteSize() + 8
        if taken and room < 0:
            break
        taken.append(message)
    if len(taken) == len(rows):
        return taken, ""
    return taken, to_token(rows[len(taken) - 1])
