"""SearchChatMessages."""

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from support.client import Api, an_id, refused

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    SearchChatMessagesRequest,
    SearchChatMessagesResponse,
)
from chat_ticket_svc.services import paging
from chat_ticket_svc.store import search as store

Hit = SearchChatMessagesResponse.Hit


async def search(api: Api, query: str, **filters: object) -> list[Hit]:
    """The hits on all pages."""
    hits: list[Hit] = []
    request = SearchChatMessagesRequest(query=query, **filters)  # type: ignore[arg-type]
    while True:
        page = await api.messages.SearchChatMessages(request)
        hits += page.hits
        request.page_token = page.next_page_token
        if not request.page_token:
            return hits


async def contents(api: Api, query: str, **filters: object) -> set[str]:
    """The snippets of all hits, as plain text."""
    return {
        "".join(part.text for part in hit.snippet) for hit in await search(api, query, **filters)
    }


async def test_hit_has_the_message_and_a_snippet(api: Api) -> None:
    """A hit names the message, its place, its role and time, and marks what matched."""
    session = await api.session()
    await api.message(session.id, "nothing here")
    message = await api.message(session.id, "it prints while printing nonsense")
    [hit] = await search(api, "print")
    assert (hit.message_id, hit.session_id, hit.sequence) == (message.id, session.id, 2)
    assert (hit.role, hit.create_time) == (message.role, message.create_time)
    assert hit.score > 0
    assert [(part.text, part.hit) for part in hit.snippet] == [
        ("it ", False),
        ("prints", True),
        (" while ", False),
        ("printing", True),
        (" nonsense", False),
    ]


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


@pytest.mark.parametrize(
    ("content", "query", "marked"),
    [
        ("Type your <password> here", "password", "Type your <[password]> here"),
        ("to jane.doe@example.com, or", "jane.doe@example.com", "to [jane.doe@example.com], or"),
        ("to jane.doe@example.com", "example.com", "to jane.doe@[example.com]"),
        ("apple, pear", "apple pear", "[apple], [pear]"),
        ("order_id=AB-99812/7", "99812", "order_id=AB-[99812]/7"),
        ("written in C++17", "C++", "written in [C++]17"),
        ("Galaxy\N{TRADE MARK SIGN} 2\u00bd m\u00b2", "galaxy 2",
         "[Galaxy]\N{TRADE MARK SIGN} [2]\u00bd [m\u00b2]"),
        ("organizations organize", "organizat*", "[organizations] organize"),
        ("cafe\u0301 \uff21\uff22\uff23 re\u00adfund", "café abc refund",
         "[cafe\u0301] [\uff21\uff22\uff23] [re\u00adfund]"),
        ("注文番号が見つかりません", "注文番号", "[注文番号]が見つかりません"),
        ("注文の在庫、注文", "注文", "[注文]の在庫、[注文]"),
        ("在庫がない", "庫", "在[庫]がない"),
        ("ขอคืนเงินค่ะ", "คืนเงิน", "ขอ[คืนเงิน]ค่ะ"),
        ("배송이 언제 오나요", "배송", "[배송]이 언제 오나요"),
        ("iPhone15の注文 \uff8a\uff9f\uff7f\uff7a\uff9d", "iphone15 注文 パソコン",
         "[iPhone15]の[注文] [\uff8a\uff9f\uff7f\uff7a\uff9d]"),
    ],
)  # fmt: skip
async def test_snippet_marks_what_matches(api: Api, content: str, query: str, marked: str) -> None:
    """Whole words and addresses, or the characters of a pair; the text is as it was sent."""
    await api.message((await api.session()).id, content)
    [hit] = await search(api, query)
    assert "".join(f"[{p.text}]" if p.hit else p.text for p in hit.snippet) == marked


async def test_match_among_many_words_is_marked(api: Api) -> None:
    """Also the last one of a message with more different words than are looked at."""
    content = " ".join(f"{n:x}x" for n in range(36_000)) + " needles"
    await api.message((await api.session()).id, content)
    [hit] = await search(api, "needle")
    assert "needles" in [part.text for part in hit.snippet if part.hit]


