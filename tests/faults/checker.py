"""What must hold after every run, by the record of its callers and by the database itself.

The invariants are those of reliability.md, I1 to I6; what the processes look like afterwards, I7
and I8, is for who started them (see `runs`).
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import namedtuple_row

from chat_ticket.v1 import resources_pb2 as r
from faults.draft_checker import check_drafts, check_seen
from faults.draft_record import DraftRecord
from faults.feed_audit import read_audit
from faults.feed_checker import check_audit, check_feed
from faults.feed_record import FeedRecord
from faults.record import Outcome, Record, WatchRecord, Write

MESSAGES = """
SELECT session_id::text, id::text, sequence, content, metadata::text, state,
       (extract(epoch FROM created_at) * 1000000)::bigint AS created_at,
       (SELECT coalesce(array_agg(a.id::text), '{}') FROM chat_attachments a
         WHERE a.tenant_id = m.tenant_id AND a.message_id = m.id) AS attachments
  FROM chat_messages m WHERE tenant_id = %s ORDER BY session_id, sequence
"""
SESSIONS = "SELECT id::text, status, has_ticket, revision FROM chat_sessions WHERE tenant_id = %s"
LINKS = """
SELECT session_id::text, id::text, ticket_id::text FROM chat_tickets WHERE tenant_id = %s
"""
TICKETS = "SELECT id::text, title, status, revision FROM tickets WHERE tenant_id = %s"


@dataclass(frozen=True)
class Violation:
    invariant: str
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


class Seen(NamedTuple):
    """What was seen while something was done to the service."""

    violations: Sequence[Violation]
    note: str = ""  # for the report


@dataclass
class Stored:
    """What the database has of a tenant."""

    messages: dict[str, Any]
    in_order: dict[str, list[Any]]  # of each session
    sessions: dict[str, Any]
    links: list[Any]
    tickets: dict[str, Any]


def stored(connection: psycopg.Connection[Any], tenant: str) -> Stored:
    cursor = connection.cursor(row_factory=namedtuple_row)
    messages = cursor.execute(MESSAGES, (tenant,)).fetchall()
    in_order: dict[str, list[Any]] = defaultdict(list)
    for message in messages:
        in_order[message.session_id].append(message)
    return Stored(
        {message.id: message for message in messages},
        in_order,
        {row.id: row for row in cursor.execute(SESSIONS, (tenant,))},
        cursor.execute(LINKS, (tenant,)).fetchall(),
        {row.id: row for row in cursor.execute(TICKETS, (tenant,))},
    )


def check(
    record: Record, connection: psycopg.Connection[Any], tenants: Sequence[str]
) -> list[Violation]:
    violations = [Violation("I6", finding) for finding in record.findings if " tells " in finding]
    violations += [
        Violation("status", finding) for finding in record.findings if " tells " not in finding
    ]
    for tenant in tenants:
        found = stored(connection, tenant)
        writes = [write for write in record.writes if write.tenant == tenant]
        violations += _writes(writes, found)
        violations += _order(writes, found)
        violations += _tickets(writes, found)
        drafts = [draft for draft in record.drafts if draft.tenant == tenant]
        violations += [
            Violation("draft", text) for text in check_drafts(drafts, found.messages, connection)
        ]
        for watch in record.watches:
            if watch.tenant == tenant:
                violations += _check_watch(watch, found)
                violations += _check_seen(watch, drafts, found)
        feeds = [feed for feed in record.feeds if feed.tenant == tenant]
        violations += [Violation("feed", text) for text in _check_feeds(feeds, connection, tenant)]
    return violations


def _new_messages(write: Write) -> list[tuple[Any, Any]]:
    """The messages of a create, each with what was acknowledged of it."""
    match write.kind:
        case "CreateChatMessage":
            response = write.response and write.response.message
            return [(write.request.message, response)]
        case "BatchCreateChatMessages":
            responses = write.response.messages if write.response else itertools.repeat(None)
            return list(zip(write.request.messages, responses, strict=False))
    return []


def _writes(writes: Sequence[Write], found: Stored) -> Iterator[Violation]:
    """I1 and I2: an acknowledged write is stored unchanged, and a failed one is not stored."""
    deletes = {
        write.request.message_id: write for write in writes if write.kind == "DeleteChatMessage"
    }
    gone = _deleted_sessions(writes)
    contents = Counter(message.content for message in found.messages.values())
    for write in writes:
        if write.outcome is Outcome.UNKNOWN:
            last = write.attempts[-1]
            if write.kind in ("CreateChatMessage", "BatchCreateChatMessages", "CreateChatSession"):
                yield Violation(
                    "I2", f"{write.kind} does not converge: {last.code.name} {last.reason}"
                )
        if (
            write.kind == "CreateChatSession"
            and write.outcome is Outcome.REFUSED
            and write.session_id in found.sessions
        ):
            yield Violation("I2", f"session {write.session_id} failed and is stored")
        if (
            write.kind == "CreateChatSession"
            and write.outcome is Outcome.ACKNOWLEDGED
            and write.session_id not in found.sessions
            and write.session_id not in gone
        ):
            yield Violation("I1", f"session {write.session_id} is lost")
        if write.session_id in found.sessions and gone.get(write.session_id):
            yield Violation("I1", f"session {write.session_id} is there, and was deleted")
        for message, response in _new_messages(write):
            row = found.messages.get(message.id)
            delete = deletes.get(message.id)
            if contents[message.content] > 1:
                yield Violation("I1", f"message {message.id} is there twice")
            if write.outcome is Outcome.REFUSED and row:
                yield Violation("I2", f"message {message.id} failed and is stored")
            if write.outcome is not Outcome.ACKNOWLEDGED:
                continue
            if row is None:
                kept = delete is None or delete.outcome is Outcome.REFUSED
                if kept and write.session_id not in gone:
                    yield Violation("I1", f"message {message.id} is lost")
            elif delete is not None and delete.outcome is Outcome.ACKNOWLEDGED:
                yield Violation("I1", f"message {message.id} is there, and was deleted")
            elif (row.session_id, row.content, row.sequence, row.created_at) != (
                write.session_id,
                message.content,
                response.sequence,
                response.create_time.ToMicroseconds(),
            ):
                yield Violation("I1", f"message {message.id} is not as it was acknowledged")
        if write.kind == "CreateChatAttachment" and write.outcome is Outcome.ACKNOWLEDGED:
            message_id = write.request.message_id
            row, delete = found.messages.get(message_id), deletes.get(message_id)
            if row is not None and row.attachments.count(write.request.attachment.id) != 1:
                yield Violation("I1", f"attachment {write.request.attachment.id} is lost")


def _deleted_sessions(writes: Sequence[Write]) -> dict[str, bool]:
    """Whether they certainly were; those that certainly were not are left out."""
    return {
        write.session_id: write.outcome is Outcome.ACKNOWLEDGED
        for write in writes
        if write.kind == "DeleteChatSession" and write.outcome is not Outcome.REFUSED
    }


def _order(writes: Sequence[Write], found: Stored) -> Iterator[Violation]:
    """I3: sequences and times grow, also as callers met them one after the other."""
    for session_id, messages in found.in_order.items():
        for one, other in itertools.pairwise(messages):
            if other.sequence <= one.sequence or other.created_at < one.created_at:
                yield Violation("I3", f"messages {one.id} and {other.id} are out of order")
        if messages and messages[-1].sequence > found.sessions[session_id].revision:
            yield Violation("I3", f"session {session_id} is behind its last message")
    responses: dict[str, list[tuple[float, float, int, int]]] = defaultdict(list)
    for write in writes:
        if write.outcome is Outcome.ACKNOWLEDGED and (new := _new_messages(write)):
            numbers = [answer.sequence for _, answer in new]
            if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
                yield Violation("I3", f"a batch got the sequences {numbers}")
            responses[write.session_id].append(
                (write.began, write.acknowledged_at, numbers[0], numbers[-1])
            )
    for session_id, spans in responses.items():
        numbers = [number for _, _, first, last in spans for number in range(first, last + 1)]
        if len(numbers) != len(set(numbers)):
            yield Violation("I3", f"a sequence of session {session_id} was acknowledged twice")
        latest, highest = sorted(spans, key=lambda span: span[1]), 0
        ended = 0
        for began, _, first, _ in sorted(spans):
            while ended < len(latest) and latest[ended][1] < began:
                highest = max(highest, latest[ended][3])
                ended += 1
            if first <= highest:
                yield Violation(
                    "I3", f"session {session_id}: {first} was begun when {highest} was acknowledged"
                )


def _check_watch(watch: WatchRecord, found: Stored) -> Iterator[Violation]:
    """I4: a watch delivered each message once and in order, and ends in the session's state."""
    who = f"a watch of {watch.session_id}"
    ids = [message_id for message_id, _ in watch.created]
    for message_id, times in Counter(ids).items():
        if times > 1:
            yield Violation("I4", f"{who} delivered {message_id} {times} times")
    sequences = [sequence for _, sequence in watch.created]
    if any(other <= one for one, other in itertools.pairwise(sequences)):
        yield Violation("I4", f"{who} delivered messages out of order")
    if watch.backwards:
        yield Violation("I4", f"{who} went back: {watch.backwards[0]}")
    if watch.unknown_changed:
        yield Violation(
            "I4", f"{who} delivered a change of {watch.unknown_changed[0]} but not the message"
        )
    session = found.sessions[watch.session_id]
    if watch.revision != session.revision:
        yield Violation("I4", f"{who} stopped at {watch.revision} of {session.revision}")
        return
    here = {message.id: message for message in found.in_order[watch.session_id]}
    for message_id in here.keys() - set(ids):
        yield Violation("I4", f"{who} never delivered {message_id}")
    for message_id in here.keys() ^ watch.messages.keys():
        yield Violation("I4", f"{who} holds another set: {message_id}")
    for message_id, row in here.items():
        delivered = watch.messages.get(message_id)
        if delivered is None:
            continue
        attached = sorted(attachment.id for attachment in delivered.attachments)
        if (delivered.content, delivered.metadata_json, attached) != (
            row.content,
            row.metadata or "",
            sorted(row.attachments),
        ):
            yield Violation("I4", f"{who} holds another {message_id}")


