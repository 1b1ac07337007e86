"""SearchChatMessages."""

import csv
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from support.client import Api, an_id, refused
from support.search import search

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    CreateChatMessageRequest,
    SearchChatMessagesRequest,
)
from chat_ticket_svc.services import paging


async def contents(api: Api, query: str, **filters: object) -> set[str]:
    """The snippets of all hits, as plain text."""
    return {
        "".join(part.text for part in hit.snippet) for hit in await search(api, query, **filters)
    }


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("red apples", {"a red apple"}),
        ('"red pear"', {"the red pear"}),
        ("apple or plum", {"a red apple", "an apple", "plums"}),
        ("apple -red or plum", {"an apple", "plums"}),
        ("apple OR", {"a red apple", "an apple"}),
        ('pear -"red pear"', {"pear red"}),
        ("apple -red", {"an apple"}),
        ("the", set()),
        ("!!!", set()),
        ("'); DROP TABLE chat_messages; --", set()),
        (":* & | ! ( \\ '", set()),
        ("-" * 200 + "red apple" + " -pear" * 100, {"an apple"}),
    ],
)
async def test_web_search_syntax(api: Api, query: str, found: set[str]) -> None:
    """Words, phrases, or, not; no query is a syntax error."""
    session = await api.session()
    for content in ("a red apple", "an apple", "the red pear", "pear red", "plums"):
        await api.message(session.id, content)
    assert await contents(api, query) == found


@pytest.mark.parametrize(
    ("query", "ignored"),
    [
        ("the", ["the"]),
        ("the refund of THE order", ["the", "of", "THE"]),
        ('"to be" or refund -the', ['"to be"', "the"]),
        ("refund !!! -- \N{THUMBS UP SIGN}", ["!!!", "-", "\N{THUMBS UP SIGN}"]),
        ("the*", []),
        ("refund", []),
    ],
)
async def test_says_which_words_it_ignores(api: Api, query: str, ignored: list[str]) -> None:
    """Stop words of the tenant's language, and what has no letter or digit; as they were sent."""
    await api.message((await api.session()).id, "The refund of the order is to be made.")
    response = await api.messages.SearchChatMessages(SearchChatMessagesRequest(query=query))
    assert response.ignored_words == ignored
    assert len(response.hits) == ("refund" in query)


def _cases() -> Iterator[tuple[str, str, bool]]:
    """Content, query and whether it must find it, of the table in issue 15."""
    path = Path(__file__).with_name("search.tsv")
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            content, query = (
                row[name].encode("latin-1", "backslashreplace").decode("unicode_escape")
                for name in ("content", "query")
            )
            yield content, query, row["must_hit"] == "yes"


CASES = list(_cases())
CONTENTS = list(dict.fromkeys(content for content, _, _ in CASES))


@pytest.mark.parametrize(("content", "query", "must_hit"), CASES)
async def test_finds_what_people_type(api: Api, content: str, query: str, must_hit: bool) -> None:
    """Parts of addresses and numbers, other forms, quotes, prefixes, scripts without spaces."""
    message = await api.message((await api.session()).id, content)
    assert message.content == content
    hits = await search(api, query)
    assert [hit.message_id for hit in hits] == [message.id] * must_hit
    for hit in hits:
        assert "".join(part.text for part in hit.snippet) == content
        assert any(part.hit for part in hit.snippet)


async def test_best_match_first_then_newest_in_pages(api: Api) -> None:
    """Ranked; pages of one meet each hit once."""
    session = await api.session()
    ids = [
        (await api.message(session.id, content)).id
        for content in ("cat dog dog", "cat cat cat", "cat dog dog", "dog")
    ]
    hits = await search(api, "cat", page_size=1)
    assert [hit.message_id for hit in hits] == [ids[1], ids[2], ids[0]]
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


async def test_filters(api: Api) -> None:
    """By session, role and time [start, end)."""
    first, second = await api.session(), await api.session()
    await api.message(first.id, "kiwi one")
    middle = await api.message(first.id, "kiwi two", role=r.CHAT_MESSAGE_ROLE_ASSISTANT)
    last = await api.message(second.id, "kiwi three")
    assert await contents(api, "kiwi", session_id=second.id) == {"kiwi three"}
    assert await contents(api, "kiwi", session_id=an_id()) == set()
    roles = [r.CHAT_MESSAGE_ROLE_ASSISTANT]
    assert await contents(api, "kiwi", roles=roles) == {"kiwi two"}
    window = {"start_create_time": middle.create_time, "end_create_time": last.create_time}
    assert await contents(api, "kiwi", **window) == {"kiwi two"}


