"""Hypothesis strategies for hostile requests: any message by its descriptor, and bytes that are
none.

A message is mostly as its method wants it, with a hostile value here and there: what is refused at
the first field reaches nothing. Ids are drawn from those of the caller and of another tenant (see
`ids`), so that calls succeed, conflict, and reach for what is not theirs.
"""

import base64
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chat_ticket_svc.config import KIB, Limits
from chat_ticket_svc.services import paging

LIMITS = Limits()
KINDS = ("session", "message", "attachment", "chat_ticket", "ticket")
INT32, INT64, UINT32, UINT64 = 2**31 - 1, 2**63 - 1, 2**32 - 1, 2**64 - 1

Draw = Callable[[st.SearchStrategy[Any]], Any]


def draw(strategy: st.SearchStrategy[Any], count: int, seed_value: int) -> list[Any]:
    """`count` different examples, the same for the same seed; fewer where there are no more.

    To be sent together: hypothesis itself would run one call after the other, each in a loop of
    its own, and shrink against a server whose state has changed.
    """
    examples: dict[object, Any] = {}

    # Hypothesis varies what it has drawn, often to the same again.
    @seed(seed_value)
    @settings(
        max_examples=2 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example: Any) -> None:
        if len(examples) < count:
            examples.setdefault(repr(example), example)

    collect()
    return list(examples.values())


# --- Ids -------------------------------------------------------------------------------------


def ids(owner: str) -> dict[str, list[str]]:
    """The ids, by kind, of what `owner` has: the same in every run."""
    name = uuid.UUID("0197a000-0000-7000-8000-0000000f0225")
    return {
        kind: [str(uuid.uuid5(name, f"{owner} {kind} {index}")) for index in range(3)]
        for kind in KINDS
    }


OWN = ids("own")
FOREIGN = ids("foreign")  # those that the caller has heard of
SECRET = ids("secret")  # those that it has not: no answer may tell them


def _near_misses(value: str) -> list[str]:
    return [
        value.upper(),
        value[:-1],
        value + "0",
        value.replace("-", ""),
        f"{{{value}}}",
        f"urn:uuid:{value}",
        f" {value}",
        f"{value}\n",
        f"{value}\0",
        value[:-1] + "g",
        value[:-1] + "\uff11",  # a digit of full width
        value[:-1] + "\u0661",  # an Arabic digit
        value.replace("-", "\u2010"),
        value[:8] + value[9:14] + "-" + value[14:],
        f"{value}' OR '1'='1",
    ]


NEW_ID = st.integers(2**64, 2**65)


def _id(draw: Draw, kind: str, wild: bool) -> str:
    own, foreign = OWN.get(kind, []), FOREIGN.get(kind, [])
    others = [value for name, values in OWN.items() if name != kind for value in values]
    if wild:
        value = draw(st.sampled_from([*own, *foreign, *others]))
        return draw(
            st.one_of(
                st.sampled_from(_near_misses(value)),
                st.sampled_from([str(uuid.UUID(int=0)), str(uuid.UUID(int=2**128 - 1)), *foreign]),
                TEXT,
            )
        )
    if not draw(st.booleans()):
        return draw(st.sampled_from(own or others))
    return draw(
        st.sampled_from(["", str(uuid.UUID(int=draw(NEW_ID))), foreign[0] if foreign else ""])
    )


# --- Text ------------------------------------------------------------------------------------

NASTY = [
    "",
    " ",
    "\0",
    "a\0b",
    "\x80\x9f\x85",  # C1 controls
    "\x1b[31m\x07\r\n",
    "\u202e\u202dabc\u202c",  # bidi overrides
    "\u2066\u2067\u2069",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd",  # joined emoji
    "\U0001f1e6",  # half a flag
    "e" + "\u0301" * 200,  # combining marks
    "\u0627\ufdfa\ufeff",
    "\ufffe\uffff\ufffd",
    "\U0010ffff",
    "\u0130\u0131\xdf\u1e9e",  # these change their length with their case
    "%s %(tenant_id)s {0} \\u0000 $1 :id",
    "'; DROP TABLE chat_messages; --",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "NaN",
    "-1",
    "9" * 30,
    "1e400",
    "true",
    "\\",
    '"',
    '"unclosed phrase -not or or',
    "order",
    "order or where -nothing",
    "the",
    "& | ! <-> ( ) : *",
    "a" * 2047,  # beyond what fits into a tsvector's word
    "word " * 150,
]
UNITS = ["a", "\xe9", "\u6f22", "\U0001f600", "e\u0301", "\u202e", " ", "\x9f", "-", '"', "("]

