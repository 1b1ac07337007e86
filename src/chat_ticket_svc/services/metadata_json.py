"""The rules for a message's metadata: a JSON object that PostgreSQL's jsonb can store."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

# PostgreSQL's `numeric` keeps this many digits after the decimal point.
MAX_SCALE = 16383
# A string, or blanks between the tokens, of valid JSON.
STRING_OR_BLANKS = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|[ \t\n\r]+')
# The exponent of any double has at most this many characters, its sign included.
MAX_EXPONENT_CHARACTERS = 5


def violations(text: str, *, max_bytes: int, max_depth: int) -> Iterator[str]:
    """Describe what is wrong with `text`.

    `max_bytes` limits the text without blanks between its tokens and with its numbers written out.
    This size never grows by storing: jsonb adds blanks and writes numbers out, and else shortens.
    So what was stored can be sent back as it was returned.
    """
    size = len(text.encode())
    tokens_size = size - sum(map(text.count, " \t\n\r"))
    if tokens_size > max_bytes:  # not worth parsing
        yield f"{tokens_size:,} bytes of UTF-8, at most {max_bytes:,}"
        return
    numbers = _Numbers()
    try:
        document = json.loads(
            text,
            parse_int=numbers.check,
            parse_float=numbers.check,
            parse_constant=numbers.reject_constant,
            object_pairs_hook=_Object,
        )
    except RecursionError:
        yield _too_deep(max_depth)
        return
    except json.JSONDecodeError as error:
        yield f"not JSON: {error.msg}"
        return
    except ValueError as error:  # from _Numbers
        yield str(error)
        return
    if not isinstance(document, _Object):
        yield "not a JSON object"
    if _depth(document) > max_depth:
        yield _too_deep(max_depth)
    elif not _is_storable(document):
        yield "contains a NUL character or an unpaired surrogate"
    if size + numbers.growth <= max_bytes:
        return
    measured = len(STRING_OR_BLANKS.sub(r"\1", text).encode()) + numbers.growth
    if measured > max_bytes:
        yield (
            f"{measured:,} bytes without blanks and with all numbers written out, "
            f"at most {max_bytes:,}"
        )


def _too_deep(max_depth: int) -> str:
    return f"nested more than {max_depth} levels deep"


class _Object(list[tuple[str, Any]]):
    """The members of a JSON object. It keeps duplicate keys, which PostgreSQL parses too."""


class _Numbers:
    """Checks the numbers of a document as text, because a float would round them.

    PostgreSQL stores a number written out: 1e300 becomes 301 characters. `growth` is the sum of
    these characters.
    """

    growth = 0

    def check(self, text: str) -> int:
        number = float(text)
        digits, _, power = text.lower().partition("e")
        is_out_of_range = math.isinf(number) or (number == 0 and digits.strip("-0."))
        if is_out_of_range or len(power) > MAX_EXPONENT_CHARACTERS:
            raise ValueError("number out of the range of a double")
        exponent = int(power or 0)
        scale = len(digits.partition(".")[2]) - exponent
        if scale > MAX_SCALE:
            raise ValueError(
                f"number with {scale:,} digits after the decimal point, at most {MAX_SCALE:,}"
            )
        self.growth += abs(exponent)
        return 0

    def reject_constant(self, name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")


def _children(value: Any) -> list[Any]:
    if isinstance(value, _Object):
        return [child for _, child in value]
    return value if isinstance(value, list) else []


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        containers = [node for node in level if isinstance(node, list)]
        level = [child for container in containers for child in _children(container)]
        depth += bool(containers)
    return depth


def _is_storable(value: Any) -> bool:
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            return False
        return "\0" not in value
    if isinstance(value, _Object) and not all(_is_storable(key) for key, _ in value):
        return False
    return all(_is_storable(child) for child in _children(value))