@pytest.mark.parametrize(
    "character",
    ["\N{THUMBS UP SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-4}", "e\u0301\u0323", "คื่", "🇩🇪"],
)
async def test_snippet_is_cut_between_characters(api: Api, character: str) -> None:
    """Never between a character and its marks, wherever the cut falls."""
    session = await api.session()
    for shift in range(4):
        content = "x" * shift + character * 200 + " needle " + character * 200
        message = await api.message(session.id, content)
        [hit] = [hit for hit in await search(api, "needle") if hit.message_id == message.id]
        text = "".join(part.text for part in hit.snippet)
        assert "needle" in text
        assert text in content
        before, after = text.strip("x").split(" needle ")
        assert before == character * (len(before) // len(character))
        assert after == character * (len(after) // len(character))
        assert 200 < len(text) <= 300


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
    for query in ("needle", "need*", "a -haystac*"):
        assert needle.id in {hit.message_id for hit in await search(api, query)} or query[0] == "a"


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


async def test_content_cannot_imitate_a_hit(api: Api) -> None:
    """Only the flag marks a hit: markup in content is text, and escapes nothing."""
    session = await api.session()
    await api.message(session.id, "<b>lemon</b> &lt;b&gt; [[lemon]] **lime** StartSel=lime")
    [hit] = await search(api, "lime")
    assert [part.text for part in hit.snippet if part.hit] == ["lime", "lime"]
    text = "".join(part.text for part in hit.snippet)
    assert "&lt;b&gt;" in text
    assert "[[lemon]] **lime** StartSel=lime" in text


async def test_widest_times_are_no_limit(api: Api) -> None:
    """Programs send the first and the last time that they can express for no limit."""
    message = await api.message((await api.session()).id, "needle")
    widest = {
        "start_create_time": Timestamp(seconds=-62_135_596_800),
        "end_create_time": Timestamp(seconds=253_402_300_799, nanos=999_999_999),
    }
    assert [hit.message_id for hit in await search(api, "needle", **widest)] == [message.id]


async def test_snippet_is_short_however_long_the_message(api: Api) -> None:
    """A hit in 256 KiB, or next to a very long word, has a short snippet."""
    session = await api.session()
    long_word = "y" * 1000
    for content, query in (
        ("word " * 50_000 + "needle " + "word " * 2000, "needle"),
        ("needle " + "x" * 250_000, "needle"),
        ("word " * 50_000 + long_word, long_word),
    ):
        message = await api.message(session.id, content)
        [hit] = [hit for hit in await search(api, query) if hit.message_id == message.id]
        assert any(part.hit and query.startswith(part.text) for part in hit.snippet)
        assert 200 < sum(len(part.text) for part in hit.snippet) <= 300


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


async def every_page(
    api: Api, query: str, *, page_size: int = 1000, **filters: object
) -> tuple[list[Hit], bool]:
    """The hits of all pages, and whether they are incomplete; all pages agree."""
    hits: list[Hit] = []
    incomplete = set()
    token = ""
    while token or not incomplete:
        page = await api.messages.SearchChatMessages(
            SearchChatMessagesRequest(
                query=query,
                page_size=page_size,
                page_token=token,
                **filters,  # type: ignore[arg-type]
            )
        )
        hits += page.hits
        incomplete.add(page.incomplete_results)
        token = page.next_page_token
    [is_incomplete] = incomplete
    return hits, is_incomplete


@pytest.fixture
def only_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to look for matches looks at five messages."""
    monkeypatch.setattr(store, "MAX_MESSAGES", 5)


class TestIncomplete:
    """When there is more than can be looked at."""

    async def test_thousands_of_matches(self, api: Api) -> None:
        """5,000 matches are all ranked, one more is too many; other words are found as ever."""
        session = await api.session()
        rare = await api.message(session.id, "a nectarine among them")
        best = await api.message(session.id, "lychee lychee lychee")
        other = await api.session()
        for count in [500] * 9 + [499]:
            message = r.ChatMessage(role=r.CHAT_MESSAGE_ROLE_USER, content="one lychee more")
            request = BatchCreateChatMessagesRequest(
                session_id=other.id, messages=[message] * count
            )
            await api.messages.BatchCreateChatMessages(request)
        hits, incomplete = await every_page(api, "lychee")
        assert (len(hits), incomplete) == (5000, False)
        assert hits[0].message_id == best.id

        newest = await api.message(other.id, "one lychee more")
        hits, incomplete = await every_page(api, "lychee")
        assert incomplete
        assert newest.id in {hit.message_id for hit in hits}
        assert len({hit.message_id for hit in hits}) == len(hits) >= 5000
        hits, incomplete = await every_page(api, "nectarine")
        assert ([hit.message_id for hit in hits], incomplete) == ([rare.id], False)

    async def test_phrase_of_common_words(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """A phrase of words that are common, but seldom side by side, is found completely."""
        monkeypatch.setattr(store, "MAX_MESSAGES", 5)
        session = await api.session()
        found = await api.message(session.id, "the order parcel")
        for _ in range(8):
            await api.message(session.id, "a parcel of an order")
        for query in ('"order parcel"', '"order parcel" -zebra*'):
            hits, incomplete = await every_page(api, query)
            assert ([hit.message_id for hit in hits], incomplete) == ([found.id], False)

    @pytest.mark.usefixtures("only_five")
    async def test_pages_are_in_order_and_repeat_nothing(self, api: Api) -> None:
        """Also where two ways to look met the same messages; the newest are among them."""
        session = await api.session()
        ids = [
            (await api.message(session.id, "melon " * (1 + n % 3) + "pear " * (4 - n % 3))).id
            for n in range(15)
        ]
        complete, incomplete = await every_page(api, "melon")
        assert incomplete
        assert 5 <= len(complete) <= 12
        assert {hit.message_id for hit in complete} >= {*ids[-5:]}
        order = [(hit.score, hit.create_time.ToMicroseconds(), hit.message_id) for hit in complete]
        assert order == sorted(set(order), reverse=True)
        for page_size in (1, 2, 3, 4):
            assert await every_page(api, "melon", page_size=page_size) == (complete, True)

    @pytest.mark.usefixtures("only_five")
    async def test_narrower_filters_make_it_complete(self, api: Api) -> None:
        """A session, or a time, with no more than can be looked at; not a role."""
        first = await api.session()
        of_first = [await api.message(first.id, "papaya") for _ in range(3)]
        second = await api.session()
        of_second = [await api.message(second.id, "papaya") for _ in range(3)]
        hits, incomplete = await every_page(api, "papaya")
        assert (len(hits), incomplete) == (6, True)
        hits, incomplete = await every_page(api, "papaya", session_id=first.id)
        assert ({hit.message_id for hit in hits}, incomplete) == ({m.id for m in of_first}, False)
        early = {"end_create_time": second.create_time}
        hits, incomplete = await every_page(api, "papaya", **early)
        assert ({hit.message_id for hit in hits}, incomplete) == ({m.id for m in of_first}, False)
        late = {"start_create_time": second.create_time}
        hits, incomplete = await every_page(api, "papaya", **late)
        assert ({hit.message_id for hit in hits}, incomplete) == ({m.id for m in of_second}, False)
        hits, incomplete = await every_page(api, "papaya", roles=[r.CHAT_MESSAGE_ROLE_ASSISTANT])
        assert (hits, incomplete) == ([], True)

    @pytest.mark.usefixtures("only_five")
    async def test_session_longer_than_a_search_reads(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A word that is rare in the tenant is still found, with all its matches."""
        monkeypatch.setattr(store, "ENOUGH_MATCHES", 1)
        session = await api.session()
        for content in ("a quince", *["a guava"] * 7, "a guava and a quince"):
            await api.message(session.id, content)
        hits, incomplete = await every_page(api, "quince", session_id=session.id)
        assert ([hit.sequence for hit in hits], incomplete) == ([9, 1], False)
        hits, incomplete = await every_page(api, "guava", session_id=session.id)
        assert incomplete
        assert [hit.sequence for hit in hits][:5] == [9, 8, 7, 6, 5]

    @pytest.mark.usefixtures("only_five")
    async def test_common_words_are_searched_in_the_newest_sessions(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the estimate of matches is too high. Otherwise the search reads the index."""
        monkeypatch.setattr(store, "TOO_MANY_MATCHES", -1)
        monkeypatch.setattr(store, "ENOUGH_MATCHES", 4)
        old, new = await api.session(), await api.session()
        rare = await api.message(old.id, "a damson")
        medlars = [await api.message(old.id, "a medlar") for _ in range(3)]
        medlars += [await api.message(new.id, "a medlar") for _ in range(4)]
        hits, incomplete = await every_page(api, "medlar")
        assert [hit.message_id for hit in hits] == [message.id for message in medlars[:0:-1]]
        assert incomplete
        hits, incomplete = await every_page(api, "damson")
        assert ([hit.message_id for hit in hits], incomplete) == ([rare.id], False)

    async def test_much_text(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of long messages fewer are looked at, the newest ones; one of them at least."""
        monkeypatch.setattr(store, "MAX_BYTES", 15_000)
        session = await api.session()
        contents = ["durian " + "x" * length for length in (10_000, 10_000, 9_000, 100)]
        ids = [(await api.message(session.id, content)).id for content in contents]
        hits, incomplete = await every_page(api, "durian")
        assert ([hit.message_id for hit in hits], incomplete) == (ids[:0:-1], True)
        await api.message(session.id, "durian " + "y" * 20_000)
        hits, incomplete = await every_page(api, "durian")
        assert (len(hits), incomplete) == (1, True)

    @pytest.mark.usefixtures("only_five")
    async def test_index_that_takes_too_long(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is no error: the newest messages are looked at without it."""
        monkeypatch.setattr(store, "INDEX_TIMEOUT_MS", 1)
        session = await api.session()
        for _ in range(6):
            await api.message(session.id, "plum " + "word " * 50_000)
        newest = await api.message(session.id, "plum")
        hits, incomplete = await every_page(api, "plum")
        assert incomplete
        assert newest.id in {hit.message_id for hit in hits}

    @pytest.mark.usefixtures("only_five")
    async def test_sessions_count_as_well(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those without messages, and separately those not changed since the time asked for."""
        before, session = await api.session(), await api.session()
        for _ in range(6):
            await api.message(before.id, "fig")
        for _ in range(3):
            await api.session()
        last = await api.message(session.id, "fig")
        window = {"start_create_time": last.create_time}
        hits, incomplete = await every_page(api, "fig", **window)
        assert ([hit.message_id for hit in hits], incomplete) == ([last.id], False)
        for limit, incomplete in ((3, True), (4, True), (5, False)):
            monkeypatch.setattr(store, "MAX_SESSIONS", limit)
            assert (await every_page(api, "fig", **window))[1] == incomplete
        monkeypatch.setattr(store, "MAX_SESSIONS", 50)
        for _ in range(5):
            await api.session()
        assert (await every_page(api, "fig", **window))[1]
