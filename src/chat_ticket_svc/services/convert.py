"""Rows ↔ protobuf."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from chat_ticket.v1 import resources_pb2 as pb
from chat_ticket_svc.store.attachments import Attachment
from chat_ticket_svc.store.message_listing import Row
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import ChatTicket, Ticket

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
EPOCH_OF_POSTGRESQL = 946_684_800_000_000

SESSION_STATUS = {
    "active": pb.CHAT_SESSION_STATUS_ACTIVE,
    "resolved": pb.CHAT_SESSION_STATUS_RESOLVED,
    "archived": pb.CHAT_SESSION_STATUS_ARCHIVED,
}
MESSAGE_ROLE = {
    "user": pb.CHAT_MESSAGE_ROLE_USER,
    "assistant": pb.CHAT_MESSAGE_ROLE_ASSISTANT,
}
TICKET_STATUS = {
    "open": pb.TICKET_STATUS_OPEN,
    "pending": pb.TICKET_STATUS_PENDING,
    "solved": pb.TICKET_STATUS_SOLVED,
    "closed": pb.TICKET_STATUS_CLOSED,
}


def timestamp(microseconds: int) -> Timestamp:
    seconds, rest = divmod(microseconds, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)


def to_datetime(microseconds: int) -> datetime:
    """Raises OverflowError outside the years 1 to 9999."""
    return EPOCH + timedelta(microseconds=microseconds)


def session(row: Session) -> pb.ChatSession:
    return pb.ChatSession(
        id=row.id,
        tenant_id=row.tenant_id,
        status=SESSION_STATUS[row.status],
        has_ticket=row.has_ticket,
        revision=row.revision,
        etag=str(row.revision),
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.updated_at),
    )


def message(row: Message) -> pb.ChatMessage:
    return pb.ChatMessage(
        id=row.id,
        session_id=row.session_id,
        sequence=row.sequence,
        revision=row.revision,
        role=MESSAGE_ROLE[row.role],
        content=row.content,
        metadata_json=row.metadata or "",
        create_time=timestamp(row.created_at),
        attachments=[attachment(each) for each in row.attachments],
    )


# Numbers of 14 bits as varints: the last of a number, and what stands before others.
LAST = [bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7]) for n in range(1 << 14)]
BEFORE = [bytes([n & 0x7F | 0x80, n >> 7 | 0x80]) for n in range(1 << 14)]

ROLE_AND_CONTENT = {
    name.encode(): b"(%b2" % bytes([number]) for name, number in MESSAGE_ROLE.items()
}


def _varint(number: int) -> bytes:
    if number < 0x4000:
        return LAST[number]
    return BEFORE[number & 0x3FFF] + _varint(number >> 14)


def messages(session_id: str, rows: Iterable[Row]) -> bytes:
    """The field `messages` of a response, from the rows of a session's messages.

    Written by hand in the wire format (https://protobuf.dev/programming-guides/encoding), and
    with the usual lengths of numbers in line: building the messages takes three times as long,
    and is most of what a list costs.
    """
    parts: list[bytes] = []
    between = b"\x12$" + session_id.encode() + b"\x18"
    time, at = b"", -1
    before, last = BEFORE, LAST  # found faster here
    for id_, sequence, revision, role, content, metadata, created_at, files, _ in rows:
        if 0x4000 <= sequence < 0x10000000:
            number = before[sequence & 0x3FFF] + last[sequence >> 14]
        else:
            number = _varint(sequence)
        seconds, microseconds = divmod(created_at + EPOCH_OF_POSTGRESQL, 1_000_000)
        if seconds != at:
            time, at = b"\x08" + _varint(seconds), seconds
            before_nanos = b"B%b%b\x10" % (last[len(time) + 6], time)
        if (nanos := 1000 * microseconds) >= 0x10000000:
            rest = before[nanos >> 14 & 0x3FFF] + last[nanos >> 28]
            created = before_nanos + before[nanos & 0x3FFF] + rest
        else:
            created = b"%b\x10%b" % (time, _varint(nanos)) if nanos else time
            created = b"B%b%b" % (last[len(created)], created)
        size = len(content)
        message = b"\n$%b%b%b %b%b%b%b%b%b" % (
            id_,
            between,
            number,
            number if revision == sequence else _varint(revision),
            ROLE_AND_CONTENT[role],
            last[size] if size < 0x4000 else _varint(size),
            content,
            b"" if metadata is None else b":%b%b" % (_varint(len(metadata)), metadata),
            created,
        )
        if files is not None:
            message += _attachments(files)
        size = len(message)
        parts += (b"\x12", last[size] if size < 0x4000 else _varint(size), message)
    return b"".join(parts)


def _attachments(files: bytes) -> bytes:
    found = pb.ChatMessage(attachments=[attachment(Attachment(*row)) for row in json.loads(files)])
    return found.SerializeToString()


def attachment(row: Attachment) -> pb.ChatAttachment:
    return pb.ChatAttachment(
        id=row.id,
        message_id=row.message_id,
        file_url=row.file_url,
        file_name=row.file_name,
        file_type=row.file_type,
        create_time=timestamp(row.created_at),
    )


def ticket(row: Ticket) -> pb.Ticket:
    return pb.Ticket(
        id=row.id,
        tenant_id=row.tenant_id,
        title=row.title,
        status=TICKET_STATUS[row.status],
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.updated_at),
    )


def chat_ticket(row: ChatTicket) -> pb.ChatTicket:
    return pb.ChatTicket(
        id=row.id,
        session_id=row.session_id,
        ticket_id=row.ticket_id,
        create_time=timestamp(row.created_at),
        ticket=ticket(row.ticket),
    )
