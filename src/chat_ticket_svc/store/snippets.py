"""The snippet of a hit: the part of a message that matches best, with the matches marked.

ts_headline leaves out what looks like a tag, and marks nothing that search_text rewrites. So the
words of a message are found here, and PostgreSQL says which of them match (see search_hits.py).
"""

import bisect
import unicodedata
from collections.abc import Collection, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import regex

# The length that a snippet has at most, and how much of it is before the first match.
SNIPPET_CHARACTERS = 300
_LEAD_CHARACTERS = 60
# With its marks. A longer one may be cut.
_LONGEST_CHARACTER = 100
_MAX_WINDOWS = 1000

# The same as in search_text: what is invisible, and the scripts without spaces.
_INVISIBLE = regex.compile(
    "[\\u00ad\\u034f\\u055b-\\u055e\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f\\u202a-\\u202e"
    "\\u2060-\\u206f\\ufe00-\\ufe0f\\ufeff\\U000e0000-\\U000e0fff]+"
)
_PAIR_SCRIPTS = "[\\u0e01-\\u109f\\u1100-\\u11ff\\u1780-\\u17ff\\u3005-\\U0010ffff]"
# A word, after which the signs of C++ and C# belong to it. The escapes of URLs are none.
_WORD = regex.compile(
    r"(?V1)%[0-9A-Fa-f]{2}(*SKIP)(*FAIL)"
    rf"|[[\p{{L}}\p{{M}}\p{{N}}]--{_PAIR_SCRIPTS}]++(?:(?<=[A-Za-z])(?:\+\+|\#))?"
)
# What the normalization form KC may change: a character, with the marks that it may compose with.
_CHANGING = regex.compile(
    r"[\u1100-\u11ff]+|.[\p{M}\uff9e\uff9f]{1,30}|[^\p{NFKC_Quick_Check=Yes}]"
    f"|{_INVISIBLE.pattern}",
    regex.DOTALL,
)
# Normalization would join these to the word before them: trademark signs, exponents, fractions.
_SEPARATE = regex.compile(
    r"[\u2120\u2122]|(?<=[0-9])[\u00bc-\u00be\u2150-\u215e]"
    r"|(?<=[A-Za-z]{3})[\u00b2\u00b3\u00b9\u2070-\u2079]"
)
_CHARACTER = regex.compile(r"\X")
# The marks of the scripts without spaces belong to the character before.
_ANY_PAIR = r"(?V1)(?=(\L<pairs>)(?![\p{M}--[\u0300-\u036f]]))"
_WORD_BORDER = regex.compile(r"(?<=\s)(?=\S)|(?<=\S)(?=\s)")
# What joins the parts of an address or a number, so that they are marked as one.
_JOINT = regex.compile(r"[-./@_:&+?=#~%]{1,3}")


class Part(NamedTuple):
    """A part of a snippet, and whether it matches."""

    text: str
    is_hit: bool


class _Piece(NamedTuple):
    """A part of the folded text, and the part of the content that it is of."""

    folded_start: int
    folded_end: int
    start: int
    end: int

    def original(self, folded_start: int, folded_end: int) -> tuple[int, int]:
        """The span in the content of a span in this piece."""
        if self.folded_end - self.folded_start != self.end - self.start:
            return self.start, self.end
        shift = self.start - self.folded_start
        return folded_start + shift, folded_end + shift


