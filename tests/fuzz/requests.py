"""Hypothesis strategies for hostile requests: messages of any type, by its descriptor.

Most fields of a message are valid and a few are hostile: a request that fails at its first field
tests nothing else. Ids belong to the caller or to another tenant (see `values.ids`), so that calls
succeed, conflict, and ask for what the caller may not see.
"""

import base64
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st
from support.drafts import a_start

from chat_ticket_svc.limits import KIB
from chat_ticket_svc.services import paging
from chat_ticket_svc.store.sessions import MAX_LABELS
from fuzz.values import (
    FOREIGN,
    HOSTS,
    INT32,
    INT64,
    JSON_VALUES,
    LIMITS,
    NEW_ID,
    OWN,
    TAME_NUMBER,
    TEXT,
    WILD,
    Draw,
    F,
    draw_examples,
    string_value,
    timestamp_value,
)

CHANGEABLE = {
    "UpdateChatSessionRequest": ["status", "title", "labels", "labels.team"],
    "UpdateChatMessageRequest": ["metadata_json"],
    "UpdateChatAttachmentRequest": ["file_url"],
    "UpdateTicketRequest": ["title", "status", "external_ref"],
}


def _mask(draw: Draw, request: str, wild: bool) -> list[str]:
    valid = st.sampled_from(CHANGEABLE.get(request, ["x"]))
    if not wild:
        return draw(st.lists(valid, min_size=1, max_size=2))
    odd = st.sampled_from(
        [
            *("*", "", "id", "tenant_id", "status.x", "Status", "metadataJson", "\0", "user_id"),
            *("labels.", "labels.*", "labels.A", "labels." + "k" * 64, "labels.a.b", "author.id"),
        ]
    )
    count = draw(st.sampled_from([0, 1, 2, 20, 21, 1000]))
    return [draw(st.one_of(valid, odd, TEXT))] * count


def _value(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool], depth: int) -> Any:
    """A value of a field that is not repeated."""
    if field.cpp_type == F.CPPTYPE_MESSAGE:
        if field.message_type.full_name == "google.protobuf.FieldMask":
            return FieldMask(paths=_mask(draw, field.containing_type.name, wild()))
        return _message(draw, field.message_type, wild, depth + 1)
    if field.cpp_type == F.CPPTYPE_STRING:
        if field.type == F.TYPE_BYTES:
            return draw(st.binary(max_size=20))
        return string_value(draw, field, wild())
    if field.cpp_type == F.CPPTYPE_ENUM:
        valid = [value.number for value in field.enum_type.values]
        if field.enum_type.is_closed:  # protobuf itself rejects others
            return draw(st.sampled_from(valid))
        if wild():
            return draw(st.sampled_from([0, -1, max(valid) + 1, INT32, -INT32 - 1, *valid]))
        return draw(st.sampled_from(valid[1:] or valid))
    if field.cpp_type == F.CPPTYPE_BOOL or wild():
        return draw(WILD[field.cpp_type])
    return draw(TAME_NUMBER)


