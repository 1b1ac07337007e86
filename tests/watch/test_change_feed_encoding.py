"""The responses of WatchChatSessions. The sessions in them are encoded by hand."""

import json

from hypothesis import given
from hypothesis import strategies as some

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse
from chat_ticket_svc.services import change_feed_encoding, change_feed_events, convert
from chat_ticket_svc.services.change_feed_cursor import Cursor
from chat_ticket_svc.services.change_feed_events import SessionFilter
from chat_ticket_svc.store.change_feed import SESSION, Page, Place, Row
from chat_ticket_svc.store.sessions import Session

TEXT = some.text(some.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
# From before 1970 to after 2106; most times have microseconds.
TIME = some.integers(-(10**15), 5 * 10**15) | some.integers(-(10**9), 5 * 10**9).map(
    lambda seconds: seconds * 1_000_000
)


@given(
    some.builds(
        Session,
        id=some.uuids().map(str),
        tenant_id=TEXT,
        status=some.sampled_from(sorted(convert.SESSION_STATUS)),
        has_ticket=some.booleans(),
        revision=some.integers(0, 2**63 - 1),
        created_at=TIME,
        updated_at=TIME,
        user_id=some.none() | TEXT,
        # Longer than what a byte, and than what two bytes can say.
        title=some.none() | TEXT | TEXT.map(lambda text: 20_000 * text[0]),
        labels=some.none() | some.dictionaries(TEXT, TEXT | some.just("")).map(json.dumps),
        epoch=TEXT,
    )
)
def test_an_encoded_session_equals_the_one_that_protobuf_builds(session: Session) -> None:
    row = Row(
        section=SESSION,
        feed_position=1,
        feed_bucket=0,
        filter_position=1,
        filter_before=None,
        external_ref=None,
        **{name: value for name, value in session._asdict().items() if name != "tenant_id"},
    )
    event = change_feed_encoding.session_event(
        change_feed_encoding.tenant_field(session.tenant_id), row
    )
    encoded = change_feed_encoding.response("a cursor", [event, event])

    expected = WatchChatSessionsResponse.Event(session=convert.session(session))
    assert WatchChatSessionsResponse.FromString(encoded) == WatchChatSessionsResponse(
        cursor="a cursor", events=[expected, expected]
    )


def test_followers_with_many_filters_keep_no_more_than_the_rows() -> None:
    """Pages are kept as long as the tenant is followed."""
    row = Row(
        SESSION, 1, "id", "active", False, 1, 0, 0, None, "x" * 255, None, "0.epoch", 1, None,
        None, 0,
    )  # fmt: skip
    page = Page(Place(1), Place(2), [row] * 100, "epoch", 2, 2, None)
    everything = SessionFilter(None, None, None, {})
    cursor = Cursor(Place(1), "epoch", None)
    for number in range(50):
        made, _ = change_feed_events.responses(
            page, everything, "tenant", f"filter {number}", cursor, frozenset()
        )
        assert len(made[0]) > 100 * 255
    assert 0 < sum(len(r) for kept, _ in page.cache.values() for r in kept) <= page.size