class Text:
    """A message's content, and its form without differences that a search ignores."""

    def __init__(self, content: str):
        self.content = content
        self._folded = content
        self._pieces = [_Piece(0, len(content), 0, len(content))]
        if not content.isascii():
            self._folded = "".join(self._fold())

    def _fold(self) -> Iterator[str]:
        """Yield the parts of the folded text, and set the pieces."""
        self._pieces.clear()
        folded_end = end = 0

        def add(piece_end: int, folded: str) -> str:
            nonlocal folded_end, end
            piece = _Piece(folded_end, folded_end + len(folded), end, piece_end)
            folded_end, end = piece.folded_end, piece_end
            self._pieces.append(piece)
            return folded

        for match in _CHANGING.finditer(self.content):
            folded = " "
            if not _SEPARATE.match(self.content, match.start()):
                folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", match[0]))
            if folded != match[0]:
                yield add(match.start(), self.content[end : match.start()])
                yield add(match.end(), folded)
        yield add(len(self.content), self.content[end:])

    def words(self) -> set[str]:
        return set(_WORD.findall(self._folded))

    def snippet(self, words: Container[str], pairs: Collection[str]) -> list[Part]:
        """The part with the most different matches, where these words and pairs match."""
        matches = [
            (match.start(), match.end(), match[0])
            for match in _WORD.finditer(self._folded)
            if match[0] in words
        ]
        if pairs:
            found = regex.finditer(_ANY_PAIR, self._folded, pairs=pairs)
            matches += [(match.start(), match.end(1), match[1]) for match in found]
            matches.sort()
        spans = [(*self._original(start, end), text) for start, end, text in matches]
        start, end = self._window(spans)
        return list(self._parts(_joined(self.content, spans), start, end))

    def _original(self, folded_start: int, folded_end: int) -> tuple[int, int]:
        """The span in the content of a span in the folded text."""
        first = self._piece(folded_start)
        last = self._piece(folded_end - 1)
        return (
            first.original(folded_start, folded_start)[0],
            last.original(folded_end, folded_end)[1],
        )

    def _piece(self, folded_index: int) -> _Piece:
        index = bisect.bisect_right(self._pieces, folded_index, key=lambda each: each.folded_start)
        return self._pieces[index - 1]

    def _window(self, spans: Sequence[tuple[int, int, str]]) -> tuple[int, int]:
        """Where the snippet begins and ends."""
        length = len(self.content)
        if length <= SNIPPET_CHARACTERS:
            return 0, length
        room = SNIPPET_CHARACTERS - _LEAD_CHARACTERS
        ends = [end for _, end, _ in spans]
        best = most = 0
        for first, (start, _, _) in enumerate(spans[:_MAX_WINDOWS]):
            last = bisect.bisect_right(ends, start + room, lo=first + 1)
            different = len({text for _, _, text in spans[first:last]})
            if different > most:
                best, most = start, different
        start = max(0, min(best - _LEAD_CHARACTERS, length - SNIPPET_CHARACTERS))
        if start:
            start = next(self._borders(start, best), start)
        end = min(length, start + SNIPPET_CHARACTERS)
        if end < length:
            end = max(self._borders(end - _LEAD_CHARACTERS, end), default=end)
        return start, end

    def _borders(self, start: int, end: int) -> Iterator[int]:
        """Where the content can be cut from `start` to `end`.

        That is at the beginnings and ends of words, and in a long word between characters with
        their marks. There is nowhere to cut in a character with very many marks.
        """
        text = self.content
        borders = [match.start() for match in _WORD_BORDER.finditer(text, start, end + 1)]
        if borders:
            return iter(borders)
        characters = _CHARACTER.finditer(text, max(0, start - _LONGEST_CHARACTER), end + 1)
        return (each.start() for each in characters if start <= each.start() <= end)

    def _parts(self, spans: Iterable[tuple[int, int]], start: int, end: int) -> Iterator[Part]:
        done = start
        for span_start, span_end in spans:
            if span_end <= start or span_start >= end:
                continue
            if done < span_start:
                yield Part(self.content[done:span_start], is_hit=False)
            done = min(span_end, end)
            yield Part(self.content[max(span_start, start) : done], is_hit=True)
        if done < end:
            yield Part(self.content[done:end], is_hit=False)


def _joined(content: str, spans: Iterable[tuple[int, int, str]]) -> list[tuple[int, int]]:
    """The spans, with those joined that overlap, touch, or have only a joint between them."""
    joined: list[tuple[int, int]] = []
    for start, end, _ in spans:
        if joined:
            last_start, last_end = joined[-1]
            if start <= last_end or _JOINT.fullmatch(content, last_end, start):
                joined[-1] = last_start, max(end, last_end)
                continue
        joined.append((start, end))
    return joined
