"""Which errors the clients retry, how long they wait, and what a resumed watch leaves out."""

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo

from chat_ticket.client import ResumeState, is_retryable
from chat_ticket.client._retry import MAX_BACKOFF_SECONDS, backoff_seconds
from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse

Code = grpc.StatusCode
REASON = ErrorInfo(reason="A_REASON")
LATER = RetryInfo(retry_delay=Duration(seconds=3))


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (Code.UNAVAILABLE, [], True),
        (Code.UNAVAILABLE, [REASON], True),
        (Code.DEADLINE_EXCEEDED, [], True),
        (Code.CANCELLED, [], True),
        (Code.INTERNAL, [], True),
        (Code.INTERNAL, [REASON], False),
        (Code.UNKNOWN, [], True),
        (Code.UNKNOWN, [REASON], False),
        (Code.RESOURCE_EXHAUSTED, [], False),
        (Code.RESOURCE_EXHAUSTED, [REASON, LATER], True),
        (Code.ABORTED, [REASON], False),
        (Code.ABORTED, [REASON, LATER], True),
        (Code.NOT_FOUND, [REASON], False),
        (Code.UNAUTHENTICATED, [REASON], False),
    ],
)
def test_errors_that_are_retried(code: Code, details: list[object], expected: bool) -> None:
    """Transient codes, errors with RetryInfo, and proxy errors without a reason."""
    assert is_retryable(ChatTicketError(code, "", details)) is expected  # type: ignore[arg-type]


def test_backoff_doubles_up_to_its_limit() -> None:
    """At random from zero, and on top of what the server asks for."""
    for failures, limit in [(0, 0.2), (1, 0.4), (3, 1.6), (6, MAX_BACKOFF_SECONDS), (99999, 10)]:
        pauses = [backoff_seconds(failures, None) for _ in range(300)]
        assert 0 <= min(pauses) < limit / 4
        assert limit * 3 / 4 < max(pauses) <= limit
    requested = ChatTicketError(Code.UNAVAILABLE, "", [LATER])
    assert 3 <= backoff_seconds(0, requested) <= 3.2


def event(revision: int, **fields: object) -> WatchChatSessionResponse:
    return WatchChatSessionResponse(revision=revision, **fields)  # type: ignore[arg-type]


def test_second_stream_repeats_nothing() -> None:
    """Neither the session as it was, nor the end of the backlog; a new revision is a heartbeat."""
    state = ResumeState(7)
    session = event(7, session={"status": 1})
    caught_up = event(9, caught_up={})
    assert state.accept(session) is session
    assert state.accept(caught_up) is caught_up
    assert state.revision == 9
    assert state.accept(event(9, session={"status": 1, "revision": 9})) is None
    assert state.accept(event(9, caught_up={})) is None
    assert state.accept(event(9, session={"status": 2})) is not None
    moved = state.accept(event(12, caught_up={}))
    assert moved is not None
    assert (moved.WhichOneof("event"), moved.revision, state.revision) == ("heartbeat", 12, 12)
    assert not state.ended


def test_id_that_was_used_again_ends_the_watch() -> None:
    """The session that was watched is gone; the revision stays that of its last event."""
    state = ResumeState(0)
    state.accept(event(5, session={"create_time": {"seconds": 1}}))
    gone = state.accept(event(2, session={"create_time": {"seconds": 2}}))
    assert gone is not None
    assert (gone.WhichOneof("event"), gone.revision) == ("session_deleted", 5)
    assert state.ended
