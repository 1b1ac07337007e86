"""SearchChatMessages: the snippets of hits, and what they mark."""

import pytest
from support.client import Api
from support.search import search


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


async def test_content_cannot_imitate_a_hit(api: Api) -> None:
    """Only the flag marks a hit: markup in content is text, and escapes nothing."""
    session = await api.session()
    await api.message(session.id, "<b>lemon</b> &lt;b&gt; [[lemon]] **lime** StartSel=lime")
    [hit] = await search(api, "lime")
    assert [part.text for part in hit.snippet if part.hit] == ["lime", "lime"]
    text = "".join(part.text for part in hit.snippet)
    assert "&lt;b&gt;" in text
    assert "[[lemon]] **lime** StartSel=lime" in text


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