TEXT = st.one_of(
    st.sampled_from(NASTY),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


def _around(draw: Draw, limit: int, *, in_bytes: bool = False) -> str:
    """Text of a limit's length, or one more or less."""
    unit = draw(st.sampled_from(UNITS))
    length = max(0, limit + draw(st.sampled_from([-1, 0, 0, 1])))
    count, rest = divmod(length, len(unit.encode()) if in_bytes else len(unit))
    return unit * count + "a" * rest


def _text(limit: int, tame: Sequence[str], *, in_bytes: bool = False) -> Callable[..., str]:
    def text(draw: Draw, wild: bool) -> str:
        if not wild:
            return draw(st.sampled_from(tame))
        if draw(st.booleans()):
            return _around(draw, limit, in_bytes=in_bytes)
        return draw(TEXT)

    return text


def _nested(draw: Draw) -> str:
    depth = LIMITS.metadata_depth + draw(st.sampled_from([-2, -1, 0, 1, 5000]))
    opening, closing = draw(st.sampled_from([('{"a":', "}"), ("[", "]")]))
    closed = draw(st.sampled_from([depth, depth, depth - 1]))
    return '{"a":' + opening * depth + "0" + closing * closed + "}"


JSON_VALUES = [
    "NaN",
    "-Infinity",
    "1e308",
    "1e309",
    "-0.0",
    "1e-400",
    "0e99999",
    "1E+00000000000001",
    "1" * 5000,
    "0." + "1" * 16383,
    "0." + "1" * 16384,
    '"\\u0000"',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\ud83d\\ude00"',
    '"' + "\u202e" * 50 + '"',
    "[]",
    "{}",
    '{"":{"":{}}}',
    '{"a":1,"a":2}',
    "null",
    "tru",
    "01",
    "'a'",
    "\x00",
    "/* */1",
]


def _json_object(draw: Draw) -> str:
    """JSON, or what is nearly JSON."""
    if draw(st.integers(0, 4)) == 0:
        return _nested(draw)
    keys = ['"a"', '""', '"\\u0000"', '"\\ud800"', '"' + "k" * 300 + '"', "a", "1"]
    pairs = draw(
        st.lists(st.tuples(st.sampled_from(keys), st.sampled_from(JSON_VALUES)), max_size=3)
    )
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def _metadata(draw: Draw, wild: bool) -> str:
    if not wild:
        return draw(st.sampled_from(["", "{}", '{"a": [1, {"b": null}]}', '{"n": 1.5e3}']))
    choice = draw(st.integers(0, 5))
    if choice == 0:
        return '{"a":"' + _around(draw, LIMITS.metadata_bytes - 8, in_bytes=True) + '"}'
    if choice == 1:  # written out, each is 301 characters
        count = 217 + draw(st.integers(-2, 2))
        return '{"a":[' + ",".join(["1e300"] * count) + "]}"
    if choice == 2:
        return draw(TEXT)
    return _json_object(draw)


HOSTS = [
    "files.example",
    "\u6f22.example",
    "[::1]",
    "[::1",
    "[v1.x]",
    "",
    "a..b",
    "127.1",
    "2130706433",
    "0x7f.1",
    "user:pass@files.example",
    "files.example:0",
    "files.example:65536",
    "files.example:99999999999999999999",
    "files.example:\u0661",
    "-",
    "xn--",
    "a" * 300,
]


def _url(draw: Draw, wild: bool) -> str:
    if not wild:
        return draw(st.sampled_from(["https://files.example/a.png", "https://files.example/b?c=d"]))
    choice = draw(st.integers(0, 3))
    if choice == 0:
        return "https://files.example/" + _around(draw, LIMITS.file_url - 22)
    if choice == 1:
        return draw(TEXT)
    scheme = draw(st.sampled_from(["https://", "HTTPS://", "http://", "https:", "//", "file:///"]))
    rest = ["", "/", "/%00", "/%zz", "/a b", "/\r\nX: y", "?\u202e", "#", "\\@evil.example"]
    return scheme + draw(st.sampled_from(HOSTS)) + draw(st.sampled_from(rest))


def _etag(draw: Draw, wild: bool) -> str:
    if not wild:
        return draw(st.sampled_from(["", "", "", "4"]))
    odd = ["-1", "+1", "1.0", "1e3", "\u0661", "01", "9" * 18, "9" * 19, '"1"', "W/1", " 1", "1\n"]
    return draw(st.one_of(st.sampled_from(odd), TEXT))


STRINGS: dict[str, Callable[[Draw, bool], str]] = {
    "content": _text(LIMITS.content_bytes, ["hello", "where is my order"], in_bytes=True),
    "query": _text(LIMITS.query, ["order", "hello or order", '"my order" -nothing']),
    "title": _text(LIMITS.title, ["help", "broken"]),
    "file_name": _text(LIMITS.file_name, ["a.png", "report 1.pdf"]),
    "file_type": _text(LIMITS.file_type, ["image/png", "text/plain"]),
    "file_url": _url,
    "metadata_json": _metadata,
    "etag": _etag,
    "service": _text(100, ["", "chat_ticket.v1.ChatSessionService", "nope"]),
    # The requests of server reflection.
    "file_by_filename": _text(200, ["chat_ticket/v1/resources.proto", "nope.proto"]),
    "file_containing_symbol": _text(200, ["chat_ticket.v1.ChatSession", "chat_ticket.v1.Nope"]),
    "all_extension_numbers_of_type": _text(200, ["google.protobuf.FileOptions", "nope"]),
    "containing_type": _text(200, ["google.protobuf.FileOptions", "chat_ticket.v1.ChatSession"]),
}
OF_TYPE = {
    "ChatSession": "session",
    "ChatMessage": "message",
    "ChatAttachment": "attachment",
    "ChatTicket": "chat_ticket",
    "Ticket": "ticket",
}


def _string(draw: Draw, field: FieldDescriptor, wild: bool) -> str:
    if field.name == "id" or field.name.endswith("_id"):
        kind = OF_TYPE.get(field.containing_type.name, "") if field.name == "id" else ""
        return _id(draw, kind or field.name.removesuffix("_id"), wild)
    if field.name in STRINGS:
        return STRINGS[field.name](draw, wild)
    return draw(TEXT) if wild else draw(st.sampled_from(["", "x"]))


# --- Messages --------------------------------------------------------------------------------


def _number(low: int, high: int) -> st.SearchStrategy[int]:
    edges = {low, low + 1, high, high - 1, -1, 0, 1, 2, 20, 21, 499, 501, 999, 1000, 1001}
    return st.one_of(
        st.sampled_from([edge for edge in sorted(edges) if low <= edge <= high]),
        st.integers(low, high),
    )


F = FieldDescriptor
# Floats, for any message: those of 32 bits are rounded by protobuf itself.
WILD = {
    F.CPPTYPE_INT32: _number(-INT32 - 1, INT32),
    F.CPPTYPE_INT64: _number(-INT64 - 1, INT64),
    F.CPPTYPE_UINT32: _number(0, UINT32),
    F.CPPTYPE_UINT64: _number(0, UINT64),
    F.CPPTYPE_DOUBLE: st.floats(),
    F.CPPTYPE_FLOAT: st.floats(width=32),
    F.CPPTYPE_BOOL: st.booleans(),
}
TAME_NUMBER = st.integers(0, 3)

EDGES_OF_TIME = [-62135596800, 253402300799, 0, 1_800_000_000, INT64 // 1_000_000, INT64, -INT64]


def _timestamp(draw: Draw, wild: bool) -> dict[str, int]:
    if not wild:
        return {"seconds": draw(st.sampled_from([0, 1, 1_700_000_000, 4_000_000_000]))}
    seconds = draw(st.sampled_from(EDGES_OF_TIME)) + draw(st.integers(-1, 1))
    nanos = st.sampled_from([0, 1, 999, 999_999_000, 999_999_999, 10**9, -1, INT32, -INT32])
    return {"seconds": min(max(seconds, -INT64 - 1), INT64), "nanos": draw(nanos)}


CHANGEABLE = {
    "UpdateChatSessionRequest": ["status"],
    "UpdateChatMessageRequest": ["metadata_json"],
    "UpdateTicketRequest": ["title", "status"],
}


def _mask(draw: Draw, request: str, wild: bool) -> list[str]:
    known = st.sampled_from(CHANGEABLE.get(request, ["x"]))
    if not wild:
        return draw(st.lists(known, min_size=1, max_size=2))
    odd = st.sampled_from(["*", "", "id", "tenant_id", "status.x", "Status", "metadataJson", "\0"])
    count = draw(st.sampled_from([0, 1, 2, 20, 21, 1000]))
    return [draw(st.one_of(known, odd, TEXT))] * count


def _value(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool], depth: int) -> Any:
    """A value of a field that is not repeated."""
    if field.cpp_type == F.CPPTYPE_MESSAGE:
        if field.message_type.full_name == "google.protobuf.FieldMask":
            return FieldMask(paths=_mask(draw, field.containing_type.name, wild()))
        return _message(draw, field.message_type, wild, depth + 1)
    if field.cpp_type == F.CPPTYPE_STRING:
        if field.type == F.TYPE_BYTES:
            return draw(st.binary(max_size=20))
        return _string(draw, field, wild())
    if field.cpp_type == F.CPPTYPE_ENUM:
        known = [value.number for value in field.enum_type.values]
        if field.enum_type.is_closed:  # protobuf itself refuses others
            return draw(st.sampled_from(known))
        if wild():
            return draw(st.sampled_from([0, -1, max(known) + 1, INT32, -INT32 - 1, *known]))
        return draw(st.sampled_from(known[1:] or known))
    if field.cpp_type == F.CPPTYPE_BOOL or wild():
        return draw(WILD[field.cpp_type])
    return draw(TAME_NUMBER)


def _many(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool], depth: int) -> list[Any]:
    """The values of a repeated field: few, or few of them over and over, around a limit."""
    limit = LIMITS.batch_messages if field.name == "messages" else LIMITS.attachments
    least = 0 if wild() else int(field.name == "messages")
    few = [_value(draw, field, wild, depth) for _ in range(draw(st.integers(least, 2)))]
    if few and wild():
        count = draw(st.sampled_from([limit - 1, limit, limit + 1, 3 * limit]))
        # What is long is not sent hundreds of times: a request has 4 MiB.
        size = sum(each.ByteSize() if isinstance(each, Message) else 20 for each in few)
        few = [few[index % len(few)] for index in range(min(count, 2 * 1024 * KIB // (size + 1)))]
    return few


def _unset(draw: Draw, field: FieldDescriptor, wild: Callable[[], bool]) -> bool:
    """What a caller would leave out: filters, positions, and what is only in answers."""
    if wild():
        return draw(st.booleans())
    optional = (
        (field.is_repeated and field.name != "messages")
        or (field.containing_oneof is not None and len(field.containing_oneof.fields) == 1)
        or field.name.startswith(("start_", "end_", "after_", "before_"))
    )
    output = field.name in ("tenant_id", "sequence", "revision", "create_time", "update_time")
    return output or (optional and draw(st.integers(0, 2)) > 0)


def _message(
    draw: Draw, descriptor: Descriptor, wild: Callable[[], bool], depth: int = 0
) -> Message:
    result = GetMessageClass(descriptor)()
    if descriptor.full_name == "google.protobuf.Timestamp":
        return type(result)(**_timestamp(draw, wild()))
    # An optional field is the only one of its oneof.
    chosen = {
        oneof.name: draw(
            st.sampled_from([*(field.name for field in oneof.fields), *[None] * wild()])
        )
        for oneof in descriptor.oneofs
    }
    for field in descriptor.fields:
        oneof = field.containing_oneof
        if oneof is not None and chosen[oneof.name] != field.name:
            continue
        # Messages may contain themselves.
        if depth > 4 and field.cpp_type == F.CPPTYPE_MESSAGE:
            continue
        if field.name == "page_token" or _unset(draw, field, wild):
            continue
        if field.is_repeated:
            _set_many(draw, result, field, wild, depth)
        elif field.cpp_type == F.CPPTYPE_MESSAGE:
            getattr(result, field.name).SetInParent()
            getattr(result, field.name).CopyFrom(_value(draw, field, wild, depth))
        else:
            setattr(result, field.name, _value(draw, field, wild, depth))
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


# Of ten values, how many are hostile: none, few, all.
LEVELS = st.sampled_from([0, 0, 0, 1, 1, 2, 4, 10])
ONE_OF_TEN = st.integers(0, 9)


@st.composite
def message(draw: Draw, kind: type[Message], tenant: str = "", other: str = "") -> Message:
    """A request as `tenant` would send it, whose page token may be one of `other`."""
    level = draw(LEVELS)
    result = _message(draw, kind.DESCRIPTOR, lambda: draw(ONE_OF_TEN) < level)
    if "page_token" in kind.DESCRIPTOR.fields_by_name:
        result.page_token = _page_token(draw, result, tenant, other)  # type: ignore[attr-defined]
    return result


# --- Page tokens -----------------------------------------------------------------------------

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


def _fitting(draw: Draw, request: str) -> list[str]:
    """A position as the list of this request has them."""
    first = [draw(FIRST[request])] if request in FIRST else []
    return [*first, draw(TIMES), draw(st.sampled_from(POSITIONS_OF_IDS))]


def _page_token(draw: Draw, request: Message, tenant: str, other: str) -> str:
    """None, a forged one, another tenant's, a damaged one, or anything.

    Tokens are no secret: whoever knows how makes one that passes for the service's own.
    """
    if draw(st.booleans()):
        return ""
    choice = draw(st.integers(0, 6))
    if choice == 0:
        return draw(TEXT)
    if choice == 1:
        raw = draw(st.binary(max_size=30))
        return draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))(raw).decode()
    whose = draw(st.sampled_from([tenant, tenant, tenant, other]))
    genuine = json.loads(decoded(paging.encode_token(whose, request)))[0]
    first = json.dumps(genuine)
    if choice == 2:
        first = draw(st.one_of(POSITION, st.just(json.dumps(genuine.upper()))))
    positions = _fitting(draw, request.DESCRIPTOR.name)
    if choice == 3:
        positions = draw(st.lists(POSITION, max_size=4))
    elif choice == 4:
        positions[draw(st.integers(0, len(positions) - 1))] = draw(POSITION)
    token = base64.urlsafe_b64encode(f"[{','.join([first, *positions])}]".encode()).decode()
    if choice == 5 and token:
        at = draw(st.integers(0, len(token) - 1))
        return token[:at] + draw(st.sampled_from(["", "A", "=", "/", "\0", "\u202e"])) + token[at:]
    return token.rstrip("=")


def decoded(token: str) -> bytes:
    return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))


