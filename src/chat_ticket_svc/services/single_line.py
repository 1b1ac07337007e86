"""The rule for texts of one line: titles, names and types of files, URLs."""

import re
from collections.abc import Iterator

CONTROL_OR_LINE_BREAK = re.compile(r"[\x01-\x1f\x7f-\x9f\u2028\u2029]")

# Unicode's blanks that are neither a control character nor a line break.
BLANKS = " \u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

# An embedding or override is closed by U+202C, and an isolate by U+2069.
NO_BIDI_CONTROL = re.compile(r"[^\u202a-\u202e\u2066-\u2069]+")
BIDI_PAIR = re.compile(r"[\u202a\u202b\u202d\u202e]\u202c|[\u2066-\u2068]\u2069")


def violations(text: str) -> Iterator[str]:
    """Describe what is wrong with `text`. A migration has the same rule for the database.

    `Validator.text` reports an empty text and NUL. Refused, not mended: what is stored is what was
    sent.
    """
    if CONTROL_OR_LINE_BREAK.search(text):
        yield "contains a control character or a line break"
    if text != text.strip(BLANKS):
        yield "begins or ends with a blank" if text.strip(BLANKS) else "blank"
    if not text.isascii() and _has_unpaired_bidi_control(text):
        yield "contains an unpaired bidirectional control character"


def _has_unpaired_bidi_control(text: str) -> bool:
    controls = NO_BIDI_CONTROL.sub("", text)
    while (rest := BIDI_PAIR.sub("", controls)) != controls:
        controls = rest
    return bool(controls)