def _check_seen(
    watch: WatchRecord, drafts: Sequence[DraftRecord], found: Stored
) -> Iterator[Violation]:
    """What a watch showed of drafts is in their messages, and led to them."""
    if watch.drafts is not None:
        for text in check_seen(watch.drafts, drafts, found.messages):
            yield Violation("draft", f"a watch of {watch.session_id} {text}")


def check_ticket(create: Write, writes: Sequence[Write], found: Stored) -> Iterator[Violation]:
    """A ticket that one caller has created and changed, one call after the other.

    `writes` are those of its session.
    """
    ticket_id, session_id = create.request.ticket.id, create.session_id
    outcomes = {write.kind: write.outcome for write in writes}
    is_linked = any(link.id == create.request.chat_ticket_id for link in found.links)
    if session_id not in found.sessions:
        yield Violation("I5", f"session {session_id} was deleted with its ticket")
    elif not is_linked and outcomes.get("DeleteChatTicket", Outcome.REFUSED) is Outcome.REFUSED:
        yield Violation("I5", f"the ticket of session {session_id} is lost")
    elif is_linked and outcomes.get("DeleteChatTicket") is Outcome.ACKNOWLEDGED:
        yield Violation("I5", f"the ticket of session {session_id} is linked, and was unlinked")
    ticket = found.tickets.get(ticket_id)
    if ticket is None:
        if outcomes.get("DeleteTicket", Outcome.REFUSED) is Outcome.REFUSED:
            yield Violation("I5", f"ticket {ticket_id} is lost")
        return
    if outcomes.get("DeleteTicket") is Outcome.ACKNOWLEDGED:
        yield Violation("I5", f"ticket {ticket_id} is there, and was deleted")
    expected, revisions = [(create.request.ticket.title, "open")], 0
    for write in writes:
        if write.kind == "UpdateTicket" and write.outcome is not Outcome.REFUSED:
            if write.outcome is Outcome.ACKNOWLEDGED:
                expected.clear()
                revisions += 1
            changed = write.request.ticket
            status = r.TicketStatus.Name(changed.status).removeprefix("TICKET_STATUS_").lower()
            expected.append((changed.title, status))
    if (ticket.title, ticket.status) not in expected:
        yield Violation("I5", f"ticket {ticket_id} is not as it was acknowledged")
    if ticket.revision < revisions:
        yield Violation("I5", f"ticket {ticket_id} has too few revisions: {ticket.revision}")


