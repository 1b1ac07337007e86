"""ChatTicketService."""

from typing import Any

import grpc.aio

from chat_ticket.v1 import chat_ticket_pb2 as pb
from chat_ticket.v1 import chat_ticket_pb2_grpc, resources_pb2
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.services.validate import LAST_ID, NO_ID, Check
from chat_ticket_svc.store import sessions, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.hub import WatchHub

Context = grpc.aio.ServicerContext[Any, Any]


class ChatTicketService(chat_ticket_pb2_grpc.ChatTicketServiceServicer):
    """See chat_ticket.proto."""

    def __init__(self, db: Database, watch_hub: WatchHub, settings: Settings):
        self._db = db
        self._watch_hub = watch_hub
        self._limits = settings.limits

    async def CreateChatTicket(
        self, request: pb.CreateChatTicketRequest, context: Context
    ) -> pb.CreateChatTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        link_id = check.new_id("chat_ticket_id", request.chat_ticket_id)
        target: str | tickets.NewTicket = ""
        match request.WhichOneof("target"):
            case "ticket_id":
                target = check.id("ticket_id", request.ticket_id)
            case "ticket":
                target = self._new_ticket(check, request.ticket)
            case None:
                check.add("target", "is required: ticket_id or ticket")
        check.done()
        link = await tickets.link(self._db, tenant_id, session_id, link_id, target)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.CreateChatTicketResponse(chat_ticket=convert.chat_ticket(link))

    def _new_ticket(self, check: Check, ticket: resources_pb2.Ticket) -> tickets.NewTicket:
        status = "open"
        if ticket.status:
            status = check.choice("ticket.status", ticket.status, convert.TICKET_STATUS)
        return tickets.NewTicket(
            id=check.new_id("ticket.id", ticket.id),
            id_is_chosen=bool(ticket.id),
            title=check.text("ticket.title", ticket.title, self._limits.title),
            status=status,
        )

    async def GetChatTicket(
        self, request: pb.GetChatTicketRequest, context: Context
    ) -> pb.GetChatTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        chat_ticket_id = check.id("chat_ticket_id", request.chat_ticket_id)
        check.done()
        link = await tickets.get_link(self._db, tenant_id, chat_ticket_id)
        return pb.GetChatTicketResponse(chat_ticket=convert.chat_ticket(link))

    async def ListChatTickets(
        self, request: pb.ListChatTicketsRequest, context: Context
    ) -> pb.ListChatTicketsResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        parent, parent_id = check.parent(request)
        of_session = parent == "session_id"
        page_size = check.page_size(request.page_size)
        after_time, after_id = paging.position(
            check, tenant_id, request, (convert.EPOCH, NO_ID), paging.time_of, paging.id_of
        )
        check.done()
        rows = await tickets.link_page(
            self._db,
            tenant_id,
            parent_id,
            of_session=of_session,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )
        if not rows and of_session:
            await sessions.get(self._db, tenant_id, parent_id)
        elif not rows:
            await tickets.get(self._db, tenant_id, parent_id)
        found, next_page_token = paging.fill(
            rows,
            page_size,
            convert.chat_ticket,
            lambda last: paging.token(tenant_id, request, last.created_at, last.id),
        )
        return pb.ListChatTicketsResponse(chat_tickets=found, next_page_token=next_page_token)

    async def DeleteChatTicket(
        self, request: pb.DeleteChatTicketRequest, context: Context
    ) -> pb.DeleteChatTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        chat_ticket_id = check.id("chat_ticket_id", request.chat_ticket_id)
        check.done()
        session_id = await tickets.unlink(self._db, tenant_id, chat_ticket_id)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatTicketResponse()

    async def GetTicket(
        self, request: pb.GetTicketRequest, context: Context
    ) -> pb.GetTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        ticket_id = check.id("ticket_id", request.ticket_id)
        check.done()
        ticket = await tickets.get(self._db, tenant_id, ticket_id)
        return pb.GetTicketResponse(ticket=convert.ticket(ticket))

    async def ListTickets(
        self, request: pb.ListTicketsRequest, context: Context
    ) -> pb.ListTicketsResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        statuses = check.choices("statuses", request.statuses, convert.TICKET_STATUS)
        page_size = check.page_size(request.page_size)
        after_time, after_id = paging.position(
            check, tenant_id, request, (paging.END_OF_TIME, LAST_ID), paging.time_of, paging.id_of
        )
        check.done()
        rows = await tickets.page(
            self._db,
            tenant_id,
            statuses=statuses,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )
        found, next_page_token = paging.fill(
            rows,
            page_size,
            convert.ticket,
            lambda last: paging.token(tenant_id, request, last.created_at, last.id),
        )
        return pb.ListTicketsResponse(tickets=found, next_page_token=next_page_token)

    async def UpdateTicket(
        self, request: pb.UpdateTicketRequest, context: Context
    ) -> pb.UpdateTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        ticket_id = check.id("ticket.id", request.ticket.id)
        named = check.mask(request.update_mask, ["title", "status"])
        title = status = None
        if "title" in named:
            title = check.text("ticket.title", request.ticket.title, self._limits.title)
        if "status" in named:
            status = check.choice("ticket.status", request.ticket.status, convert.TICKET_STATUS)
        check.done()
        ticket = await tickets.update(self._db, tenant_id, ticket_id, title=title, status=status)
        return pb.UpdateTicketResponse(ticket=convert.ticket(ticket))

    async def DeleteTicket(
        self, request: pb.DeleteTicketRequest, context: Context
    ) -> pb.DeleteTicketResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        ticket_id = check.id("ticket_id", request.ticket_id)
        check.done()
        await tickets.delete(self._db, tenant_id, ticket_id)
        return pb.DeleteTicketResponse()
