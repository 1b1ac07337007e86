"""The checker of drafts finds what it must, in what writers and followers got."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionResponse as Event
from faults.draft_checker import check_message, check_seen
from faults.draft_record import LEASE_SECONDS, DraftRecord, SeenDrafts, Stream, Writer

COMPLETE = r.CHAT_MESSAGE_STATE_COMPLETE


class Row(NamedTuple):
    """What the checker reads of a message."""

    content: str
    state: str | None = None
    sequence: int = 1
    created_at: int = 0


def a_draft(*writers: Writer) -> DraftRecord:
    return DraftRecord(tenant="t", session_id="s", id="d", writers=list(writers))


def a_writer(base: int = 0, text: bytes = b"one two ", **fields: Any) -> Writer:
    return Writer(name="w", base=base, text=text, finish_state=COMPLETE, **fields)


def a_fenced_writer(acknowledged: int = 4) -> Writer:
    return Writer(name="f", base=0, text=b"old late ", acknowledged=acknowledged)


def test_takeover_is_correct() -> None:
    """The text of each writer is there up to where the next one took over."""
    draft = a_draft(a_fenced_writer(), a_writer(base=4))
    assert list(check_message(draft, Row("old one two "))) == []


@pytest.mark.parametrize(
    ("draft", "row", "found"),
    [
        (a_draft(a_fenced_writer(), a_writer(base=4)), Row("old late one two "), "is in the conte"),
        (a_draft(a_fenced_writer(9), a_writer(base=4)), Row("old one two "), "content has not"),
        (a_draft(a_writer()), Row("two one "), "other text"),
        (a_draft(a_writer()), Row("one one two "), "other text"),
        (a_draft(a_writer(acknowledged=8)), Row("one "), "lost, 4 < 8"),
    ],
)
def test_checker_finds_wrong_content(draft: DraftRecord, row: Row, found: str) -> None:
    """Text of a fenced writer, acknowledged text that is not there, another order, a repeat."""
    assert any(found in text for text in check_message(draft, row))


@pytest.mark.parametrize("late", [-0.2, 0.2])
def test_incomplete_message_is_of_a_lost_writer(late: float) -> None:
    """A lease runs out after its last renewal, and not before."""
    writer = a_writer(sent=[(4, 100.0)], streams=[Stream(began=90.0, started=91.0)])
    created_at = 100.0 + LEASE_SECONDS + late
    row = Row("one ", "incomplete", created_at=round(created_at * 1e6))
    found = list(check_message(a_draft(writer), row))
    assert found == (["its message is INCOMPLETE, and its writer was there"] if late < 0 else [])


def test_fenced_writer_has_a_successor() -> None:
    """A stream that was fenced has another that began no earlier."""
    fenced = Stream(began=1.0, started=2.0, reason="DRAFT_TAKEN_OVER")
    draft = a_draft(a_writer(streams=[fenced]))
    assert "nobody had taken the draft over" in str(list(check_message(draft, Row("one two "))))
    draft.writers[0].streams.append(Stream(began=1.5))
    assert list(check_message(draft, Row("one two "))) == []


# ---- What followers saw ----


def began(content: str = "", draft_id: str = "d") -> Event:
    return Event(draft=r.ChatDraft(id=draft_id, content=content))


def appended(offset: int, text: str) -> Event:
    return Event(draft_appended=Event.ChatDraftAppended(draft_id="d", offset=offset, text=text))


def ended(draft_id: str = "d") -> Event:
    return Event(draft_ended=Event.ChatDraftEnded(draft_id=draft_id))


def created(*ids: str) -> Event:
    messages = [r.ChatMessage(id=each) for each in ids]
    return Event(messages_created=Event.ChatMessagesCreated(messages=messages))


WHOLE = [began("é"), appended(2, " one "), appended(7, "two ")]


def violations(*streams: Sequence[Event]) -> str:
    seen = SeenDrafts()
    for stream in streams:
        seen.begin_stream()
        for event in stream:
            seen.apply(event)
    return str(list(check_seen(seen, [a_draft()], {"d": Row("é one two ")})))


def test_follower_may_resume() -> None:
    """A new stream begins with the whole draft, or with its message."""
    assert violations(WHOLE[:2], [began("é one "), appended(7, "two "), ended(), created("d", "e")],
                      [created("f")]) == "[]"  # fmt: skip


@pytest.mark.parametrize(
    ("streams", "found"),
    [
        ([[*WHOLE[::2], ended(), created("d")]], "skipped a piece"),
        ([[*WHOLE[:2], WHOLE[1], ended(), created("d")]], "repeated a piece"),
        ([WHOLE[1:]], "which it did not show"),
        ([WHOLE, [began("é"), ended(), created("d")]], "took back text"),
        ([[*WHOLE, appended(11, "three"), ended(), created("d")]], "that it has not in the end"),
        ([[*WHOLE, created("d")]], "before its draft ended"),
        ([[*WHOLE, ended(), created("e"), created("d")]], "was not its message"),
        ([[*WHOLE, ended(), created("e", "d")]], "was not its message"),
        ([[ended()]], "ended draft d, which it did not show"),
        ([WHOLE], "still shows"),
    ],
)  # fmt: skip
def test_checker_finds_wrong_deliveries(streams: list[list[Event]], found: str) -> None:
    """Followers see each piece once, what stays, and the end just before the message."""
    assert found in violations(*streams)
