"""The query of a search, and the tsqueries that it becomes.

PostgreSQL's websearch_to_tsquery knows only ASCII quotes, has no prefixes, and refuses deep
nesting, so it is not used. Its syntax is kept, with these added. docs/guides/search.md has the
syntax.

A message is indexed by the stemmer of its language. So a query becomes one tsquery for each
language. The index is asked for all of them at once, and each message then for that of its own.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

# Input methods of Chinese and Japanese write the full-width forms.
_QUOTES = '"“”„‟«»〝〞〟\N{FULLWIDTH QUOTATION MARK}'
_MINUSES = "\\-\N{FULLWIDTH HYPHEN-MINUS}"
_STARS = "*\N{FULLWIDTH ASTERISK}"
# A quotation mark after a digit is a sign for inches.
_TERM = re.compile(
    rf"(?P<minus>[{_MINUSES}]?)"
    rf"(?:(?<!\d)[{_QUOTES}](?P<phrase>[^{_QUOTES}]*)[{_QUOTES}](?P<star>[{_STARS}]?)"
    rf"|(?P<word>[^\s{_QUOTES}]+))"
)
_LAST_WORD = re.compile(r"[^\W\d_]+$")

# A stem is a beginning of its word, but for its last letters. Longer words are rare.
_SHORTEST_STEM, _LONGEST_STEM = 2, 20


class Term(NamedTuple):
    """A word or a phrase of a query. `source` is what the caller wrote."""

    source: str
    text: str
    is_phrase: bool = False
    is_prefix: bool = False
    is_negated: bool = False

    @property
    def stem_candidates(self) -> str:
        """For a prefix: words whose stems may be those of words that begin with it.

        The index has stems only. That of "organization", which organizat* asks for, is "organ".
        """
        word = _LAST_WORD.search(unicodedata.normalize("NFKC", self.text))
        if not self.is_prefix or word is None or is_pair(word[0]):
            return ""
        beginnings = itertools.accumulate(word[0][:_LONGEST_STEM])
        return " ".join(
            f"{beginning} {beginning}e"
            for beginning in beginnings
            if len(beginning) >= _SHORTEST_STEM
        )


def parse(query: str) -> list[list[Term]]:
    """The alternatives of a query, each with the terms that it requires or excludes."""
    alternatives: list[list[Term]] = [[]]
    matches = list(_TERM.finditer(query))
    for index, match in enumerate(matches):
        is_operator = match[0].lower() == "or" and alternatives[-1] and index < len(matches) - 1
        if is_operator:
            alternatives.append([])
            continue
        is_phrase = match["word"] is None
        text = match["phrase"] if is_phrase else match["word"]
        if stars := len(text) - len(text.rstrip(_STARS)):
            text = text[:-stars]
        alternatives[-1].append(
            Term(
                source=match[0][len(match["minus"]) :],
                text=text,
                is_phrase=is_phrase,
                is_prefix=bool(stars or match["star"]),
                is_negated=bool(match["minus"]),
            )
        )
    return alternatives


class Word(NamedTuple):
    """A lexeme of a term, at its position."""

    position: int
    lexeme: str


class Words(NamedTuple):
    """What PostgreSQL makes of a term in one language, in the order of positions."""

    stemmed: tuple[Word, ...]
    # For a prefix only: the words as they are, and the stems of Term.stem_candidates.
    unstemmed: tuple[Word, ...] = ()
    candidates: tuple[str, ...] = ()


class Tsquery(NamedTuple):
    """A query for the messages of one language, in the syntax of tsquery.

    The index is asked for `indexed`, which may match too much, as a stem does not say which words
    it is of. If that is empty, the index cannot be asked. A message matches if `indexed` and
    `exact` do. If the query has prefixes, `exact` is asked of the stems, which have the label D,
    and of the unstemmed words, which have the label A. A snippet marks the words that match
    `marked`, and the `pairs` of characters. Some pairs are single characters.
    """

    indexed: str
    exact: str
    marked: str
    pairs: frozenset[str]


class QueryBuilder:
    """Builds the tsqueries of a query, one for each language."""

    def __init__(self, alternatives: Sequence[Sequence[Term]]):
        self._alternatives = alternatives
        self.has_prefix = any(term.is_prefix for terms in alternatives for term in terms)
        # A label makes PostgreSQL read the message again, so only prefixes have them.
        self._label = "D" if self.has_prefix else ""

    def build(self, words: Mapping[Term, Words]) -> Tsquery | None:
        """The tsquery of a language, or None if the language ignores all terms."""
        indexed, exact = [], []
        marked: set[str] = set()
        pairs: set[str] = set()
        for terms in self._alternatives:
            conditions, exact_conditions = [], []
            for term in terms:
                found = words[term]
                prefix = _prefix(found) if term.is_prefix else None
                if prefix is not None:
                    condition = _begins_with(prefix, found)
                    exact_condition = _chain(prefix, label="A", is_prefix=True)
                    lexemes = {word.lexeme for word in prefix[:-1]}
                    marks = {_operand(prefix[-1].lexeme, "A", is_prefix=True)}
                    label = "A"
                else:
                    found_words = list(_without_ends(found.stemmed))
                    if not found_words:
                        continue
                    condition = _all(found_words, "", is_phrase=term.is_phrase)
                    exact_condition = _all(found_words, self._label, is_phrase=term.is_phrase)
                    lexemes = {word.lexeme for word in found_words}
                    marks = set()
                    label = self._label
                if term.is_negated:
                    exact_conditions.append(f"!({exact_condition})")
                    if prefix is None:
                        conditions.append(f"!({condition})")
                    continue
                conditions.append(condition)
                exact_conditions.append(exact_condition)
                pairs |= {lexeme for lexeme in lexemes if is_pair(lexeme)}
                marked |= marks
                marked |= {_operand(lexeme, label) for lexeme in lexemes if not is_pair(lexeme)}
            if exact_conditions:
                indexed.append(" & ".join(conditions))
                exact.append(" & ".join(exact_conditions))
        if not exact:
            return None
        return Tsquery(any_of(indexed), any_of(exact), " | ".join(sorted(marked)), frozenset(pairs))


def any_of(conditions: Iterable[str]) -> str:
    """A condition that is true if one of them is. An empty one is always true."""
    different = dict.fromkeys(conditions)
    return "" if "" in different else " | ".join(f"({condition})" for condition in different)


def is_pair(text: str) -> bool:
    """Whether text begins in a script whose characters are indexed in pairs (see search_text)."""
    return (
        "\u0e01" <= text[0] <= "\u109f"
        or "\u1100" <= text[0] <= "\u11ff"
        or "\u1780" <= text[0] <= "\u17ff"
        or text[0] >= "\u3005"
    )


def _is_single(pair: str) -> bool:
    """Whether a pair is a single character, with its marks."""
    return sum(not unicodedata.category(character).startswith("M") for character in pair) == 1


def _without_ends(words: Sequence[Word]) -> Iterator[Word]:
    """The words without the last character of each run, which is in the last pair too."""
    for before, word in itertools.pairwise([Word(0, ""), *words]):
        is_end = (
            before.position == word.position - 1
            and len(before.lexeme) > len(word.lexeme)
            and before.lexeme.endswith(word.lexeme)
            and is_pair(before.lexeme)
        )
        if not is_end:
            yield word


def _prefix(found: Words) -> list[Word] | None:
    """The unstemmed words of a prefix, or None if there are none or they end in a pair.

    Pairs find a part of a word anyway.
    """
    words = list(_without_ends(found.unstemmed))
    # search_text repeats the digits of "AB998".
    *_, last = words or [Word(0, "")]
    repeated = f"[a-z]+{last.lexeme}"
    if len(words) > 1 and last.lexeme.isdecimal() and re.fullmatch(repeated, words[-2].lexeme):
        words.pop()
    return None if not words or is_pair(words[-1].lexeme) else words


def _begins_with(prefix: Sequence[Word], found: Words) -> str:
    """What the index is asked for in place of a prefix: the stems that its words may have."""
    *_, last = prefix
    stems = {word.lexeme for word in found.stemmed if word.position == last.position}
    alternatives = [_operand(lexeme, is_prefix=True) for lexeme in sorted({last.lexeme, *stems})]
    alternatives += [_operand(lexeme) for lexeme in found.candidates]
    before = [word for word in found.stemmed if word.position < last.position]
    conditions = [_operand(word.lexeme) for word in _without_ends(before)]
    return " & ".join([*conditions, any_of(alternatives)])


def _all(words: Sequence[Word], label: str, *, is_phrase: bool) -> str:
    """The condition that asks for all words of a term.

    Words that a separator joins, as in AB-99812, are a phrase. Outside quotation marks, pairs of
    characters may be apart. ts_rank prefers those that are together.
    """
    if is_phrase:
        return _chain(words, label)
    conditions = []
    for are_pairs, group in itertools.groupby(words, lambda word: is_pair(word.lexeme)):
        if are_pairs:
            conditions += [_chain([word], label) for word in group]
        else:
            conditions.append(_chain([*group], label))
    return " & ".join(dict.fromkeys(conditions))


def _chain(words: Sequence[Word], label: str, *, is_prefix: bool = False) -> str:
    """A phrase: the words, at their distances."""
    result = ""
    for index, word in enumerate(words):
        if index:
            result += f" <{word.position - words[index - 1].position}> "
        is_last = index == len(words) - 1
        result += _operand(word.lexeme, label, is_prefix=is_prefix and is_last)
    return result if len(words) == 1 else f"({result})"


def _operand(lexeme: str, label: str = "", *, is_prefix: bool = False) -> str:
    """A lexeme in the syntax of tsquery. A single character stands for the pairs that it begins."""
    escaped = lexeme.replace("\\", "\\\\").replace("'", "''")
    star = "*" if is_prefix or (is_pair(lexeme) and _is_single(lexeme)) else ""
    suffix = f":{star}{label}" if star or label else ""
    return f"'{escaped}'{suffix}"
