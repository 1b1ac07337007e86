"""The snippet of a hit: the part of a message that matches best, with the matches marked.

ts_headline leaves out what looks like a tag, and marks nothing that search_text rewrites. So the
words of a message are found here, and PostgreSQL says which of them match (see search.py).
"""

import bisect
import unicodedata
from collections.abc import Container, Iterable, Iterator, Sequence
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
    "[\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200f\\u202a-\\u202e"
    "\\u2060-\\u206f\\ufe00-\\ufe0f\\ufeff\\U000e0000-\\U000e0fff]+"
)
_PAIR_SCRIPTS = "[\\u0e01-\\u109f\\u1100-\\u11ff\\u1780-\\u17ff\\u3005-\\U0010ffff]"
_WORD = regex.compile(
    rf"(?V1)[[\p{{L}}\p{{M}}\p{{N}}]--{_PAIR_SCRIPTS}]++(?:(?<=[A-Za-z])(?:\+\+|\#))?"
)
_CHARACTER = regex.compile(r"\X")
_WORD_BORDER = regex.compile(r"(?<=\s)(?=\S)|(?<=\S)(?=\s)")
# What joins the parts of an address or a number, so that they are marked as one.
_JOINT = regex.compile(r"[-./@_:&+?=#~%]{1,3}")


class Part(NamedTuple):
    """A part of a snippet, and whether it matches."""

    text: str
    is_hit: bool


class Text:
    """A message's content, and its form without differences that a search ignores."""

    def __init__(self, content: str):
        self.content = content
        self._folded = content
        # Where each folded character begins and ends in the content, unless they are the same.
        self._starts: list[int] = []
        self._ends: list[int] = []
        is_folded = content.isascii() or (
            unicodedata.is_normalized("NFKC", content) and not _INVISIBLE.search(content)
        )
        if not is_folded:
            self._folded = "".join(self._fold())

    def _fold(self) -> Iterator[str]:
        for character in _CHARACTER.finditer(self.content):
            folded = _INVISIBLE.sub("", unicodedata.normalize("NFKC", character[0]))
            self._starts += [character.start()] * len(folded)
            self._ends += [character.end()] * len(folded)
            yield folded

    def words(self) -> set[str]:
        return set(_WORD.findall(self._folded))

    def snippet(self, words: Container[str], pairs: Iterable[str]) -> list[Part]:
        """The part with the most different matches, where these words and pairs match."""
        matches = [
            (match.start(), match.end(), match[0])
            for match in _WORD.finditer(self._folded)
            if match[0] in words
        ]
        if pairs := sorted(pairs, key=len, reverse=True):
            any_pair = "|".join(map(regex.escape, pairs))
            matches += [
                (match.start(), match.end(1), match[1])
                for match in regex.finditer(rf"(?=({any_pair})(?!\p{{M}}))", self._folded)
            ]
            matches.sort()
        spans = [(*self._original(start, end), text) for start, end, text in matches]
        start, end = self._window(spans)
        return list(self._parts(_joined(self.content, spans), start, end))

    def _original(self, start: int, end: int) -> tuple[int, int]:
        return (self._starts[start], self._ends[end - 1]) if self._starts else (start, end)

    def _window(self, spans: Sequence[tuple[int, int, str]]) -> tuple[int, int]:
        """Where the snippet begins and ends."""
        length = len(self.content)
        if length <= SNIPPET_CHARACTERS:
            return 0, length
        room = SNIPPET_CHARACTERS - _LEAD_CHARACTERS
        ends = [end for _, end, _ in spans]
        best = most = 0
        for first, (start, _, _) in enumerate(spans[:_MAX_WINDOWS]):
            last = bisect.bisect_right(ends, start + room)
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
