"""Callers of tickets: they race with archiving and deleting, and change tickets of their own."""

import asyncio
import random
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import DeleteChatSessionRequest, UpdateChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateChatTicketRequest,
    DeleteChatTicketRequest,
    DeleteTicketRequest,
    UpdateTicketRequest,
)
from faults.record import Outcome, Write

MOST_CHANGES = 4  # of one ticket
STATUSES = (
    r.TICKET_STATUS_OPEN,
    r.TICKET_STATUS_PENDING,
    r.TICKET_STATUS_SOLVED,
    r.TICKET_STATUS_CLOSED,
)

# Calls a write of this kind until its outcome is known: kind, tenant, session, request, server.
Done = Callable[[str, str, str, Any, int], Awaitable[Write]]


async def race(done: Done, tenant: str, session_id: str, chance: random.Random) -> None:
    """A ticket, archiving and deleting race for a session that nobody else has."""
    archive = UpdateChatSessionRequest(
        session=r.ChatSession(id=session_id, status=r.CHAT_SESSION_STATUS_ARCHIVED),
        update_mask=FieldMask(paths=["status"]),
    )
    races: list[tuple[str, Any]] = [
        ("CreateChatTicket", _new(tenant, session_id)),
        ("UpdateChatSession", archive),
        ("DeleteChatSession", DeleteChatSessionRequest(session_id=session_id)),
    ]
    chance.shuffle(races)
    await asyncio.gather(
        *(
            done(kind, tenant, session_id, request, number)
            for number, (kind, request) in enumerate(races[: chance.randint(2, 3)])
        )
    )


async def change(done: Done, tenant: str, session_id: str, chance: random.Random) -> None:
    """A ticket of a session that nobody else has is changed, and perhaps unlinked and deleted.

    Each call is made when the outcome of the one before is known.
    """
    new = _new(tenant, session_id)
    calls: list[tuple[str, Any]] = [("CreateChatTicket", new)]
    for number in range(chance.randint(1, MOST_CHANGES)):
        ticket = r.Ticket(
            id=new.ticket.id, title=f"{number} of {tenant}", status=chance.choice(STATUSES)
        )
        mask = FieldMask(paths=["title", "status"])
        calls.append(("UpdateTicket", UpdateTicketRequest(ticket=ticket, update_mask=mask)))
    if chance.random() < 0.5:
        unlink = DeleteChatTicketRequest(chat_ticket_id=new.chat_ticket_id, allow_missing=True)
        calls.append(("DeleteChatTicket", unlink))
        if chance.random() < 0.5:
            delete = DeleteTicketRequest(ticket_id=new.ticket.id, allow_missing=True)
            calls.append(("DeleteTicket", delete))
    for number, (kind, request) in enumerate(calls):
        write = await done(kind, tenant, session_id, request, number)
        if write.outcome is not Outcome.ACKNOWLEDGED:
            return


def _new(tenant: str, session_id: str) -> CreateChatTicketRequest:
    return CreateChatTicketRequest(
        session_id=session_id,
        chat_ticket_id=str(uuid.uuid4()),
        ticket=r.Ticket(id=str(uuid.uuid4()), title=f"help {tenant}"),
    )