def _many(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool], depth: int) -> list[Any]:
    """The values of a repeated field: a few, or a few repeated up to a limit."""
    limits = {"messages": LIMITS.batch_messages, "labels": MAX_LABELS}
    limit = limits.get(field.name, LIMITS.attachments)
    least = 0 if wild() else int(field.name == "messages")
    values = [_value(draw, field, wild, depth) for _ in range(draw(st.integers(least, 2)))]
    if values and wild():
        count = draw(st.sampled_from([limit - 1, limit, limit + 1, 3 * limit]))
        # What is long is not sent hundreds of times: a request has 4 MiB.
        size = sum(value.ByteSize() if isinstance(value, Message) else 20 for value in values)
        values = [
            values[index % len(values)] for index in range(min(count, 2 * 1024 * KIB // (size + 1)))
        ]
    return values


OUTPUT_ONLY = {"tenant_id", "sequence", "revision", "create_time", "update_time", "redacted"}


def _unset(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool]) -> bool:
    """Whether to omit a field: optional filters, positions, and output-only fields."""
    if wild():
        return draw(st.booleans())
    optional = (
        (field.is_repeated and field.name != "messages")
        or (field.containing_oneof is not None and len(field.containing_oneof.fields) == 1)
        or field.name.startswith(("start_", "end_", "after_", "before_"))
    )
    if field.name == "expected_revision":  # which is hardly ever the revision
        return draw(st.integers(0, 9)) > 0
    output = field.name in OUTPUT_ONLY
    return output or (optional and draw(st.integers(0, 2)) > 0)


def _message(
    draw: Draw,
    descriptor: Descriptor,
    wild: Callable[[], bool],
    depth: int = 0,
    *,
    choice: str = "",
) -> Message:
    """A message. `choice` is the field of its oneofs to set, by default any."""
    result = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Timestamp":
        return type(result)(**timestamp_value(draw, wild()))
    # An optional field is the only one of its oneof.
    chosen = {
        oneof.name: choice
        or draw(st.sampled_from([*(field.name for field in oneof.fields), *[None] * wild()]))
        for oneof in descriptor.oneofs
    }
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if oneof is not None and chosen[oneof.name] != field.name:
            continue
        # Messages may contain themselves.
        if depth > 4 and field.cpp_type == F.CPPTYPE_MESSAGE:
            continue
        # A message whose required fields are not all set cannot be serialized.
        if field.name in PLACES or (not field.is_required and _unset(draw, field, wild)):
            continue
        if field.is_repeated:
            _set_many(draw, result, field, wild, depth)
        elif field.cpp_type == F.CPPTYPE_MESSAGE:
            getattr(result, field.name).SetInParent()
            getattr(result, field.name).CopyFrom(_value(draw, field, wild, depth))
        else:
            setattr(result, field.name, _value(draw, field, wild, depth))
    if descriptor.name == "UpdateChatMessageRequest" and not wild():
        result.ClearField(draw(st.sampled_from(["update_mask", "metadata_merge_json"])))
    return result


def _set_many(
    draw: Draw, result: Message, field: FieldDescriptor, wild: Callable[[], bool], depth: int
) -> None:
    target = getattr(result, field.name)
    if field.message_type is None or not field.message_type.GetOptions().map_entry:
        target.extend(_many(draw, field, wild, depth))
        return
    for entry in _many(draw, field, wild, depth):
        if field.message_type.fields_by_name["value"].message_type is None:
            target[entry.key] = entry.value
        else:
            target[entry.key].CopyFrom(entry.value)


# Fields with a place in a list or a stream, with the fields that do not count for its digest.
PLACES = {"page_token": ("page_size", "page_token"), "cursor": ("cursor", "from_beginning")}


def _place_field(kind: Descriptor) -> str:
    """The one of PLACES that requests of this kind have, if any."""
    return next(iter(PLACES.keys() & kind.fields_by_name.keys()), "")


def _digest(request: Message, tenant: str) -> str:
    """What the places of `tenant` in the list or stream of this request begin with."""
    return paging.digest(tenant, request, PLACES[_place_field(request.DESCRIPTOR)])


def _at(request: Message, place: str) -> Message:
    """The request with this page token or cursor, which does not begin in another way too."""
    field = _place_field(request.DESCRIPTOR)
    placed = _with(request, [field], place)
    if field == "cursor" and place:
        placed.ClearField("from_beginning")
    return placed


# How many of ten values are hostile.
LEVELS = st.sampled_from([0, 0, 0, 1, 1, 2, 4, 10])
ONE_OF_TEN = st.integers(0, 9)


@st.composite
def hostile_message(draw: Draw, kind: type[Message], tenant: str = "", other: str = "") -> Message:
    """A request as `tenant` would send it, whose page token or cursor may be one of `other`."""
    level = draw(LEVELS)
    result = _message(draw, kind.DESCRIPTOR, lambda: draw(ONE_OF_TEN) < level)
    if _place_field(kind.DESCRIPTOR):
        result = _at(result, _place(draw, result, tenant, other))
    return result


@st.composite
def hostile_stream(draw: Draw, kind: type[Message]) -> list[Message]:
    """The requests of a stream that writes a draft. Most begin, go on and end as they should."""
    level = draw(LEVELS)

    def wild() -> bool:
        return draw(ONE_OF_TEN) < level

    choices = ["start", *draw(st.lists(st.just("append"), max_size=3)), "finish"]
    if wild():
        choices = draw(st.lists(st.sampled_from(choices), min_size=1, max_size=5))
    requests: list[Any] = [
        _message(draw, kind.DESCRIPTOR, wild, choice=choice) for choice in choices
    ]
    length = 0
    for request in requests:
        if wild():
            continue
        if request.HasField("start"):
            request.start.session_id = draw(st.sampled_from(OWN["session"]))
            if draw(st.booleans()):
                request.start.draft.id = str(uuid.UUID(int=draw(NEW_ID)))
                request.start.ClearField("expected_revision")
        elif request.HasField("append"):
            request.append.offset = length
            length += len(request.append.text.encode())
        else:
            request.finish.state = draw(st.integers(0, 1))
    return requests


POSITIONS = [
    "0",
    "1",
    "-1",
    "1.5",
    "-0.0",
    "1e-37",
    "1e-45",
    "3.5e38",
    "1e999",
    "NaN",
    "Infinity",
    str(INT64),
    str(INT64 + 1),
    "253402300799999999",
    "253402300800000000",
    "9" * 4000,
    "9" * 5000,
    "true",
    "null",
    '""',
    '"\\u0000"',
    '"\\ud800"',
    "[]",
    "{}",
    "[" * 100_000,
    "[" * 500 + "]" * 500,
]
POSITIONS_OF_IDS = [
    json.dumps(value)
    for value in (*OWN["session"], *FOREIGN["session"], str(uuid.UUID(int=2**128 - 1)))
]
POSITION = st.one_of(
    st.sampled_from(["0", "1", "1700000000000000", "0.5", *POSITIONS_OF_IDS]),
    st.sampled_from(POSITIONS),
)
TIMES = st.sampled_from(["0", "1700000000000000", "253402300799999999"])
# What positions begin with before their time and id, where that is not all.
FIRST = {
    "ListChatAttachmentsRequest": st.sampled_from(["0", "1", str(INT64)]),
    "SearchChatMessagesRequest": st.sampled_from(["0.5", "0.0", "1e-36", "2.9e38"]),
}


EPOCH_IDS = ['"0123456789abcdef"', '"0123456789ABCDEF"', '""', "0"]
# Positions in the feed: of the first epoch, of the last one that is possible, and below both.
FEED_POSITIONS = ["0", "1", str(1 << 48), str((1 << 48) + 800), str((1 << 63) - 1)]
# Where a cursor is if it is not damaged: nowhere else can a hostile value be seen alone.
CURSOR = [FEED_POSITIONS[2], "null", "0", "0", '""', EPOCH_IDS[0], "0", "[]"]


def _fitting(draw: Draw, request: str) -> list[str]:
    """A position as the list or the stream of this request has them."""
    if request == "WatchChatSessionsRequest":
        feed_position = st.sampled_from(FEED_POSITIONS)
        return [
            draw(feed_position),
            draw(st.one_of(st.just("null"), feed_position)),
            draw(st.sampled_from("0123")),
            str(int(draw(feed_position)) >> 16),
            draw(st.sampled_from(['""', *POSITIONS_OF_IDS])),
            EPOCH_IDS[0],
            draw(st.one_of(st.just("null"), feed_position)),
            draw(st.sampled_from(["[]", f"[[{EPOCH_IDS[0]},1]]"])),
        ]
    first = [draw(FIRST[request])] if request in FIRST else []
    return [*first, draw(TIMES), draw(st.sampled_from(POSITIONS_OF_IDS))]


def _place(draw: Draw, request: Message, tenant: str, other: str) -> str:
    """A page token or cursor: none, a forged one, another tenant's, a damaged one, or anything.

    They are no secret: whoever knows how makes one that passes for the service's own.
    """
    if draw(st.booleans()):
        return ""
    choice = draw(st.integers(0, 6))
    if choice == 0:
        return draw(TEXT)
    if choice == 1:
        hostile_bytes = draw(st.binary(max_size=30))
        return draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))(
            hostile_bytes
        ).decode()
    whose = draw(st.sampled_from([tenant, tenant, tenant, other]))
    genuine = _digest(request, whose)
    first = json.dumps(genuine)
    if choice == 2:
        first = draw(st.one_of(POSITION, st.just(json.dumps(genuine.upper()))))
    positions = _fitting(draw, request.DESCRIPTOR.name)
    if choice == 3:
        positions = draw(st.lists(POSITION, max_size=len(positions) + 2))
    elif choice == 4:
        positions[draw(st.integers(0, len(positions) - 1))] = draw(POSITION)
    token = base64.urlsafe_b64encode(f"[{','.join([first, *positions])}]".encode()).decode()
    if choice == 5 and token:
        at = draw(st.integers(0, len(token) - 1))
        return token[:at] + draw(st.sampled_from(["", "A", "=", "/", "\0", "\u202e"])) + token[at:]
    return token.rstrip("=")


