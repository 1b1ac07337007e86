"""Every check on requests. A `Check` collects what is wrong; `done` raises it all at once.

Each method takes the field's path in the request, as the caller spells it, and returns the value
in the form that the store takes. What it returns for a bad value does not matter: `done` raises.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import uuid_utils
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from chat_ticket.v1 import resources_pb2 as pb
from chat_ticket_svc.config import Limits
from chat_ticket_svc.errors import InvalidArgumentError, Violation
from chat_ticket_svc.services import convert
from chat_ticket_svc.store.attachments import NewAttachment
from chat_ticket_svc.store.messages import NewMessage

UUID_TEXT = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
URL_TEXT = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")
# Older Pythons overlook what stands between the bracket and the port.
IN_BRACKETS = re.compile(r"(.*@)?\[[^\[\]]+\](:[0-9]*)?")
MIME_TYPE = re.compile(r"[A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
ETAG = re.compile(r"[0-9]{1,18}")

# What a caller is told of at the most; the rest is counted.
MAX_VIOLATIONS = 100

# More than any enum has values, or any entity fields.
MAX_FILTER_VALUES = 20

# The most that PostgreSQL's numeric keeps; and of a power of ten with its sign, for any double.
MAX_SCALE = 16383
MAX_EXPONENT_CHARACTERS = 5

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50


def new_id() -> str:
    """A UUIDv7: new rows stand together in the index."""
    return str(uuid_utils.uuid7())


class Check:
    """Collects the violations of one request."""

    def __init__(self, limits: Limits, url_schemes: Sequence[str] = ()):
        self._limits = limits
        self._url_schemes = url_schemes
        self._violations: list[Violation] = []
        self._unlisted = 0

    def done(self) -> None:
        if self._violations:
            raise InvalidArgumentError(self._violations, unlisted=self._unlisted)

    def add(self, field: str, description: str) -> None:
        if len(self._violations) < MAX_VIOLATIONS:
            self._violations.append(Violation(field, description))
        else:
            self._unlisted += 1

    def fits(self, field: str, values: Sequence[Any], limit: int) -> bool:
        """Whether a list is short enough to look into: 4 MiB hold two million empty messages."""
        if len(values) > limit:
            self.add(field, f"has {len(values)}, more than {limit}")
        return len(values) <= limit

    def id(self, field: str, value: str) -> str:
        """A required id of something that exists."""
        if not UUID_TEXT.fullmatch(value):
            self.add(field, "is not a UUID" if value else "is required")
        return value.lower()

    def optional_id(self, field: str, value: str) -> str | None:
        return self.id(field, value) if value else None

    def new_id(self, field: str, value: str) -> str:
        """The id for something new: the client's, or one of ours."""
        if not value:
            return new_id()
        return self.id(field, value)

    def parent(self, request: Any) -> tuple[str, str]:
        """The field of the oneof `parent` that a list names, and the id in it."""
        field = request.WhichOneof("parent")
        if field is None:
            fields = request.DESCRIPTOR.oneofs_by_name["parent"].fields
            self.add("parent", f"is required: {' or '.join(field.name for field in fields)}")
            return "", ""
        return field, self.id(field, getattr(request, field))

    def text(self, field: str, value: str, limit: int) -> str:
        """Required text of at most `limit` characters."""
        if not value:
            self.add(field, "is required")
        if len(value) > limit:
            self.add(field, f"has {len(value)} characters, more than {limit}")
        if "\0" in value:
            self.add(field, "contains a NUL character")
        return value

    def content(self, field: str, value: str) -> str:
        size = len(value.encode())
        if not value:
            self.add(field, "is required")
        if size > self._limits.content_bytes:
            self.add(field, f"has {size} bytes, more than {self._limits.content_bytes}")
        if "\0" in value:
            self.add(field, "contains a NUL character")
        return value

    def choice(self, field: str, value: int, choices: Mapping[str, int]) -> str:
        """The name, in the database, of a required enum value."""
        for name, number in choices.items():
            if number == value:
                return name
        self.add(field, f"has the unknown value {value}" if value else "is required")
        return ""

    def choices(
        self, field: str, values: Sequence[int], choices: Mapping[str, int]
    ) -> list[str] | None:
        """The names of enum values to filter by; None when there are none."""
        if not self.fits(field, values, MAX_FILTER_VALUES):
            return None
        named = [
            self.choice(f"{field}[{index}]", value, choices) for index, value in enumerate(values)
        ]
        return named or None

    def not_negative(self, field: str, value: int) -> int:
        if value < 0:
            self.add(field, "is negative")
        return value

    def page_size(self, value: int) -> int:
        self.not_negative("page_size", value)
        return min(value, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE

    def etag(self, field: str, value: str) -> int | None:
        """The revision that an etag stands for; None when there is none."""
        if not value:
            return None
        if not ETAG.fullmatch(value):
            self.add(field, "is not an etag of this service")
            return None
        return int(value)

    def mask(self, mask: FieldMask, allowed: Sequence[str]) -> set[str]:
        """The fields that an update names."""
        names = ", ".join(allowed)
        if not mask.paths:
            self.add("update_mask", f"names no field; can be changed: {names}")
        if not self.fits("update_mask", mask.paths, MAX_FILTER_VALUES):
            return set()
        for path in mask.paths:
            if path not in allowed:
                self.add("update_mask", f"names {path!r:.100}; can be changed: {names}")
        return set(mask.paths)

    def time(self, field: str, present: bool, value: Timestamp) -> datetime | None:
        """The first microsecond that is not before a time; None when it is absent."""
        if not present:
            return None
        if not 0 <= value.nanos < 1_000_000_000:
            self.add(field, "has nanoseconds outside of 0 to 999,999,999")
            return None
        try:
            return convert.to_datetime(value.seconds * 1_000_000 + -(-value.nanos // 1000))
        except OverflowError:
            self.add(field, "is outside of the years 1 to 9999")
            return None

    def metadata(self, field: str, value: str) -> str | None:
        """The text of a JSON object; None when it is empty."""
        if not value:
            return None
        size = len(value.encode())
        if size > self._limits.metadata_bytes:
            self.add(field, f"has {size} bytes, more than {self._limits.metadata_bytes}")
            return value
        numbers = _Numbers()
        try:
            parsed = json.loads(
                value,
                parse_int=numbers.check,
                parse_float=numbers.check,
                parse_constant=numbers.refuse,
                object_pairs_hook=_Object,
            )
        except RecursionError:
            self._too_deep(field)
            return value
        except ValueError as error:
            text = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            self.add(field, f"is not JSON: {text}")
            return value
        if not isinstance(parsed, _Object):
            self.add(field, "is not a JSON object")
        if _depth(parsed) > self._limits.metadata_depth:
            self._too_deep(field)
        elif not _storable(parsed):
            self.add(field, "contains a NUL character or half of a surrogate pair")
        if size + numbers.growth > self._limits.metadata_bytes:
            self.add(
                field,
                f"has {size + numbers.growth} bytes with its numbers written out, "
                f"more than {self._limits.metadata_bytes}",
            )
        return value

    def _too_deep(self, field: str) -> None:
        self.add(field, f"is nested more than {self._limits.metadata_depth} deep")

    def new_message(self, field: str, message: pb.ChatMessage) -> NewMessage:
        attachments: tuple[NewAttachment, ...] = ()
        if self.fits(f"{field}.attachments", message.attachments, self._limits.attachments):
            attachments = tuple(
                self.new_attachment(f"{field}.attachments[{index}]", attachment)
                for index, attachment in enumerate(message.attachments)
            )
        return NewMessage(
            id=self.new_id(f"{field}.id", message.id),
            role=self.choice(f"{field}.role", message.role, convert.MESSAGE_ROLE),
            content=self.content(f"{field}.content", message.content),
            metadata=self.metadata(f"{field}.metadata_json", message.metadata_json),
            attachments=attachments,
        )

    def new_messages(self, field: str, messages: Sequence[pb.ChatMessage]) -> list[NewMessage]:
        if not messages:
            self.add(field, "is required")
        if not self.fits(field, messages, self._limits.batch_messages):
            return []
        return [
            self.new_message(f"{field}[{index}]", message) for index, message in enumerate(messages)
        ]

    def together(self, field: str, messages: Sequence[NewMessage]) -> None:
        """What holds for the messages of a request together: how many files, and distinct ids."""
        attachments = [each for message in messages for each in message.attachments]
        self.fits(f"{field}.attachments", attachments, self._limits.attachments)
        for kind, ids in (
            ("message", [message.id for message in messages]),
            ("attachment", [attachment.id for attachment in attachments]),
        ):
            if len(set(ids)) < len(ids):
                self.add(field, f"has the same {kind} id more than once")

    def new_attachment(self, field: str, attachment: pb.ChatAttachment) -> NewAttachment:
        file_type = self.text(f"{field}.file_type", attachment.file_type, self._limits.file_type)
        if file_type and not MIME_TYPE.fullmatch(file_type):
            self.add(f"{field}.file_type", "is not a MIME type like text/plain")
        file_name = self.text(f"{field}.file_name", attachment.file_name, self._limits.file_name)
        if CONTROL.search(file_name.replace("\0", "")):
            self.add(f"{field}.file_name", "contains a control character")
        return NewAttachment(
            id=self.new_id(f"{field}.id", attachment.id),
            has_client_id=bool(attachment.id),
            file_url=self._url(f"{field}.file_url", attachment.file_url),
            file_name=file_name,
            file_type=file_type,
        )

    def _url(self, field: str, value: str) -> str:
        self.text(field, value, self._limits.file_url)
        if not value or len(value) > self._limits.file_url:
            return value
        try:
            parts = urlsplit(value)
            has_host = bool(parts.hostname) and parts.port != 0
            if "[" in parts.netloc or "]" in parts.netloc:
                has_host = has_host and IN_BRACKETS.fullmatch(parts.netloc) is not None
        except ValueError:
            has_host = False
        if not URL_TEXT.fullmatch(value) or not has_host:
            self.add(field, "is not a URL")
        elif parts.scheme not in self._url_schemes:
            self.add(field, f"has a scheme other than {' or '.join(self._url_schemes)}")
        elif "@" in parts.netloc:
            self.add(field, "contains user info")
        return value


class _Object(list[tuple[str, Any]]):
    """A JSON object as parsed, duplicate keys included: the database reads those too."""


class _Numbers:
    """Checks the numbers of a document as text, so that none is rounded, and weighs them.

    The database writes a number out: 1e300 becomes 301 characters.
    """

    growth = 0

    def check(self, text: str) -> int:
        number = float(text)
        digits, _, power = text.lower().partition("e")
        beyond = math.isinf(number) or (number == 0 and digits.strip("-0."))
        if beyond or len(power) > MAX_EXPONENT_CHARACTERS:
            raise ValueError("a number is beyond the range of a double")
        exponent = int(power or 0)
        if len(digits.partition(".")[2]) - exponent > MAX_SCALE:
            raise ValueError(f"a number has more than {MAX_SCALE} digits after the point")
        self.growth += abs(exponent)
        return 0

    def refuse(self, name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")


def _children(value: Any) -> list[Any]:
    if isinstance(value, _Object):
        return [child for _, child in value]
    return value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        containers = [each for each in level if isinstance(each, list)]
        level = [child for each in containers for child in _children(each)]
        depth += bool(containers)
    return depth


def _storable(value: Any) -> bool:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return False
        return "\0" not in value
    if isinstance(value, _Object) and not all(_storable(key) for key, _ in value):
        return False
    return all(_storable(child) for child in _children(value))


def is_uuid(value: object) -> bool:
    return isinstance(value, str) and UUID_TEXT.fullmatch(value) is not None


NO_ID = str(UUID(int=0))
LAST_ID = str(UUID(int=2**128 - 1))