# --- Corners ---------------------------------------------------------------------------------

CORNERS = ["\0", "a\0b", "\U0001f600\u202e", "9" * 19]
METADATA_CORNERS = [
    *(f'{{"a":{value}}}' for value in JSON_VALUES),
    *('{"a":' * depth + "0" + "}" * depth for depth in (19, 20, 21, 5000)),
    "[" * 30_000,
]
TOKEN_CORNERS = ["5", "null", "{}", "[]", '"a"', "NaN", "\xff", "", *POSITIONS]


@st.composite
def _tame(draw: Draw, kind: type[Message]) -> Message:
    return _message(draw, kind.DESCRIPTOR, lambda: False)


def corners(kind: type[Message], tenant: str) -> Iterator[Message]:
    """A good request with, in one field at a time, each of the values that once broke something.

    Chance finds them in thousands of requests; these are few.
    """
    [good] = draw(_tame(kind), 1, 0)
    for path in _texts(good):
        values = CORNERS
        if path[-1] == "metadata_json":
            values = CORNERS + METADATA_CORNERS
        elif path[-1] == "file_url":
            values = CORNERS + [f"https://{host}/" for host in HOSTS]
        for value in values:
            yield _with(good, path, value)
    if "page_token" in kind.DESCRIPTOR.fields_by_name:
        digest = json.dumps(json.loads(decoded(paging.encode_token(tenant, good)))[0])
        first = {"ListChatAttachmentsRequest": ["0"], "SearchChatMessagesRequest": ["0.5"]}
        position = [*first.get(kind.DESCRIPTOR.name, []), "0", POSITIONS_OF_IDS[0]]
        for value in TOKEN_CORNERS:
            yield _with(good, ["page_token"], _token(value))
            for index in range(len(position)):
                changed = [*position[:index], value, *position[index + 1 :]]
                yield _with(good, ["page_token"], _token(f"[{','.join([digest, *changed])}]"))


