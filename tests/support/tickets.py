"""Short calls on tickets, and on their links to chat sessions."""

from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateTicketRequest,
    DeleteChatTicketRequest,
    DeleteTicketRequest,
    GetChatTicketRequest,
    GetTicketRequest,
    UpdateTicketRequest,
)
from support.client import Api

OPEN, PENDING = r.TICKET_STATUS_OPEN, r.TICKET_STATUS_PENDING
SOLVED, CLOSED = r.TICKET_STATUS_SOLVED, r.TICKET_STATUS_CLOSED


async def get_chat_ticket(api: Api, chat_ticket_id: str) -> r.ChatTicket:
    request = GetChatTicketRequest(chat_ticket_id=chat_ticket_id)
    return (await api.tickets.GetChatTicket(request)).chat_ticket


async def unlink(api: Api, chat_ticket_id: str) -> None:
    await api.tickets.DeleteChatTicket(DeleteChatTicketRequest(chat_ticket_id=chat_ticket_id))


async def create_ticket(api: Api, **fields: Any) -> r.Ticket:
    ticket = r.Ticket(**{"title": "help", **fields})
    return (await api.tickets.CreateTicket(CreateTicketRequest(ticket=ticket))).ticket


async def get_ticket(api: Api, ticket_id: str) -> r.Ticket:
    return (await api.tickets.GetTicket(GetTicketRequest(ticket_id=ticket_id))).ticket


async def update_ticket(api: Api, ticket_id: str, *, etag: str = "", **fields: Any) -> r.Ticket:
    request = UpdateTicketRequest(
        ticket=r.Ticket(id=ticket_id, etag=etag, **fields),
        update_mask=FieldMask(paths=list(fields)),
    )
    return (await api.tickets.UpdateTicket(request)).ticket


async def delete_ticket(api: Api, ticket_id: str, etag: str = "") -> None:
    await api.tickets.DeleteTicket(DeleteTicketRequest(ticket_id=ticket_id, etag=etag))