def decode_token(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


CORNERS = ["\0", "a\0b", "\U0001f600\u202e", "9" * 19]
METADATA_CORNERS = [
    *(f'{{"a":{value}}}' for value in JSON_VALUES),
    *('{"a":' * depth + "0" + "}" * depth for depth in (19, 20, 21, 5000)),
    "[" * 30_000,
]
TOKEN_CORNERS = ["5", "null", "{}", "[]", '"a"', "NaN", "\xff", "", *POSITIONS]


@st.composite
def _valid_message(draw: Draw, kind: type[Message], choice: str) -> Message:
    return _message(draw, kind.DESCRIPTOR, lambda: False, choice=choice)


def corner_cases(kind: type[Message], tenant: str, choice: str = "") -> Iterator[Message]:
    """A good request with, in one field at a time, each of the values that once broke something.

    Chance finds them in thousands of requests; these are few.
    """
    [good] = draw_examples(_valid_message(kind, choice), 1, 0)
    for path in _texts(good):
        values = CORNERS
        if path[-1] in ("metadata_json", "metadata_merge_json"):
            values = CORNERS + METADATA_CORNERS
        elif path[-1] == "file_url":
            values = CORNERS + [f"https://{host}/" for host in HOSTS]
        for value in values:
            changed = _with(good, path, value)
            if path[-1] == "metadata_merge_json":
                changed.ClearField("update_mask")
            yield changed
    if place := _place_field(kind.DESCRIPTOR):
        digest = json.dumps(_digest(good, tenant))
        first = {"ListChatAttachmentsRequest": ["0"], "SearchChatMessagesRequest": ["0.5"]}
        position = [*first.get(kind.DESCRIPTOR.name, []), "0", POSITIONS_OF_IDS[0]]
        position = CURSOR if place == "cursor" else position
        for value in TOKEN_CORNERS:
            yield _at(good, _token(value))
            for index in range(len(position)):
                changed = [*position[:index], value, *position[index + 1 :]]
                yield _at(good, _token(f"[{','.join([digest, *changed])}]"))


def stream_corner_cases(kind: type[Message], tenant: str) -> Iterator[list[Message]]:
    """As `corner_cases`, for each request of a stream that writes a draft.

    Most drafts are empty, and dropped in the end. Otherwise the sessions would soon have too many.
    """
    finish = kind(finish={})
    for corner in corner_cases(kind, tenant, "start"):
        yield [corner, finish]
    for choice in ("append", "finish"):
        for number, corner in enumerate(corner_cases(kind, tenant, choice)):
            # No two that are sent at once have the same draft.
            draft_id = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{tenant} {choice} {number % 21}"))
            start = kind(start=a_start(OWN["session"][number % 3], draft_id))
            yield [start, corner, finish]


def _token(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _texts(hostile_message: Message) -> Iterator[list[Any]]:
    """Where a message has text: the names and indexes that lead there."""
    for field, value in hostile_message.ListFields():
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            for key in value:
                if isinstance(value[key], str):
                    yield [field.name, key]
        elif field.message_type is not None:
            each = enumerate(value) if field.is_repeated else [(None, value)]
            for index, inner in each:
                for path in _texts(inner):
                    yield [field.name, *([] if index is None else [index]), *path]
    for field in hostile_message.DESCRIPTOR.fields:
        if field.type == F.TYPE_STRING and not field.is_repeated and field.name not in PLACES:
            yield [field.name]


def _with(hostile_message: Message, path: list[Any], value: str) -> Message:
    changed = type(hostile_message)()
    changed.CopyFrom(hostile_message)
    at: Any = changed
    for step in path[:-1]:
        at = at[step] if isinstance(step, int) else getattr(at, step)
    if isinstance(at, Message):
        setattr(at, path[-1], value)
    else:
        at[path[-1]] = value
    return changed