def _token(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _texts(message: Message) -> Iterator[list[Any]]:
    """Where a message has text: the names and indexes that lead there."""
    for field, value in message.ListFields():
        if field.message_type is not None:
            each = enumerate(value) if field.is_repeated else [(None, value)]
            for index, inner in each:
                for path in _texts(inner):
                    yield [field.name, *([] if index is None else [index]), *path]
    for field in message.DESCRIPTOR.fields:
        if field.type == F.TYPE_STRING and not field.is_repeated and field.name != "page_token":
            yield [field.name]


def _with(message: Message, path: list[Any], value: str) -> Message:
    changed = type(message)()
    changed.CopyFrom(message)
    at: Any = changed
    for step in path[:-1]:
        at = at[step] if isinstance(step, int) else getattr(at, step)
    setattr(at, path[-1], value)
    return changed


# --- Bytes -----------------------------------------------------------------------------------


def varint(value: int, pad: int = 0) -> bytes:
    """A varint, with `pad` bytes more than it needs."""
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value | (128 if pad else 0))
    return bytes(result) + b"\x80" * (pad - 1) + b"\0" * bool(pad)


BAD_UTF8 = [
    b"\xff",
    b"\xc3(",
    b"\xed\xa0\x80",
    b"\xf4\x90\x80\x80",
    b"\xc0\x80",
    b"\xe2\x82",
    b"a\x80",
]
LENGTHS = [1, 127, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**64 - 1]


