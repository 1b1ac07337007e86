"""Rows ↔ protobuf."""

from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from chat_ticket.v1 import resources_pb2 as pb
from chat_ticket_svc.store.attachments import Attachment
from chat_ticket_svc.store.messages import Message
from chat_ticket_svc.store.sessions import Session
from chat_ticket_svc.store.tickets import ChatTicket, Ticket

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

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
