"""The labelled queries of the part `search`: which messages each of them must find.

The messages are the chats of `chats.py` and those of search_messages.tsv. The queries, with their
labels, are in search_queries.tsv. A label follows from a plain rule about the text, which knows
nothing of PostgreSQL: a message is expected if it contains one of the query's forms as whole words.
Where words are not separated by spaces, it is expected if it contains the form at all.

`python -m benchmarks.search_labels` writes the labels into the file again.
"""

import csv
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import chats

MESSAGES = Path(__file__).with_name("search_messages.tsv")
QUERIES = Path(__file__).with_name("search_queries.tsv")

WITHOUT_SPACES = "script without spaces"


@dataclass(frozen=True)
class Message:
    """A message and its name: that of its chat, or `own`, and its number there, from 1 on."""

    name: str
    role: str
    language_code: str  # empty for English
    content: str


@dataclass(frozen=True)
class Query:
    """A query of one kind. `messages` are the names of those that it must find."""

    kind: str
    text: str
    forms: tuple[str, ...]  # a * at either end of a form stands for letters and digits
    messages: frozenset[str]


def sessions() -> Iterator[tuple[Message, ...]]:
    """The messages, by session: the chats first, the messages of search_messages.tsv last."""
    for number, chat in enumerate(chats.chats()):
        yield tuple(
            Message(f"{number}.{ordinal}", utterance.role, "", utterance.content)
            for ordinal, utterance in enumerate(chat, start=1)
        )
    yield tuple(
        Message(f"own.{number}", "user", row["language_code"], row["content"])
        for number, row in enumerate(_rows(MESSAGES), start=1)
    )


def queries() -> list[Query]:
    """The queries and labels of the file.

    Raises RuntimeError if the labels are not those of the rule.
    """
    contents = _contents()
    result = []
    for row in _rows(QUERIES):
        query = Query(
            row["kind"],
            row["query"],
            tuple(row["forms"].split("|")),
            frozenset(row["messages"].split()),
        )
        if query.messages != frozenset(_expected(query, contents)):
            raise RuntimeError(f"the labels of {query.text!r} are not those of the rule")
        result.append(query)
    return result


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def _contents() -> dict[str, str]:
    return {each.name: _fold(each.content) for session in sessions() for each in session}


def _expected(query: Query, contents: Mapping[str, str]) -> Iterator[str]:
    for form in map(_fold, query.forms):
        pattern = _pattern(query.kind, form)
        # Most messages lack the longest part of the form, which is quicker to find out.
        part = max(form.strip("*").split(), key=len)
        candidates = [item for item in contents.items() if part in item[1]]
        yield from (name for name, content in candidates if pattern.search(content))


def _fold(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()


def _pattern(kind: str, form: str) -> re.Pattern[str]:
    words = r"[\W_]+".join(re.escape(word) for word in form.strip("*").split())
    if kind == WITHOUT_SPACES:
        return re.compile(words)
    before = r"(?<![^\W_])" if not form.startswith("*") else ""
    after = r"(?![^\W_])" if not form.endswith("*") else ""
    return re.compile(before + words + after)


def main() -> None:
    contents = _contents()
    rows = _rows(QUERIES)
    with QUERIES.open("w") as file:
        print(*rows[0], sep="\t", file=file)
        for row in rows:
            query = Query(row["kind"], row["query"], tuple(row["forms"].split("|")), frozenset())
            row["messages"] = " ".join(dict.fromkeys(_expected(query, contents)))
            print(*row.values(), sep="\t", file=file)


if __name__ == "__main__":
    main()