@st.composite
def field_bytes(draw: Draw, descriptor: Descriptor) -> bytes:
    """One field on the wire that is not as it should be."""
    numbers = [field.number for field in descriptor.fields] or [1]
    number = draw(st.sampled_from([*numbers, *numbers, 0, 999, 2**29 - 1, 2**29]))
    wire_type = draw(st.integers(0, 7))
    tag = varint(number << 3 | wire_type, pad=draw(st.sampled_from([0, 0, 0, 1, 4, 9, 20])))
    choice = draw(st.integers(0, 5))
    if choice == 0:  # a length that the data does not have
        return varint(number << 3 | 2) + varint(draw(st.sampled_from(LENGTHS))) + b"abc"
    if choice == 1:  # text that is none; in a nested message, bytes that are none
        text = draw(st.sampled_from(BAD_UTF8))
        inner = varint(draw(st.integers(1, 9)) << 3 | 2) + varint(len(text)) + text
        text = draw(st.sampled_from([text, inner]))
        return varint(number << 3 | 2) + varint(len(text)) + text
    if choice == 2:  # groups, deep, perhaps never closed
        depth = draw(st.sampled_from([1, 99, 100, 101, 20_000]))
        end = varint(number << 3 | 4) * draw(st.sampled_from([0, depth, depth + 1]))
        return varint(number << 3 | 3) * depth + end
    if choice == 3:  # messages in messages, deep
        data = b""
        for _ in range(draw(st.sampled_from([1, 99, 101, 500]))):
            data = varint(number << 3 | 2) + varint(len(data)) + data
        return data
    if choice == 4:  # a varint too long
        return tag + b"\xff" * draw(st.sampled_from([9, 10, 11, 100]))
    return tag + draw(st.binary(max_size=12))


@st.composite
def raw(draw: Draw, kind: type[Message], tenant: str = "", other: str = "") -> bytes:
    """Bytes where a message should be: noise, or a message that has been damaged."""
    choice = draw(st.integers(0, 9))
    if choice == 0:
        return draw(st.binary(max_size=200))
    if choice in (1, 2):
        return b"".join(draw(st.lists(field_bytes(kind.DESCRIPTOR), min_size=1, max_size=3)))
    data = draw(message(kind, tenant, other)).SerializeToString()
    at = draw(st.integers(0, len(data)))
    if choice == 3:
        return data[:at]
    if choice in (4, 5):
        return data[:at] + draw(field_bytes(kind.DESCRIPTOR)) + data[at:]
    if choice == 6:
        return data + draw(field_bytes(kind.DESCRIPTOR))
    if choice == 7:
        return data + draw(message(kind, tenant, other)).SerializeToString()
    if choice == 8:
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 1 :]
    flipped = bytearray(data)
    for _ in range(draw(st.integers(1, 4)) if data else 0):
        flipped[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)
