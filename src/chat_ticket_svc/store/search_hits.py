"""The hits of a search: the messages that match, each with its snippet.

snippets.py finds the words of a message, and PostgreSQL says which of them match.
"""

import asyncio
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.search_query import Tsquery
from chat_ticket_svc.store.snippets import Part, Text


class Match(NamedTuple):
    """A message that matches. `language` is its search language."""

    message_id: str
    session_id: str
    sequence: int
    role: str
    created_at: int
    score: float
    language: str
    content: str

    @property
    def rank(self) -> tuple[float, int, str]:
        return self.score, self.created_at, self.message_id


class Hit(NamedTuple):
    """A match, and the part of its content that matches best."""

    match: Match
    snippet: Sequence[Part]


# Different words that are looked at for the snippets of a page.
MAX_SNIPPET_WORDS = 20_000

# Stems, and with the label A the words as they are, unless these are too many for a tsvector.
WITH_UNSTEMMED = """
CASE WHEN octet_length({text}) > 100000
          AND pg_column_size({stems}) + pg_column_size(to_tsvector('pg_catalog.simple',
                  search_text({text}, search_language))) > 1000000
    THEN {stems}
    ELSE {stems} || setweight(to_tsvector('pg_catalog.simple',
                        search_text({text}, search_language)), 'A')
END
"""

# Which words a snippet marks.
MARKED_WORDS = f"""
SELECT search_language, word.text
  FROM unnest(%(word_languages)s::text[], %(words)s::text[]) AS word (search_language, text)
  JOIN unnest(%(languages)s::text[], %(marked)s::text[]::tsquery[]) AS asked (language, query)
    ON asked.language = search_language
 CROSS JOIN LATERAL (
       SELECT search_vector(word.text, search_language) AS stems OFFSET 0) AS stemmed
 WHERE CASE WHEN %(has_prefix)s
           THEN {WITH_UNSTEMMED.format(stems="stems", text="word.text")}
           ELSE stems
       END @@ query
"""


async def hits(
    db: Database, matches: Sequence[Match], queries: Mapping[str, Tsquery], *, has_prefix: bool
) -> list[Hit]:
    """The hits, with their snippets. Long messages take a while, and other calls must not wait."""
    texts = await asyncio.to_thread(lambda: [Text(match.content) for match in matches])
    words = await asyncio.to_thread(_different_words, matches, texts, queries)
    params = {
        "word_languages": [language for language, _ in words],
        "words": [word for _, word in words],
        "languages": [language for language, query in queries.items() if query.marked],
        "marked": [query.marked for query in queries.values() if query.marked],
        "has_prefix": has_prefix,
    }
    marked: dict[str, set[str]] = defaultdict(set)
    for language, word in await db.fetch_all(MARKED_WORDS, params, lambda *row: row):
        marked[language].add(word)

    def with_snippets() -> list[Hit]:
        return [
            Hit(match, text.snippet(marked[match.language], queries[match.language].pairs))
            for match, text in zip(matches, texts, strict=True)
        ]

    return await asyncio.to_thread(with_snippets)


def _different_words(
    matches: Sequence[Match], texts: Sequence[Text], queries: Mapping[str, Tsquery]
) -> list[tuple[str, str]]:
    """The different words of each language, up to MAX_SNIPPET_WORDS.

    First those that begin like a word of the query, as most forms of a word do.
    """
    words = {
        (match.language, word)
        for match, text in zip(matches, texts, strict=True)
        for word in text.words()
    }
    if len(words) > MAX_SNIPPET_WORDS:

        def is_different(word: tuple[str, str]) -> bool:
            language, text = word
            initial = unicodedata.normalize("NFD", text[0].lower())[0]
            return initial not in queries[language].initials

        return sorted(words, key=is_different)[:MAX_SNIPPET_WORDS]
    return list(words)
