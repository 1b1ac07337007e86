"""What is encoded by hand equals what protobuf makes of the same rows."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as some

from chat_ticket.v1.chat_message_pb2 import GetChatMessageResponse, ListChatMessagesResponse
from chat_ticket.v1.chat_session_pb2 import GetChatSessionResponse, WatchChatSessionsResponse
from chat_ticket_svc.services import change_feed_events, convert
from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.attachments import Attachment
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session

SHORT_TEXT = some.text(
    some.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
)
# Longer than what a byte, and than what two bytes can say.
TEXT = SHORT_TEXT | SHORT_TEXT.map(lambda text: 20_000 * text[0])
ID = some.uuids().map(str)
# From before 1970 to after 2106; most times have microseconds.
TIME = some.integers(-(10**15), 5 * 10**15) | some.integers(-(10**9), 5 * 10**9).map(
    lambda seconds: seconds * 1_000_000
)
NUMBER = some.integers(1, 2**63 - 1) | some.sampled_from([127, 128, 16_383, 16_384, 2**28 - 1])

SESSIONS = some.builds(
    Session,
    id=ID,
    tenant_id=SHORT_TEXT,
    status=some.sampled_from(sorted(convert.SESSION_STATUS)),
    has_ticket=some.booleans(),
    revision=some.just(0) | NUMBER,
    created_at=TIME,
    updated_at=TIME,
    user_id=some.none() | SHORT_TEXT,
    title=some.none() | TEXT,
    labels=some.none() | some.dictionaries(SHORT_TEXT, SHORT_TEXT | some.just("")).map(json.dumps),
    epoch=SHORT_TEXT,
)
MESSAGES = some.builds(
    Message,
    id=ID,
    session_id=ID,
    sequence=NUMBER,
    revision=NUMBER,
    role=some.sampled_from(sorted(convert.MESSAGE_ROLE)),
    content=TEXT,
    language_code=some.none() | some.sampled_from(["de", "de-AT"]),
    metadata=some.none() | TEXT.map(lambda text: json.dumps({"text": text})),
    state=some.none() | some.sampled_from(sorted(convert.MESSAGE_STATE)),
    created_at=TIME,
    author_kind=some.none() | some.sampled_from(sorted(convert.AUTHOR_KIND)),
    author_id=some.none() | SHORT_TEXT,
    redacted=some.booleans(),
    attachments=some.lists(
        some.builds(
            Attachment,
            id=ID,
            message_id=ID,
            file_url=SHORT_TEXT,
            file_name=SHORT_TEXT,
            file_type=SHORT_TEXT,
            created_at=TIME,
            updated_at=some.none() | TIME,
        ),
        max_size=2,
    ).map(tuple),
)


def is_equal(message: Any, other: Any) -> bool:
    """Also when they are serialised again, which tells whether a field is there twice."""
    serialized, expected = (each.SerializeToString(deterministic=True) for each in (message, other))
    return bool(message == other and serialized == expected)


@settings(max_examples=30)
@given(SESSIONS)
def test_session(session: Session) -> None:
    tenant = convert.tenant_field(session.tenant_id)
    encoded = convert.session_field(tenant, session)
    expected = GetChatSessionResponse(session=convert.session(session))
    assert is_equal(GetChatSessionResponse.FromString(encoded), expected)
    assert len(encoded) == expected.ByteSize()

    row = change_feed.Row(
        section=change_feed.SESSION,
        feed_position=1,
        feed_bucket=0,
        filter_position=1,
        filter_before=None,
        external_ref=None,
        **{name: value for name, value in session._asdict().items() if name != "tenant_id"},
    )
    event = convert.session_field(tenant, row)
    event_response = change_feed_events._response("a cursor", [event, event])
    expected_event = WatchChatSessionsResponse.Event(session=convert.session(session))
    assert is_equal(
        WatchChatSessionsResponse.FromString(event_response),
        WatchChatSessionsResponse(cursor="a cursor", events=[expected_event, expected_event]),
    )


@settings(max_examples=30)
@given(MESSAGES)
def test_message(message: Message) -> None:
    encoded = convert.message_field(message)
    expected = GetChatMessageResponse(message=convert.message(message))
    assert is_equal(GetChatMessageResponse.FromString(encoded), expected)
    assert len(encoded) == expected.ByteSize()

    listed = convert.MESSAGES + encoded[len(convert.MESSAGE) :]
    assert ListChatMessagesResponse.FromString(listed).messages == [expected.message]
