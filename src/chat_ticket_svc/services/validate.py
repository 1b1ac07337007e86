"""The validation of requests. It reports all violations of a request in one error."""

import re
from collections.abc import Mapping, Sequence, Sized
from datetime import datetime
from typing import Any
from uuid import UUID

import uuid_utils
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from chat_ticket.v1 import resources_pb2 as pb
from chat_ticket_svc.errors import InvalidArgumentError, Violation
from chat_ticket_svc.limits import Limits
from chat_ticket_svc.services import convert, metadata_json, single_line, web_url
from chat_ticket_svc.store import epochs
from chat_ticket_svc.store.attachments import NewAttachment
from chat_ticket_svc.store.messages import NewMessage

UUID_TEXT = re.compile(r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
# A media type with parameters, as RFC 9110 has them, in ASCII.
_WORD = r"[A-Za-z0-9!#$%&'*+.^_`|~-]++"
MIME_TYPE = re.compile(
    rf"""{_WORD}/{_WORD}([ ]*+;[ ]*+({_WORD}=({_WORD}|"([ !#-\[\]-~]|\\[ -~])*+"))?)*+"""
)
# A language tag of BCP 47, without those that begin with "x-" or "i-". The database has the same
# rule, as a constraint.
LANGUAGE_CODE = re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*+")
# The database has the same rules for labels, in a trigger.
LABEL_KEY = re.compile(r"[a-z0-9._/-]{1,63}")
MAX_LABEL_VALUE = 255
MAX_FILTER_LABELS = 4
MAX_REFERENCE = 255  # characters: of a caller's own id, such as a user's
# What RFC 5646 recommends to allow, in section 4.4.1.
MAX_LANGUAGE_CODE = 35
ETAG = re.compile(r"[0-9]{1,18}")

# An error lists this many violations, and the number of the others.
MAX_VIOLATIONS = 100

# More than any enum has values, or any entity fields.
MAX_FILTER_VALUES = 20

MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 50

NIL_UUID = str(UUID(int=0))
MAX_UUID = str(UUID(int=2**128 - 1))


def is_uuid(value: object) -> bool:
    return isinstance(value, str) and UUID_TEXT.fullmatch(value) is not None


def new_id() -> str:
    """Return a UUIDv7, so that new rows are neighbours in the index."""
    return str(uuid_utils.uuid7())


class Validator:
    """Collects the violations of one request, which `raise_if_invalid` raises together.

    Most methods take the path of a field in the request and its value, and return the value in the
    form that the store takes. The result for an invalid value has no meaning.
    """

    def __init__(self, limits: Limits, url_schemes: Sequence[str] = ()):
        self._limits = limits
        self._url_schemes = url_schemes
        self._violations: list[Violation] = []
        self._unlisted = 0

    def raise_if_invalid(self) -> None:
        if self._violations:
            raise InvalidArgumentError(self._violations, unlisted=self._unlisted)

    def add_violation(self, field: str, description: str) -> None:
        if len(self._violations) < MAX_VIOLATIONS:
            self._violations.append(Violation(field, description))
        else:
            self._unlisted += 1

    def has_at_most(self, field: str, values: Sized, limit: int) -> bool:
        """Check the length of a list before its values: 4 MiB hold two million empty messages."""
        if len(values) > limit:
            self.add_violation(field, f"{len(values):,} elements, at most {limit:,}")
        return len(values) <= limit

    def id(self, field: str, value: str) -> str:
        """The required id of an entity that exists."""
        if not UUID_TEXT.fullmatch(value):
            self.add_violation(field, "not a UUID" if value else "required")
        return value.lower()

    def optional_id(self, field: str, value: str) -> str | None:
        return self.id(field, value) if value else None

    def new_id(self, field: str, value: str) -> str:
        """The id of a new entity: the caller's, or a new one."""
        if not value:
            return new_id()
        return self.id(field, value)

    def one_of(self, request: Any, name: str) -> str | None:
        """The field that is set of the required oneof `name`. Without one, all are violations."""
        field: str | None = request.WhichOneof(name)
        if field is None:
            members = [member.name for member in request.DESCRIPTOR.oneofs_by_name[name].fields]
            for member in members:
                self.add_violation(member, f"required: {' or '.join(members)}")
        return field

    def parent(self, request: Any) -> tuple[str, str]:
        """The field of the oneof `parent` that a list request has set, and the id in it."""
        field = self.one_of(request, "parent")
        return (field, self.id(field, getattr(request, field))) if field else ("", "")

    def text(self, field: str, value: str, limit: int) -> str:
        """Required text of at most `limit` characters."""
        if not value:
            self.add_violation(field, "required")
        if len(value) > limit:
            self.add_violation(field, f"{len(value):,} characters, at most {limit:,}")
        if "\0" in value:
            self.add_violation(field, "contains a NUL character")
        return value

    def single_line(self, field: str, value: str, limit: int) -> str:
        """Required text of one line, of at most `limit` characters."""
        self.text(field, value, limit)
        if len(value) <= limit:
            for description in single_line.violations(value):
                self.add_violation(field, description)
        return value

    def reference(self, field: str, value: str) -> str | None:
        """A caller's own id of something, of one line; None when it is empty."""
        return self.single_line(field, value, MAX_REFERENCE) if value else None

    def optional_title(self, field: str, value: str) -> str:
        return self.single_line(field, value, self._limits.title) if value else ""

    def labels(self, field: str, labels: Mapping[str, str], limit: int) -> dict[str, str]:
        """At most `limit` pairs."""
        if not self.has_at_most(field, labels, limit):
            return {}
        for key in sorted(labels):
            if not LABEL_KEY.fullmatch(key):
                self.add_violation(
                    f"{field}[{key:.100}]", "the key is not 1 to 63 characters of a-z, 0-9 and ._/-"
                )
            self.label_value(f"{field}[{key:.100}]", labels[key])
        return dict(labels)

    def label_value(self, field: str, value: str) -> str:
        if value:
            self.text(field, value, MAX_LABEL_VALUE)
        if single_line.CONTROL_OR_LINE_BREAK.search(value):
            self.add_violation(field, "contains a control character or a line break")
        return value

    def author(self, field: str, author: pb.ChatMessageAuthor) -> tuple[str | None, str | None]:
        """The kind and the id of an author, either of which can be None."""
        kind = None
        if author.kind:
            kind = self.enum(f"{field}.kind", author.kind, convert.AUTHOR_KIND)
        return kind, self.reference(f"{field}.id", author.id)

    def content(self, field: str, value: str) -> str:
        size = len(value.encode())
        if not value:
            self.add_violation(field, "required")
        if size > self._limits.content_bytes:
            self.add_violation(
                field, f"{size:,} bytes of UTF-8, at most {self._limits.content_bytes:,}"
            )
        if "\0" in value:
            self.add_violation(field, "contains a NUL character")
        return value

    def language_code(self, field: str, value: str) -> str | None:
        """A BCP 47 language tag; None when it is empty."""
        if not value:
            return None
        if len(value) > MAX_LANGUAGE_CODE:
            self.add_violation(field, f"{len(value):,} characters, at most {MAX_LANGUAGE_CODE}")
        elif not LANGUAGE_CODE.fullmatch(value):
            self.add_violation(field, "not a BCP 47 language tag such as de-AT")
        return value

    def enum(self, field: str, value: int, numbers: Mapping[str, int]) -> str:
        """The name, in the database, of a required enum value."""
        for name, number in numbers.items():
            if number == value:
                return name
        self.add_violation(field, f"unknown enum value {value}" if value else "required")
        return ""

    def enum_filter(
        self, field: str, values: Sequence[int], numbers: Mapping[str, int]
    ) -> list[str] | None:
        """The names, in the database, of enum values to filter by. None means no filter."""
        if not self.has_at_most(field, values, MAX_FILTER_VALUES):
            return None
        names = [
            self.enum(f"{field}[{index}]", value, numbers) for index, value in enumerate(values)
        ]
        return names or None

    def non_negative(self, field: str, value: int) -> int:
        if value < 0:
            self.add_violation(field, f"integer {value:,}, at least 0")
        return value

    def page_size(self, value: int) -> int:
        self.non_negative("page_size", value)
        return min(value, MAX_PAGE_SIZE) or DEFAULT_PAGE_SIZE

    def etag(self, field: str, value: str) -> int | None:
        """The revision that an etag encodes; None when there is no etag."""
        if not value:
            return None
        if not ETAG.fullmatch(value):
            self.add_violation(field, "not an etag of this service")
            return None
        return int(value)

    def epoch(self, value: str) -> str:
        """The optional history of a session that a position belongs to."""
        if len(value) > epochs.MAX_CHARACTERS:
            self.add_violation(
                "epoch", f"{len(value):,} characters, at most {epochs.MAX_CHARACTERS:,}"
            )
        elif value and not epochs.PATTERN.fullmatch(value):
            self.add_violation("epoch", "not an epoch of this service")
        return value

    def expected_revision(self, request: Any, prefix: str = "") -> int | None:
        """The revision that a session must have; None when it is not to be checked.

        `prefix` is the path of `request` in the request of the call, with a dot.
        """
        if not request.HasField("expected_revision"):
            return None
        return self.non_negative(f"{prefix}expected_revision", request.expected_revision)

    def update_mask(self, mask: FieldMask, allowed: Sequence[str]) -> set[str]:
        """The fields to update. Of `labels`, a path can also name one, as `labels.KEY`."""
        names = ", ".join(allowed)
        if "labels" in allowed:
            names += ", labels.KEY"
        if not mask.paths:
            self.add_violation("update_mask", f"required: at least one of {names}")
        if not self.has_at_most("update_mask", mask.paths, MAX_FILTER_VALUES):
            return set()
        for path in mask.paths:
            field, _, key = path.partition(".")
            if path in allowed:
                continue
            if field != "labels" or field not in allowed:
                self.add_violation(
                    "update_mask", f"path {path!r:.100} cannot be updated, only: {names}"
                )
            elif not LABEL_KEY.fullmatch(key):
                self.add_violation(
                    "update_mask",
                    f"path {path!r:.100} has a key that is not 1 to 63 characters of a-z, 0-9 and "
                    "._/-",
                )
            elif field in mask.paths:
                self.add_violation("update_mask", f"path {path!r} together with 'labels'")
        return set(mask.paths)

    def start_time(self, field: str, request: Any) -> datetime | None:
        """The optional first time of a filter. The first microsecond of year 1 is no limit."""
        microseconds = self._microseconds(field, request)
        if microseconds is None or microseconds == convert.MIN_MICROSECONDS:
            return None
        return convert.to_datetime(min(microseconds, convert.MAX_MICROSECONDS))

    def end_time(self, field: str, request: Any) -> datetime | None:
        """The optional time that a filter ends before. The last microsecond of 9999 is no limit."""
        microseconds = self._microseconds(field, request)
        if microseconds is None or microseconds >= convert.MAX_MICROSECONDS:
            return None
        return convert.to_datetime(microseconds)

    def _microseconds(self, field: str, request: Any) -> int | None:
        """A timestamp rounded up to microseconds since the Unix epoch; None when it is not set."""
        if not request.HasField(field):
            return None
        value: Timestamp = getattr(request, field)
        if not 0 <= value.nanos < 1_000_000_000:
            self.add_violation(field, f"{value.nanos:,} nanoseconds, from 0 to 999,999,999")
            return None
        microseconds = value.seconds * 1_000_000
        if not convert.MIN_MICROSECONDS <= microseconds <= convert.MAX_MICROSECONDS:
            self.add_violation(field, "timestamp outside the years 1 to 9999")
            return None
        return microseconds + -(-value.nanos // 1000)

    def metadata(self, field: str, value: str) -> str | None:
        """The text of a JSON object; None when it is empty."""
        if not value:
            return None
        for description in metadata_json.violations(
            value,
            max_bytes=self._limits.metadata_bytes,
            max_depth=self._limits.metadata_depth,
        ):
            self.add_violation(field, description)
        return value

    def merged_metadata(self, field: str, value: str) -> None:
        """The metadata that a merge patch results in, of valid metadata and a valid patch."""
        for description in metadata_json.violations(
            value,
            max_bytes=self._limits.metadata_bytes,
            max_depth=self._limits.metadata_depth,
        ):
            self.add_violation(field, f"merged metadata: {description}")

    def new_message(self, field: str, message: pb.ChatMessage) -> NewMessage:
        new = self._message(field, message)
        if new.attachments:
            self._distinct_ids({field: new})
        return new

    def new_messages(self, field: str, messages: Sequence[pb.ChatMessage]) -> list[NewMessage]:
        if not messages:
            self.add_violation(field, "required")
        if not self.has_at_most(field, messages, self._limits.batch_messages):
            return []
        new = {
            f"{field}[{index}]": self._message(f"{field}[{index}]", message)
            for index, message in enumerate(messages)
        }
        attachments = sum(len(message.attachments) for message in new.values())
        if attachments > self._limits.attachments:
            self.add_violation(
                field, f"{attachments:,} attachments, at most {self._limits.attachments:,}"
            )
        self._distinct_ids(new)
        return list(new.values())

    def new_attachments(
        self, field: str, attachments: Sequence[pb.ChatAttachment]
    ) -> tuple[NewAttachment, ...]:
        """The attachments of one message."""
        new = self._attachments(field, attachments)
        self._distinct({f"{field}[{index}].id": a.id for index, a in enumerate(new)})
        return new

    def _attachments(
        self, field: str, attachments: Sequence[pb.ChatAttachment]
    ) -> tuple[NewAttachment, ...]:
        if not self.has_at_most(field, attachments, self._limits.attachments):
            return ()
        return tuple(
            self.new_attachment(f"{field}[{index}]", attachment)
            for index, attachment in enumerate(attachments)
        )

    def _message(self, field: str, message: pb.ChatMessage) -> NewMessage:
        author_kind = author_id = None
        if message.HasField("author"):
            author_kind, author_id = self.author(f"{field}.author", message.author)
        attachments: tuple[NewAttachment, ...] = ()
        if message.attachments:
            attachments = self._attachments(f"{field}.attachments", message.attachments)
        return NewMessage(
            id=self.new_id(f"{field}.id", message.id),
            role=self.enum(f"{field}.role", message.role, convert.MESSAGE_ROLE),
            content=self.content(f"{field}.content", message.content),
            language_code=self.language_code(f"{field}.language_code", message.language_code),
            metadata=self.metadata(f"{field}.metadata_json", message.metadata_json),
            attachments=attachments,
            author_kind=author_kind,
            author_id=author_id,
        )

    def _distinct_ids(self, messages: Mapping[str, NewMessage]) -> None:
        """Check that no id in these messages, by their path in the request, is there twice."""
        self._distinct({f"{path}.id": message.id for path, message in messages.items()})
        self._distinct(
            {
                f"{path}.attachments[{index}].id": attachment.id
                for path, message in messages.items()
                for index, attachment in enumerate(message.attachments)
            }
        )

    def _distinct(self, ids: Mapping[str, str]) -> None:
        """Check that no id, by its path in the request, is there twice."""
        first: dict[str, str] = {}
        for field, value in ids.items():
            if value and first.setdefault(value, field) != field:
                self.add_violation(field, f"the same id as {first[value]}")

    def new_attachment(self, field: str, attachment: pb.ChatAttachment) -> NewAttachment:
        file_type = self.single_line(
            f"{field}.file_type", attachment.file_type, self._limits.file_type
        )
        if 0 < len(file_type) <= self._limits.file_type and not MIME_TYPE.fullmatch(file_type):
            self.add_violation(f"{field}.file_type", "not a MIME type such as text/plain")
        return NewAttachment(
            id=self.new_id(f"{field}.id", attachment.id),
            has_client_id=bool(attachment.id),
            file_url=self.file_url(f"{field}.file_url", attachment.file_url),
            file_name=self.single_line(
                f"{field}.file_name", attachment.file_name, self._limits.file_name
            ),
            file_type=file_type,
        )

    def file_url(self, field: str, value: str) -> str:
        self.text(field, value, self._limits.file_url)
        if not value or len(value) > self._limits.file_url:
            return value
        for description in single_line.violations(value):
            self.add_violation(field, description)
            return value
        try:
            url = web_url.parse(value)
        except ValueError:
            self.add_violation(field, "not a URL")
            return value
        if url.scheme not in self._url_schemes:
            self.add_violation(
                field, f"URL with a scheme other than {' or '.join(self._url_schemes)}"
            )
        elif url.has_user_info:
            self.add_violation(field, "URL with user info")
        return value
