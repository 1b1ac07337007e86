"""Short calls on tickets, and on their links to chat sessions."""

from typing import Any

import psycopg
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


LINK_SESSIONS = """
WITH session AS (
    INSERT INTO chat_sessions (tenant_id)
    SELECT %(tenant)s FROM generate_series(1, %(count)s) RETURNING id
)
SELECT array_agg(id) FROM session
"""


def link_sessions(database: str, tenant: str, ticket_id: str, count: int) -> list[str]:
    """Link new sessions to a ticket, as a server could which knew no limit."""
    with psycopg.connect(database) as connection:
        params = {"tenant": tenant, "ticket": ticket_id, "count": count}
        [session_ids] = connection.execute(LINK_SESSIONS, params).fetchone() or ([],)
        connection.execute(
            "INSERT INTO chat_tickets (tenant_id, session_id, ticket_id)"
            " SELECT %s, unnest(%s::uuid[]), %s",
            [tenant, session_ids, ticket_id],
        )
    return list(map(str, session_ids))
