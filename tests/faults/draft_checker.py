"""What must hold for drafts after every run, when all leases have run out.

It is checked by what the writers produced: their words say whose they are, and which.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psycopg

from chat_ticket.v1 import resources_pb2 as r
from faults.draft_record import LEASE_SECONDS, DraftRecord, SeenDrafts, Stream, Writer

STATES = {
    None: r.CHAT_MESSAGE_STATE_COMPLETE,
    "incomplete": r.CHAT_MESSAGE_STATE_INCOMPLETE,
    "stopped": r.CHAT_MESSAGE_STATE_STOPPED,
}
# Between the clocks of the database and of the callers.
CLOCK_SECONDS = 0.05

OPEN = "SELECT id::text FROM chat_drafts WHERE tenant_id = %s"


def check_drafts(
    drafts: Sequence[DraftRecord], messages: Mapping[str, Any], connection: psycopg.Connection[Any]
) -> Iterator[str]:
    """The violations of one tenant's drafts, whose messages are among `messages`."""
    if not drafts:
        return
    still_open = {row[0] for row in connection.execute(OPEN, [drafts[0].tenant])}
    other_messages = {message.content: message.id for message in messages.values()}
    for draft in drafts:
        about = f"draft {draft.id}"
        yield from (f"{about}: {text}" for text in draft.violations)
        if draft.id in still_open:
            yield f"{about} has outlived its lease: it is open at the end"
        message = messages.get(draft.id)
        if message is None:
            if draft.acknowledged:
                yield f"{about}: acknowledged text is lost, with the draft"
            if draft.messages:
                yield f"{about}: its message is lost"
            continue
        yield from (f"{about}: {text}" for text in check_message(draft, message))
        del other_messages[message.content]
    names = {writer.name: draft for draft in drafts for writer in draft.writers}
    for content, message_id in other_messages.items():
        if (draft := names.get(content.partition(":")[0])) is not None:
            yield f"draft {draft.id} has a second message, {message_id}"


def check_seen(
    seen: SeenDrafts, drafts: Sequence[DraftRecord], messages: Mapping[str, Any]
) -> Iterator[str]:
    """The violations in what one watch showed, of one tenant's drafts."""
    yield from seen.violations
    for draft in drafts:
        message = messages.get(draft.id)
        content = message.content.encode() if message is not None else b""
        if not content.startswith(seen.longest.get(draft.id, b"")):
            yield f"showed text of draft {draft.id} that it has not in the end"
        if message is not None and draft.id in seen.without_message:
            came = seen.without_message[draft.id]
            yield f"ended draft {draft.id}, and the next response was not its message: {came}"
    for draft_id in seen.open:
        yield f"still shows draft {draft_id}, which has ended"


def check_message(draft: DraftRecord, message: Any) -> Iterator[str]:
    """The violations in the message that a draft became, a row of the database."""
    content = message.content.encode()
    yield from _check_content(draft, content)
    yield from _check_state(draft, message, content)
    for kind, told in draft.messages:
        if (told.sequence, told.content, told.state) != (
            message.sequence,
            message.content,
            STATES[message.state],
        ):
            yield f"{kind} told of another message than there is"
    for writer in draft.writers:
        for stream in writer.streams:
            if stream.reason == "DRAFT_TAKEN_OVER" and not _may_be_taken_over(draft, stream):
                yield "its writer was fenced, and nobody had taken the draft over"


def _check_content(draft: DraftRecord, content: bytes) -> Iterator[str]:
    """Each writer's text is there up to where the next one took over, and nothing else."""
    writers = [writer for writer in draft.writers if writer.base is not None]
    expected = b""
    for writer in writers:
        assert writer.base is not None
        if writer.base < len(expected):
            expected = expected[: writer.base]
        expected += writer.text
    if len(content) < draft.acknowledged:
        yield f"acknowledged text is lost, {len(content)} < {draft.acknowledged} bytes"
    if expected.startswith(content):
        for writer, successor in itertools.pairwise(writers):
            if writer.acknowledged > (successor.base or 0):
                yield "a fenced writer was acknowledged text that the content has not"
        return
    same = (one == other for one, other in zip(expected, content, strict=False))
    at = sum(itertools.takewhile(bool, same))
    if any(_has(writer, content, at) for writer in writers[:-1]):
        yield f"text of a fenced writer is in the content, at {at}"
    else:
        was = "acknowledged text is lost or changed" if at < draft.acknowledged else "other text"
        yield f"{was}: at {at} is {content[at : at + 40]!r} for {expected[at : at + 40]!r}"


def _has(writer: Writer, content: bytes, at: int) -> bool:
    """Whether the content goes on there as the writer does, after its own text."""
    assert writer.base is not None
    text = writer.text[at - writer.base :]
    return len(text) > 0 and text[:4] == content[at : at + 4]


def _check_state(draft: DraftRecord, message: Any, content: bytes) -> Iterator[str]:
    finished = {
        writer.finish_state
        for writer in draft.writers
        if writer.base is not None and writer.base + len(writer.text) == len(content)
    }
    match message.state:
        case None:
            if r.CHAT_MESSAGE_STATE_COMPLETE not in finished:
                yield "its message is COMPLETE, and its writer had not finished"
        case "stopped":
            if not draft.has_stop:
                yield "its message is STOPPED, and nobody had stopped it"
        case "incomplete":
            if r.CHAT_MESSAGE_STATE_INCOMPLETE in finished:
                return
            lost_at = _last_renewal(draft, len(content)) + LEASE_SECONDS
            if message.created_at / 1e6 < lost_at - CLOCK_SECONDS:
                yield "its message is INCOMPLETE, and its writer was there"


def _last_renewal(draft: DraftRecord, length: int) -> float:
    """A time at or before the last renewal of the lease that certainly happened."""
    times = [0.0]
    for writer in reversed(draft.writers):
        times += [stream.began for stream in writer.streams if stream.started < math.inf]
        times += [sent_at for end, sent_at in writer.sent if end <= length]
        length = length if writer.base is None else min(length, writer.base)
    return max(times)


def _may_be_taken_over(draft: DraftRecord, fenced: Stream) -> bool:
    """Whether another stream can have taken the draft over after this one had."""
    return any(
        stream is not fenced and stream.started > fenced.began
        for writer in draft.writers
        for stream in writer.streams
    )
