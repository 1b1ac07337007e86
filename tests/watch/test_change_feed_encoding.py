"""The sessions in the responses of WatchChatSessions are encoded by hand."""

import json

from hypothesis import given
from hypothesis import strategies as some

from chat_ticket.v1.chat_session_pb2 import WatchChatSessionsResponse
from chat_ticket_svc.services import change_feed_encoding, convert
from chat_ticket_svc.store.change_feed import SESSION, Row
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