async def test_other_tenants_are_not_searched(api: Api, other: Api) -> None:
    """Only the caller's messages are found."""
    await other.message((await other.session()).id, "a secret mango")
    assert await search(api, "mango") == []


async def test_ignored_word_is_not_asked_of_another_language(api: Api) -> None:
    """Not even in messages of a language that does not ignore it."""
    session = await api.session()
    message = r.ChatMessage(
        role=r.CHAT_MESSAGE_ROLE_USER, content="the parcel 注文", language_code="ja"
    )
    request = CreateChatMessageRequest(session_id=session.id, message=message)
    created = await api.messages.CreateChatMessage(request)
    assert await search(api, "the") == []
    for query in ("parcel", "the parcel", "of parcel", "parcel or the"):
        assert [hit.message_id for hit in await search(api, query)] == [created.message.id]


async def test_adjacent_characters_rank_higher(api: Api) -> None:
    """Pairs match wherever they are, but the message that has them together comes first."""
    session = await api.session()
    together = await api.message(session.id, "注文番号をお知らせください。ありがとうございます。")
    apart = await api.message(session.id, "注文ありがとうございます。文番をお知らせください。番号")
    hits = await search(api, "注文番号")
    assert [hit.message_id for hit in hits] == [together.id, apart.id]
    [hit] = await search(api, '"注文番号"')
    assert hit.message_id == together.id


HOSTILE = {
    "marks in a row": "a" + "\u0323\u0301" * 65_000,
    "marks of Hebrew": "\u05d0" + "\u05b8\u0591" * 65_000,
    "marks that grow": "".join(chr(0x3400 + n % 27_000) + "\u0f77" for n in range(43_000)),
    "Han, each pair another": "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(87_000)),
    "ligatures that grow": "".join(f"\ufdfa{n:x}" for n in range(36_000)),
    "letters and digits": "a1" * 131_000,
    "digits and letters": "1a" * 65_000 + "9" * 130_000,
    "letters": "a" * 262_000,
    "signs": "C#" * 65_000 + "C++" * 43_000,
    "escapes": "%2F" * 87_000,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
async def test_any_content_can_be_stored_and_searched(api: Api, content: str) -> None:
    """No content is too much for the index, or takes it more than a moment."""
    session = await api.session()
    await api.message(session.id, content)
    needle = await api.message(session.id, "a needle")
    for query in ("needle", "need*", "needle -haystac*", "-haystac*"):
        assert needle.id in {hit.message_id for hit in await search(api, query)}, query


@pytest.mark.parametrize("seed", range(4))
async def test_query_of_any_characters_is_no_error(api: Api, seed: int) -> None:
    """1,000 characters of all of Unicode, or of those that mean something in a query."""
    random = Random(seed)
    codes = [random.randrange(1, 0x110000 - 0x800) for _ in range(900)]
    unicode = [chr(code if code < 0xD800 else code + 0x800) for code in codes]  # no surrogates
    syntax = random.choices(" \"“”«*-&|!():<>'\\aé注ค", k=1000 if seed % 2 else 100)
    query = "".join(random.sample([*unicode, *syntax], 1000))
    session = await api.session()
    message = await api.message(session.id, f"{query} needle")
    for each in (query, f"{query[:990]} or needle"[-1000:], f'"{query[:998]}"'):
        await search(api, each)
    hits = await search(api, f"needle or {query[:980]}")
    assert message.id in {hit.message_id for hit in hits}


async def test_exact_words_are_found_in_long_lists(api: Api) -> None:
    """Also where PostgreSQL keeps the places of words no longer, and phrases cannot be checked."""
    lines = [f"ORD-2024-{n:06} user{n}@example.com 10.0.0.{n} 1pc" for n in range(300)]
    session = await api.session()
    of_lines = await api.message(session.id, "\n".join(lines))
    of_words = await api.message(
        session.id, "word " * 17_000 + "AB-99812 jane.doe@example.com lost parcels AB99813"
    )
    for query in ("ORD-2024-000299", "user299@example.com", "10.0.0.299", "ORD-2024-0002*"):
        assert [hit.message_id for hit in await search(api, query)] == [of_lines.id], query
    for query in ("AB-99812", "jane.doe@example.com", '"lost parcels"', "AB99813", "AB-998*"):
        assert [hit.message_id for hit in await search(api, query)] == [of_words.id], query
    short = await api.message(session.id, "AB 1 99812")
    assert short.id not in {hit.message_id for hit in await search(api, "AB-99812")}


@pytest.mark.parametrize(
    ("code", "content", "query"),
    [
        ("de-AT", "Die Häuser wurden gestern geliefert", "haus gelieferten"),
        ("fr", "Les commandes sont arrivées hier", "commande arrivée"),
        ("ru", "Заказы были доставлены", "заказ доставлена"),
        ("es", "Los pedidos llegaron rotos", "pedido roto"),
        ("ja", "注文を running します", "注文 running"),
        ("de", "Größe und Bestellung", "Größ*"),
        ("de", "Wir übergeben das Paket", "über*"),
        ("fr", "Mon élève est là", "élè*"),
        ("de", "Die Lieferungen sind da", "Lieferu*"),
        ("fr", "Le reçu est arrivé", "reç* arrivé*"),
    ],
)
async def test_stemmer_of_the_message_is_asked(
    api: Api, code: str, content: str, query: str
) -> None:
    """Whatever the tenant's language, a message is found by the forms of its own language."""
    session = await api.session()
    request = CreateChatMessageRequest(
        session_id=session.id,
        message=r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content=content, language_code=code),
    )
    created = await api.messages.CreateChatMessage(request)
    english = await api.message(session.id, content)
    hits = await search(api, query)
    assert created.message.id in {hit.message_id for hit in hits}
    exact = " ".join(content.split()[1:])
    assert {hit.message_id for hit in await search(api, exact)} == {created.message.id, english.id}


