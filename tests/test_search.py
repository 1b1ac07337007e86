"""SearchChatMessages."""

import pytest
from client import Api, an_id, refused
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import SearchChatMessagesRequest, SearchChatMessagesResponse
from chat_ticket_svc import paging

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


async def test_hit_says_what_and_where(api: Api) -> None:
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
        ("apple -red", {"an apple"}),
        ("the", set()),
        ("!!!", set()),
        ("'); DROP TABLE chat_messages; --", set()),
        (":* & | ! ( \\ '", set()),
    ],
)
async def test_web_search_syntax(api: Api, query: str, found: set[str]) -> None:
    """Words, phrases, or, not; no query is a syntax error."""
    session = await api.session()
    for content in ("a red apple", "an apple", "the red pear", "pear red", "plums"):
        await api.message(session.id, content)
    assert await contents(api, query) == found


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


async def test_content_cannot_look_like_a_hit(api: Api) -> None:
    """Only the flag marks a hit: markup in content is text, and escapes nothing."""
    session = await api.session()
    await api.message(session.id, "<b>lemon</b> &lt;b&gt; [[lemon]] **lime** StartSel=lime")
    [hit] = await search(api, "lime")
    assert [part.text for part in hit.snippet if part.hit] == ["lime", "lime"]
    text = "".join(part.text for part in hit.snippet)
    assert "&lt;b&gt;" in text
    assert "[[lemon]] **lime** StartSel=lime" in text


async def test_snippet_is_short_however_long_the_message(api: Api) -> None:
    """A hit in 256 KiB, or beside a word without an end, comes with a part of it."""
    session = await api.session()
    for content in ("word " * 50_000 + "needle " + "word " * 2000, "needle " + "x" * 250_000):
        message = await api.message(session.id, content)
        [hit] = [hit for hit in await search(api, "needle") if hit.message_id == message.id]
        assert any(part.hit and part.text == "needle" for part in hit.snippet)
        assert sum(len(part.text) for part in hit.snippet) <= 8000


async def test_bad_fields_are_refused_together(api: Api) -> None:
    """Everything that is wrong with a search is said at once."""
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


async def test_token_of_another_query_is_refused(api: Api) -> None:
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
async def test_forged_token_is_refused(api: Api, score: object) -> None:
    """A token with the right digest and a position that no page ends at."""
    request = SearchChatMessagesRequest(query="x")
    request.page_token = paging.token(api.tenant, request, score, 1, an_id())  # type: ignore[arg-type]
    with refused(StatusCode.INVALID_ARGUMENT) as refusal:
        await api.messages.SearchChatMessages(request)
    assert list(refusal.fields) == ["page_token"]


@pytest.mark.parametrize("length", [7850, 7875, 7900, 7910, 7930])
async def test_snippet_is_cut_beside_a_marker_not_in_it(api: Api, length: int) -> None:
    """Where a hit begins or ends at the limit, the snippet still has nothing but the content."""
    # Words of 2,048 characters and more are left out of headlines.
    content = "needle " + (("x" * 1500 + " ") * 6)[:length] + " needle " + "y" * 1500
    await api.message((await api.session()).id, content)
    [hit] = await search(api, "needle")
    text = "".join(part.text for part in hit.snippet)
    assert text in content
    assert length < len(text) <= 8000


async def test_best_match_of_all_comes_first(api: Api) -> None:
    """A page has the best of all matches, not the best of the first ones found."""
    session = await api.session()
    ids = [(await api.message(session.id, "cat " * n + "dog " * (9 - n))).id for n in range(1, 9)]
    hits = await search(api, "cat", page_size=1)
    assert [hit.message_id for hit in hits] == ids[::-1]
