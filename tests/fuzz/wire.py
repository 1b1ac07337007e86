"""Hypothesis strategies for bytes that are no valid message on the wire."""

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

from fuzz.requests import hostile_message
from fuzz.values import Draw


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
def hostile_bytes(draw: Draw, kind: type[Message], tenant: str = "", other: str = "") -> bytes:
    """Bytes where a message should be: noise, or a message that has been damaged."""
    choice = draw(st.integers(0, 9))
    if choice == 0:
        return draw(st.binary(max_size=200))
    if choice in (1, 2):
        return b"".join(draw(st.lists(field_bytes(kind.DESCRIPTOR), min_size=1, max_size=3)))
    data = draw(hostile_message(kind, tenant, other)).SerializeToString()
    at = draw(st.integers(0, len(data)))
    if choice == 3:
        return data[:at]
    if choice in (4, 5):
        return data[:at] + draw(field_bytes(kind.DESCRIPTOR)) + data[at:]
    if choice == 6:
        return data + draw(field_bytes(kind.DESCRIPTOR))
    if choice == 7:
        return data + draw(hostile_message(kind, tenant, other)).SerializeToString()
    if choice == 8:
        return data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at + 1 :]
    flipped = bytearray(data)
    for _ in range(draw(st.integers(1, 4)) if data else 0):
        flipped[draw(st.integers(0, len(data) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(flipped)
