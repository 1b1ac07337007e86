"""SearchChatMessages where there is more than it can examine."""

import pytest
from support.client import Api
from support.search import every_page

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
)
from chat_ticket_svc.store import search as store


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
