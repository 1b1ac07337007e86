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

# Words with digits, which search_text adds the parts of.
_DIGITS = "0123456789"
_LETTER = re.compile(r"[^\W\d_]")
_LETTERS_AND_NUMBER = re.compile(r"[^\W\d_]+[0-9]+")
_NUMBER_AND_LETTERS = re.compile(r"[0-9]+[^\W\d_]+")

# The stem of a word is a beginning of it, but for the last letters, and not much shorter.
_SHORTEST_STEM, _LONGEST_STEM = 2, 20
_LONGEST_ENDING = 10
# Endings that change the stem that comes before them, as in "capability", "skies" and "dying".
_ENDINGS = ("e", "s", "es", "g", "ng", "ing", "ty", "ity", "lity")
# An ending that no stemmer takes off. Before it, the stemmer changes only accents: "über" is a word
# that German ignores, and the stem of "überx" is "uberx", which begins like that of "übergeben".
_KEPT_ENDING = "x"


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
        prefix = word[0][:_LONGEST_STEM]
        shortest = max(_SHORTEST_STEM, len(prefix) - _LONGEST_ENDING)
        beginnings = [prefix[:length] for length in range(shortest, len(prefix) + 1)]
        return " ".join(
            [*beginnings, *(f"{beginning}e" for beginning in beginnings)]
            + [f"{prefix}{ending}" for ending in (*_ENDINGS, _KEPT_ENDING)]
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

    The index is asked for `indexed`, which may match too much: a stem does not say which words it
    is of, nor the index where they are. `placed` also says where they are. If `indexed` is empty,
    the index cannot be asked. A message matches if `indexed` and `exact` do. If the query has
    prefixes, `exact` is asked of the stems, which have the label D, and of the unstemmed words,
    which have the label A. `scattered` is `exact` without the positions and labels of words, for
    messages that are too long for PostgreSQL to keep them. A snippet marks the words that match
    `marked`, and the `pairs` of characters. Some pairs are single characters. `initials` are what
    marked words begin with.
    """

    indexed: str
    placed: str
    exact: str
    scattered: str
    marked: str
    pairs: frozenset[str]
    initials: frozenset[str]


class QueryBuilder:
    """Builds the tsqueries of a query, one for each language."""

    def __init__(self, alternatives: Sequence[Sequence[Term]]):
        self._alternatives = alternatives
        self.has_prefix = any(term.is_prefix for terms in alternatives for term in terms)
        # A label makes PostgreSQL read the message again, so only prefixes have them.
        self._label = "D" if self.has_prefix else ""

    def build(self, words: Mapping[Term, Words]) -> Tsquery | None:
        """The tsquery of a language, or None if the language ignores all terms."""
        indexed, placed, exact, scattered = [], [], [], []
        marked: set[str] = set()
        pairs: set[str] = set()
        initials: set[str] = set()
        for terms in self._alternatives:
            index_conditions, placed_conditions = [], []
            exact_conditions, scattered_conditions = [], []
            for term in terms:
                found = words[term]
                prefix = _prefix(found) if term.is_prefix else None
                asked = prefix or list(_significant(found.stemmed))
                if not asked:
                    continue
                label = "A" if prefix else self._label
                if prefix:
                    index_condition = placed_condition = _begins_with(prefix, found)
                    exact_condition = _prefix_phrase(prefix, label)
                else:
                    index_condition = _all(asked)
                    placed_condition = _phrase(asked, is_quoted=term.is_phrase)
                    exact_condition = _phrase(asked, label, is_quoted=term.is_phrase)
                scattered_condition = _all(asked, is_prefix=bool(prefix))
                if term.is_negated:
                    exact_conditions.append(f"!({exact_condition})")
                    scattered_conditions.append(f"!({scattered_condition})")
                    if not prefix:
                        index_conditions.append(f"!({placed_condition})")
                        placed_conditions.append(f"!({placed_condition})")
                    continue
                index_conditions.append(index_condition)
                placed_conditions.append(placed_condition)
                exact_conditions.append(exact_condition)
                scattered_conditions.append(scattered_condition)
                pairs |= {word.lexeme for word in asked if is_pair(word.lexeme)}
                for word in asked:
                    if not is_pair(word.lexeme):
                        is_last = word is asked[-1]
                        marked.add(_operand(word.lexeme, label, is_prefix=bool(prefix) and is_last))
                        initials.add(word.lexeme[0])
            if exact_conditions:
                indexed.append(" & ".join(index_conditions))
                placed.append(" & ".join(placed_conditions))
                exact.append(" & ".join(exact_conditions))
                scattered.append(" & ".join(scattered_conditions))
        if not exact:
            return None
        return Tsquery(
            any_of(indexed),
            any_of(placed),
            any_of(exact),
            any_of(scattered),
            " | ".join(sorted(marked)),
            frozenset(pairs),
            frozenset(initials),
        )


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


def _significant(words: Sequence[Word]) -> Iterator[Word]:
    """The words without those that search_text adds, which say nothing that others do not.

    They are the last character of each run of pairs, which is in the last pair too, and the parts
    of words with digits.
    """
    added: set[int] = set()
    for word in words:
        if _LETTERS_AND_NUMBER.fullmatch(word.lexeme):
            added |= {word.position + 1, word.position + 2}
        elif _NUMBER_AND_LETTERS.fullmatch(word.lexeme):
            added |= {word.position - 1, word.position - 2}
        elif _LETTER.search(word.lexeme):
            if word.lexeme[-1] in _DIGITS:
                added.add(word.position + 1)
            if word.lexeme[0] in _DIGITS:
                added.add(word.position - 1)
    for before, word in itertools.pairwise([Word(0, ""), *words]):
        is_end = (
            before.position == word.position - 1
            and len(before.lexeme) > len(word.lexeme)
            and before.lexeme.endswith(word.lexeme)
            and is_pair(before.lexeme)
        )
        if not is_end and word.position not in added:
            yield word


def _prefix(found: Words) -> list[Word] | None:
    """The unstemmed words of a prefix, or None if there are none or they end in a pair.

    Pairs find a part of a word anyway.
    """
    words = list(_significant(found.unstemmed))
    return None if not words or is_pair(words[-1].lexeme) else words


def _begins_with(prefix: Sequence[Word], found: Words) -> str:
    """What the index is asked for in place of a prefix: the stems that its words may have."""
    *before, last = prefix
    stems = {word.lexeme for word in found.stemmed if word.position == last.position}
    stems |= {
        lexeme.removesuffix(_KEPT_ENDING)
        for lexeme in found.candidates
        if lexeme.endswith(_KEPT_ENDING) and len(lexeme) > _SHORTEST_STEM
    }
    alternatives = [_operand(lexeme, is_prefix=True) for lexeme in sorted({last.lexeme, *stems})]
    shortest = max(_SHORTEST_STEM, len(last.lexeme) - _LONGEST_ENDING)
    beginnings = [last.lexeme[:length] for length in range(shortest, len(last.lexeme))]
    words = dict.fromkeys([*found.candidates, *beginnings])
    alternatives += [_operand(lexeme) for lexeme in words]
    positions = {word.position for word in before}
    conditions = [_operand(word.lexeme) for word in found.stemmed if word.position in positions]
    return " & ".join([*conditions, f"({any_of(alternatives)})"])


def _prefix_phrase(words: Sequence[Word], label: str) -> str:
    """A phrase that ends in the beginning of a word.

    search_text puts two words before "99X", but one before "99X7", which begins like it.
    """
    *before, last = words
    phrase = _chain(words, label, is_prefix=True)
    if not before or not _NUMBER_AND_LETTERS.fullmatch(last.lexeme):
        return phrase
    nearer = [*before, Word(last.position - 1, last.lexeme)]
    return f"({phrase} | {_chain(nearer, label, is_prefix=True)})"


def _phrase(words: Sequence[Word], label: str = "", *, is_quoted: bool) -> str:
    """The condition that asks for the words of a term, where they are.

    Words that a separator joins, as in AB-99812, are a phrase. Outside quotation marks, pairs of
    characters may be apart. ts_rank prefers those that are together.
    """
    if is_quoted:
        return _chain(words, label)
    groups = itertools.groupby(words, lambda word: is_pair(word.lexeme))
    return " & ".join(
        _all(each, label) if are_pairs else _chain(each, label)
        for are_pairs, each in ((are_pairs, list(group)) for are_pairs, group in groups)
    )


def _all(words: Sequence[Word], label: str = "", *, is_prefix: bool = False) -> str:
    """The condition that asks for all words, wherever they are."""
    return " & ".join(
        dict.fromkeys(
            _operand(word.lexeme, label, is_prefix=is_prefix and word is words[-1])
            for word in words
        )
    )


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
