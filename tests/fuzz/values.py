"""Hypothesis strategies for hostile values of fields: ids, text, JSON, URLs, numbers, times."""

import uuid
from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chat_ticket_svc.limits import Limits
from chat_ticket_svc.services.validate import MAX_LABEL_VALUE, MAX_REFERENCE

LIMITS = Limits()
KINDS = ("session", "message", "attachment", "chat_ticket", "ticket", "draft")


INT32, INT64, UINT32, UINT64 = 2**31 - 1, 2**63 - 1, 2**32 - 1, 2**64 - 1


Draw = Callable[[st.SearchStrategy[Any]], Any]


def draw_examples(strategy: st.SearchStrategy[Any], count: int, seed_value: int) -> list[Any]:
    """`count` different examples, the same for the same seed; fewer where there are no more.

    The caller sends them concurrently. Hypothesis itself would run one call after the other, each
    in its own event loop, and would shrink against a server whose state has changed.
    """
    examples: dict[object, Any] = {}

    # Hypothesis mutates earlier examples, and often draws the same again.
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


def ids(owner: str) -> dict[str, list[str]]:
    """The ids of what `owner` has, by kind: the same in every run."""
    name = uuid.UUID("0197a000-0000-7000-8000-0000000f0225")
    return {
        kind: [str(uuid.uuid5(name, f"{owner} {kind} {index}")) for index in range(3)]
        for kind in KINDS
    }


OWN = ids("own")
FOREIGN = ids("foreign")  # another tenant's, which the caller knows
SECRET = ids("secret")  # another tenant's, which no answer may contain


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


def id_value(draw: Draw, kind: str, wild: bool) -> str:
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
    """JSON, or almost JSON."""
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


def _language_code(draw: Draw, wild: bool) -> str:
    if not wild:
        return draw(st.sampled_from(["", "", "de", "pt-BR", "zh-Hant-TW"]))
    odd = ["x", "de-", "-de", "de_AT", "de\n", "d\u00e9", "a" * 9, "de-" + "x-" * 16, "a-" * 40]
    return draw(st.one_of(st.sampled_from(odd), TEXT))


def _label_key(draw: Draw, wild: bool) -> str:
    if not wild:
        return draw(st.sampled_from(["team", "a/b.c_d-9"]))
    odd = ["A", "\u00e9", "a b", "a=b", "a\n", "\0", "*", ":", "k" * 63, "k" * 64]
    return draw(st.one_of(st.sampled_from(odd), TEXT))


STRINGS: dict[str, Callable[[Draw, bool], str]] = {
    # The caller's own ids. Each external reference is of one ticket, so few are tame.
    "user_id": _text(MAX_REFERENCE, ["u-1", "J\u00f6rg \u6f22", ""]),
    "external_ref": _text(MAX_REFERENCE, ["ZD-1", "", "", ""]),
    "key": _label_key,
    "value": _text(MAX_LABEL_VALUE, ["billing", "", "\u00e9 = \U0001f600"]),
    "content": _text(LIMITS.content_bytes, ["hello", "where is my order"], in_bytes=True),
    "text": _text(LIMITS.content_bytes, ["hello", "x", ""], in_bytes=True),
    "language_code": _language_code,
    "query": _text(LIMITS.query, ["order", "hello or order", '"my order" -nothing']),
    "title": _text(LIMITS.title, ["help", "broken"]),
    "file_name": _text(LIMITS.file_name, ["a.png", "report 1.pdf"]),
    "file_type": _text(LIMITS.file_type, ["image/png", "text/plain"]),
    "file_url": _url,
    "metadata_json": _metadata,
    "metadata_merge_json": _metadata,
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
    "ChatDraft": "draft",
}


def string_value(draw: Draw, field: FieldDescriptor, wild: bool) -> str:
    if field.containing_type.name == "ChatMessageAuthor":
        return STRINGS["user_id"](draw, wild)
    if field.name in STRINGS:
        return STRINGS[field.name](draw, wild)
    if field.name == "id" or field.name.endswith("_id"):
        kind = OF_TYPE.get(field.containing_type.name, "") if field.name == "id" else ""
        return id_value(draw, kind or field.name.removesuffix("_id"), wild)
    return draw(TEXT) if wild else draw(st.sampled_from(["", "x"]))


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


def timestamp_value(draw: Draw, wild: bool) -> dict[str, int]:
    if not wild:
        return {"seconds": draw(st.sampled_from([0, 1, 1_700_000_000, 4_000_000_000]))}
    seconds = draw(st.sampled_from(EDGES_OF_TIME)) + draw(st.integers(-1, 1))
    nanos = st.sampled_from([0, 1, 999, 999_999_000, 999_999_999, 10**9, -1, INT32, -INT32])
    return {"seconds": min(max(seconds, -INT64 - 1), INT64), "nanos": draw(nanos)}
