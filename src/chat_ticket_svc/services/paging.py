"""Page tokens, and pages that fit into a response.

A page token is opaque to callers. It encodes the position of the last entity of a page and a digest
of the request. It is neither a secret nor a credential: a forged token can only move within what
the request may read anyway.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from google.protobuf.message import Message

from chat_ticket_svc.services import convert
from chat_ticket_svc.services.validate import Validator, is_uuid

RowT = TypeVar("RowT")
MessageT = TypeVar("MessageT", bound=Message)

# Where a list in descending order of time starts.
END_OF_TIME = convert.to_datetime(convert.MAX_MICROSECONDS)

# The pages of a stream double in size, so that the first one arrives early.
MIN_STREAM_PAGE = 32
MAX_STREAM_PAGE = 500

# gRPC's clients reject responses over 4 MiB by default.
MAX_RESPONSE_BYTES = 3 * 1024 * 1024

# A caller that reads nothing takes 65,535 bytes of a stream. A longer response would wait for its
# reader without the timeout of writes.
MAX_LAST_RESPONSE_BYTES = 60_000


class LastResponse(NamedTuple):
    """A response of a stream, serialised, after which the stream ends.

    It is sent together with the status. That saves two of five steps of a stream that has no other
    response.
    """

    message: bytes


def digest(
    tenant_id: str, request: Message, place_fields: Sequence[str] = ("page_size", "page_token")
) -> str:
    """Identify the tenant, the method and the filters, but not how far the caller has come."""
    filters = type(request)()
    filters.CopyFrom(request)
    for field in place_fields:
        filters.ClearField(field)
    name = request.DESCRIPTOR.full_name
    content = json.dumps([tenant_id, name]).encode() + filters.SerializeToString(deterministic=True)
    return hashlib.sha256(content).hexdigest()[:16]


def encode(*values: Any) -> str:
    """Opaque text that has these values; see `decode`."""
    content = json.dumps(values, separators=(",", ":"))
    return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")


def decode(text: str) -> list[Any]:
    """The values. Raises ValueError or RecursionError if the text does not come from `encode`."""
    padded = text + "=" * (-len(text) % 4)
    values = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    if not isinstance(values, list):
        raise ValueError
    return values


def encode_token(tenant_id: str, request: Message, *position: str | int | float) -> str:
    """Return the token for the page of `request` that starts after `position`."""
    return encode(digest(tenant_id, request), *position)


def decode_token(
    validator: Validator,
    tenant_id: str,
    request: Any,
    start: Sequence[Any],
    *parsers: Callable[[Any], Any],
) -> Sequence[Any]:
    """Return the position in `request.page_token`, or `start` when there is no token.

    Each of `parsers` reads one value of the position. A damaged token is a violation, and so is the
    token of another tenant, method or filter.
    """
    if not request.page_token:
        return start
    try:
        request_digest, *values = decode(request.page_token)
        if request_digest != digest(tenant_id, request):
            raise ValueError
        return [parse(value) for parse, value in zip(parsers, values, strict=True)]
    except (ValueError, TypeError, OverflowError, RecursionError):
        validator.add_violation("page_token", "not a page token of this method with these filters")
        return start


def parse_time(value: Any) -> datetime:
    return convert.to_datetime(parse_integer(value))


def parse_integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError
    return value


def parse_real(value: Any) -> float:
    """Accept what PostgreSQL's `real` can hold."""
    if type(value) is not float or not (value == 0 or 1e-37 < abs(value) < 3e38):
        raise ValueError
    return value


def parse_id(value: Any) -> str:
    if not is_uuid(value):
        raise ValueError
    return str(value)


def fill_page(
    rows: Sequence[RowT],
    page_size: int,
    to_message: Callable[[RowT], MessageT],
    to_token: Callable[[RowT], str],
) -> tuple[list[MessageT], str]:
    """Return as many of `rows` as fit into a page and a response, and the next page's token.

    `rows` holds one row more than `page_size` when there is a next page.
    """
    page: list[MessageT] = []
    remaining_bytes = MAX_RESPONSE_BYTES
    for message in map(to_message, rows[:page_size]):
        remaining_bytes -= message.ByteSize() + 8
        if page and remaining_bytes < 0:
            break
        page.append(message)
    if len(page) == len(rows):
        return page, ""
    return page, to_token(rows[len(page) - 1])