async def test_widest_times_are_no_limit(api: Api) -> None:
    """Programs send the first and the last time that they can express for no limit."""
    message = await api.message((await api.session()).id, "needle")
    widest = {
        "start_create_time": Timestamp(seconds=-62_135_596_800),
        "end_create_time": Timestamp(seconds=253_402_300_799, nanos=999_999_999),
    }
    assert [hit.message_id for hit in await search(api, "needle", **widest)] == [message.id]


async def test_bad_fields_are_rejected_together(api: Api) -> None:
    """All violations of a search request are reported together."""
    request = SearchChatMessagesRequest(
        query="a" * 1001,
        session_id="x",
        roles=[0],  # type: ignore[list-item]
        start_create_time=Timestamp(nanos=10**9),
        page_size=-5,
        page_token="%%%",
    )
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.messages.SearchChatMessages(request)
    assert set(refusal.fields) == {
        "query",
        "session_id",
        "roles[0]",
        "start_create_time",
        "page_size",
        "page_token",
    }
    for query in ("", "a\0"):
        with refused(StatusCode.INVALID_ARGUMENT) as refusal:
            await search(api, query)
        assert list(refusal.fields) == ["query"]
    assert await search(api, "a" * 1000) == []


async def test_token_of_another_query_is_rejected(api: Api) -> None:
    """A page token belongs to its query."""
    session = await api.session()
    for _ in range(2):
        await api.message(session.id, "grape fig")
    page = await api.messages.SearchChatMessages(
        SearchChatMessagesRequest(query="grape", page_size=1)
    )
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await search(api, "fig", page_token=page.next_page_token)
    assert list(refusal.fields) == ["page_token"]


@pytest.mark.parametrize("score", [5e-324, 3.5e38, float("nan"), float("inf"), 1, "1", None])
async def test_forged_token_is_rejected(api: Api, score: object) -> None:
    """A token with the right digest and a position that no page ends at."""
    request = SearchChatMessagesRequest(query="x")
    request.page_token = paging.encode_token(api.tenant, request, score, 1, an_id())  # type: ignore[arg-type]
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.messages.SearchChatMessages(request)
    assert list(refusal.fields) == ["page_token"]


async def test_best_match_of_all_comes_first(api: Api) -> None:
    """A page has the best of all matches, not the best of the first ones found."""
    session = await api.session()
    ids = [(await api.message(session.id, "cat " * n + "dog " * (9 - n))).id for n in range(1, 9)]
    hits = await search(api, "cat", page_size=1)
    assert [hit.message_id for hit in hits] == ids[::-1]
