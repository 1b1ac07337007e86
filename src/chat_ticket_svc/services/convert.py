"""Conversions from rows of the database to protobuf.

What answers most calls is encoded as bytes, in the wire format of protobuf
(https://protobuf.dev/programming-guides/encoding): to build a message and serialise it takes three
times as long. The middleware passes bytes on as they are.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from chat_ticket.v1 import resources_pb2 as pb
from chat_ticket_svc.store import change_feed
from chat_ticket_svc.store.attachments import Attachment
from chat_ticket_svc.store.drafts import Draft
from chat_ticket_svc.store.message_listing import Row
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import ChatTicket, Ticket

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The microseconds of the years 1 to 9999, which protobuf and Python can express.
MIN_MICROSECONDS = -62_135_596_800_000_000
MAX_MICROSECONDS = 253_402_300_799_999_999
POSTGRESQL_EPOCH_MICROSECONDS = 946_684_800_000_000  # 2000-01-01, since 1970-01-01

# The names of enum values in the database, and their numbers in protobuf.
SESSION_STATUS = {
    "active": pb.CHAT_SESSION_STATUS_ACTIVE,
    "resolved": pb.CHAT_SESSION_STATUS_RESOLVED,
    "archived": pb.CHAT_SESSION_STATUS_ARCHIVED,
}
MESSAGE_ROLE = {
    "user": pb.CHAT_MESSAGE_ROLE_USER,
    "assistant": pb.CHAT_MESSAGE_ROLE_ASSISTANT,
}
AUTHOR_KIND = {
    "end_user": pb.CHAT_MESSAGE_AUTHOR_KIND_END_USER,
    "ai_agent": pb.CHAT_MESSAGE_AUTHOR_KIND_AI_AGENT,
    "human_agent": pb.CHAT_MESSAGE_AUTHOR_KIND_HUMAN_AGENT,
}
# A message without one is COMPLETE.
MESSAGE_STATE = {
    "incomplete": pb.CHAT_MESSAGE_STATE_INCOMPLETE,
    "stopped": pb.CHAT_MESSAGE_STATE_STOPPED,
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
        user_id=row.user_id or "",
        title=row.title or "",
        labels=json.loads(row.labels) if row.labels else None,
        epoch=row.epoch,
    )


def author(kind: str | None, id_: str | None) -> pb.ChatMessageAuthor | None:
    if not kind and not id_:
        return None
    return pb.ChatMessageAuthor(
        kind=AUTHOR_KIND[kind] if kind else pb.CHAT_MESSAGE_AUTHOR_KIND_UNSPECIFIED, id=id_ or ""
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
        attachments=[attachment(attached) for attached in row.attachments],
        language_code=row.language_code or "",
        state=MESSAGE_STATE[row.state] if row.state else pb.CHAT_MESSAGE_STATE_COMPLETE,
        author=author(row.author_kind, row.author_id),
        etag=str(row.revision),
        redacted=row.redacted,
    )


def draft(row: Draft) -> pb.ChatDraft:
    return pb.ChatDraft(
        id=row.id,
        session_id=row.session_id,
        role=MESSAGE_ROLE[row.role],
        content=row.content,
        length=row.length,
        metadata_json=row.metadata or "",
        language_code=row.language_code or "",
        create_time=timestamp(row.created_at),
        expire_time=timestamp(row.expires_at),
        author=author(row.author_kind, row.author_id),
    )


# The varints of all 14-bit numbers. FINAL ends a number, CONTINUED is followed by more bytes.
FINAL = [bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7]) for n in range(1 << 14)]
CONTINUED = [bytes([n & 0x7F | 0x80, n >> 7 | 0x80]) for n in range(1 << 14)]

ROLE_AND_CONTENT_TAG = {
    name.encode(): b"(%b2" % bytes([number]) for name, number in MESSAGE_ROLE.items()
}
STATE = {name.encode(): b"X%b" % bytes([number]) for name, number in MESSAGE_STATE.items()}
AUTHOR_KIND_FIELD = {
    name.encode(): b"\x08%b" % bytes([number]) for name, number in AUTHOR_KIND.items()
}
REDACTED = b"p\x01"
STATUS = {name: b"\x18%b" % bytes([number]) for name, number in SESSION_STATUS.items()}
HAS_TICKET = {False: b"", True: b" \x01"}

# The tags of the fields that `messages` encodes: `message` is number 1, `messages` number 2.
MESSAGE, MESSAGES = b"\n", b"\x12"

# Unlike json.loads, it does not look for a byte order mark and blanks.
_parse_json = json.JSONDecoder().raw_decode


def varint(number: int) -> bytes:
    """A number that is not negative."""
    if number < 0x4000:
        return FINAL[number]
    if number < 0x10000000:
        return CONTINUED[number & 0x3FFF] + FINAL[number >> 14]
    return CONTINUED[number & 0x3FFF] + varint(number >> 14)


def text_field(tag: bytes, text: str) -> bytes:
    content = text.encode()
    size = len(content)
    return b"%b%b%b" % (tag, FINAL[size] if size < 0x4000 else varint(size), content)


def tenant_field(tenant_id: str) -> bytes:
    """The field `tenant_id` of a session, for `session_field`."""
    return text_field(b"\x12", tenant_id)


def session_field(tenant: bytes, row: Session | change_feed.Row) -> bytes:
    """Encode the field `session`, number 1, of a response or an event. Equals `session`."""
    create_time = _timestamp(row.created_at)
    is_changed = row.updated_at != row.created_at
    update_time = _timestamp(row.updated_at) if is_changed else create_time
    revision = row.revision
    etag = b"%d" % revision
    session = b"\n$%b%b%b%b%b2%b%b:%b%bB%b%b%b" % (
        row.id.encode(),
        tenant,
        STATUS[row.status],
        HAS_TICKET[row.has_ticket],
        b"(" + varint(revision) if revision else b"",
        FINAL[len(etag)],
        etag,
        FINAL[len(create_time)],
        create_time,
        FINAL[len(update_time)],
        update_time,
        text_field(b"b", row.epoch),
    )
    if row.user_id is not None:
        session += text_field(b"J", row.user_id)
    if row.title is not None:
        session += text_field(b"R", row.title)
    if row.labels is not None:
        for key, value in _parse_json(row.labels)[0].items():
            label = text_field(b"\n", key) + text_field(b"\x12", value)
            session += b"Z%b%b" % (varint(len(label)), label)
    return b"\n%b%b" % (varint(len(session)), session)


def _timestamp(microseconds: int) -> bytes:
    """A Timestamp, with the common sizes of numbers in line."""
    seconds, rest = divmod(microseconds, 1_000_000)
    if 0x10000000 <= seconds < 0x40000000000:
        middle = CONTINUED[seconds >> 14 & 0x3FFF]
        time = b"\x08%b%b%b" % (CONTINUED[seconds & 0x3FFF], middle, FINAL[seconds >> 28])
    else:
        time = _seconds(seconds)
    return b"%b\x10%b" % (time, varint(1000 * rest)) if rest else time


def _seconds(seconds: int) -> bytes:
    """The field `seconds` of a Timestamp, also of one before 1970."""
    return b"\x08" + varint(seconds & 0xFFFFFFFFFFFFFFFF) if seconds else b""


def message_field(row: Message) -> bytes:
    """Encode the field `message`, number 1, of a response. Equals `message`."""
    attached = json.dumps(row.attachments).encode() if row.attachments else None
    listed: Row = (
        row.id.encode(), row.sequence, row.revision, row.role.encode(), row.content.encode(),
        _encoded(row.metadata), row.created_at - POSTGRESQL_EPOCH_MICROSECONDS, attached,
        _encoded(row.language_code), _encoded(row.state), _encoded(row.author_kind),
        _encoded(row.author_id), row.redacted, 0, None,
    )  # fmt: skip
    return messages(row.session_id, [listed], tag=MESSAGE)


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode()


def messages(session_id: str, rows: Iterable[Row], *, tag: bytes = MESSAGES) -> bytes:
    """Encode the field `messages` of a response from the rows of a session's messages.

    The common sizes of numbers are in line, as the encoding is most of the cost of a list. With the
    tag MESSAGE, it encodes the field `message` from a single row.
    """
    parts: list[bytes] = []
    session_id_and_sequence_tag = b"\x12$" + session_id.encode() + b"\x18"
    time, time_seconds = b"", None
    authors: dict[tuple[bytes | None, bytes | None], bytes] = {}
    continued, final = CONTINUED, FINAL  # local names are faster
    for (
        id_, sequence, revision, role, content, metadata, created_at, attachments, language, state,
        author_kind, author_id, redacted, _, _,
    ) in rows:  # fmt: skip
        if 0x4000 <= sequence < 0x10000000:
            number = continued[sequence & 0x3FFF] + final[sequence >> 14]
        else:
            number = varint(sequence)
        seconds, microseconds = divmod(created_at + POSTGRESQL_EPOCH_MICROSECONDS, 1_000_000)
        if seconds != time_seconds:
            time, time_seconds = _seconds(seconds), seconds
            before_nanos = b"B%b%b\x10" % (final[len(time) + 6], time)
        # `end` has the fields from create_time to author.
        if (nanos := 1000 * microseconds) >= 0x10000000:
            rest = continued[nanos >> 14 & 0x3FFF] + final[nanos >> 28]
            end = before_nanos + continued[nanos & 0x3FFF] + rest
        else:
            end = b"%b\x10%b" % (time, varint(nanos)) if nanos else time
            end = b"B%b%b" % (final[len(end)], end)
        if attachments is not None:
            end += _attachments(attachments)
        if language is not None:
            end += b"R%b%b" % (final[len(language)], language)
        if state is not None:
            end += STATE[state]
        if author_kind is not None or author_id is not None:
            author = author_kind, author_id
            if author not in authors:
                authors[author] = _author(author_kind, author_id)
            end += authors[author]
        if metadata is None:
            before_metadata = metadata = b""
        else:
            size = len(metadata)
            before_metadata = b":" + (final[size] if size < 0x4000 else varint(size))
        size = len(content)
        etag = b"%d" % revision
        message = b"\n$%b%b%b %b%b%b%b%b%b%bj%b%b" % (
            id_,
            session_id_and_sequence_tag,
            number,
            number if revision == sequence else varint(revision),
            ROLE_AND_CONTENT_TAG[role],
            final[size] if size < 0x4000 else varint(size),
            content,
            before_metadata,
            metadata,
            end,
            final[len(etag)],
            etag,
        )
        if redacted:
            message += REDACTED
        size = len(message)
        parts += (tag, final[size] if size < 0x4000 else varint(size), message)
    return b"".join(parts)


def _attachments(rows: bytes) -> bytes:
    """Encode the field `attachments` of a message from the JSON array of their rows."""
    message = pb.ChatMessage(attachments=[attachment(Attachment(*row)) for row in json.loads(rows)])
    return message.SerializeToString()


def _author(kind: bytes | None, id_: bytes | None) -> bytes:
    """Encode the field `author` of a message."""
    content = b"" if kind is None else AUTHOR_KIND_FIELD[kind]
    if id_ is not None:
        content += b"\x12%b%b" % (varint(len(id_)), id_)
    return b"b%b%b" % (varint(len(content)), content)


def attachment(row: Attachment) -> pb.ChatAttachment:
    return pb.ChatAttachment(
        id=row.id,
        message_id=row.message_id,
        file_url=row.file_url,
        file_name=row.file_name,
        file_type=row.file_type,
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.created_at if row.updated_at is None else row.updated_at),
    )


def ticket(row: Ticket) -> pb.Ticket:
    return pb.Ticket(
        id=row.id,
        tenant_id=row.tenant_id,
        title=row.title,
        status=TICKET_STATUS[row.status],
        create_time=timestamp(row.created_at),
        update_time=timestamp(row.updated_at),
        external_ref=row.external_ref or "",
        revision=row.revision,
        etag=str(row.revision),
    )


def chat_ticket(row: ChatTicket) -> pb.ChatTicket:
    return pb.ChatTicket(
        id=row.id,
        session_id=row.session_id,
        ticket_id=row.ticket_id,
        create_time=timestamp(row.created_at),
        ticket=ticket(row.ticket),
    )