def _check_feeds(
    feeds: Sequence[FeedRecord], connection: psycopg.Connection[Any], tenant: str
) -> Iterator[str]:
    """What followers of the tenant's feed were told, by the audit of commits."""
    if not feeds:
        return
    audit = read_audit(connection, tenant)
    yield from check_audit(audit)
    for feed in feeds:
        for text in check_feed(feed, audit):
            yield f"the follower {feed.name} of {tenant} {text}"


def _tickets(writes: Sequence[Write], found: Stored) -> Iterator[Violation]:
    """I5: of tickets, archiving and deleting."""
    linked = Counter(link.session_id for link in found.links)
    for session_id, times in linked.items():
        if times > 1:
            yield Violation("I5", f"session {session_id} has {times} tickets")
    for session in found.sessions.values():
        if session.has_ticket != (session.id in linked):
            yield Violation("I5", f"session {session.id} has_ticket is {session.has_ticket}")
    of_sessions: dict[str, list[Write]] = defaultdict(list)
    for write in writes:
        of_sessions[write.session_id].append(write)
    for write in writes:
        if write.kind == "CreateChatTicket" and write.outcome is Outcome.ACKNOWLEDGED:
            yield from check_ticket(write, of_sessions[write.session_id], found)
    archived = {
        write.session_id: write
        for write in writes
        if write.kind == "UpdateChatSession" and write.outcome is Outcome.ACKNOWLEDGED
    }
    for write in writes:
        if write.kind == "CreateChatTicket" and write.outcome is Outcome.ACKNOWLEDGED:
            archive = archived.get(write.session_id)
            if archive and archive.acknowledged_at < write.began:
                yield Violation("I5", f"session {write.session_id} was linked after archiving")
