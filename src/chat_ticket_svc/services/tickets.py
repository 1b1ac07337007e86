"""ChatTicketService."""

from typing import Any

import grpc.aio

from chat_ticket.v1 import chat_ticket_pb2 as pb
from chat_ticket.v1 import chat_ticket_pb2_grpc, resources_pb2
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.services.validate import MAX_UUID, NIL_UUID, Validator
from chat_ticket_svc.store import sessions, ticket_listing, ticket_update, tickets
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.hub import WatchHub

Context = grpc.aio.ServicerContext[Any, Any]


class ChatTicketService(chat_ticket_pb2_grpc.ChatTicketServiceServicer):
    """Implements chat_ticket.proto, which documents each method."""

    def __init__(self, db: Database, watch_hub: WatchHub, settings: Settings):
        self._db = db
        self._watch_hub = watch_hub
        self._limits = settings.limits

    async def CreateChatTicket(
        self, request: pb.CreateChatTicketRequest, context: Context
    ) -> pb.CreateChatTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        chat_ticket_id = validator.new_id("chat_ticket_id", request.chat_ticket_id)
        target: str | tickets.NewTicket = ""
        match validator.one_of(request, "target"):
            case "ticket_id":
                target = validator.id("ticket_id", request.ticket_id)
            case "ticket":
                target = self._new_ticket(validator, request.ticket)
        expected_revision = validator.expected_revision(request)
        validator.raise_if_invalid()
        if not request.chat_ticket_id and not request.ticket.id:
            # With this id a repeated call is recognised, whatever the ticket's own id.
            request_context.set_not_repeatable(chat_ticket_id=chat_ticket_id)
        chat_ticket = await tickets.link(
            self._db, tenant_id, session_id, chat_ticket_id, target, expected_revision
        )
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.CreateChatTicketResponse(chat_ticket=convert.chat_ticket(chat_ticket))

    def _new_ticket(self, validator: Validator, ticket: resources_pb2.Ticket) -> tickets.NewTicket:
        status = "open"
        if ticket.status:
            status = validator.enum("ticket.status", ticket.status, convert.TICKET_STATUS)
        return tickets.NewTicket(
            id=validator.new_id("ticket.id", ticket.id),
            has_client_id=bool(ticket.id),
            title=validator.single_line("ticket.title", ticket.title, self._limits.title),
            status=status,
            external_ref=validator.reference("ticket.external_ref", ticket.external_ref),
        )

    async def GetChatTicket(
        self, request: pb.GetChatTicketRequest, context: Context
    ) -> pb.GetChatTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        chat_ticket_id = validator.id("chat_ticket_id", request.chat_ticket_id)
        validator.raise_if_invalid()
        chat_ticket = await tickets.get_chat_ticket(self._db, tenant_id, chat_ticket_id)
        return pb.GetChatTicketResponse(chat_ticket=convert.chat_ticket(chat_ticket))

    async def ListChatTickets(
        self, request: pb.ListChatTicketsRequest, context: Context
    ) -> pb.ListChatTicketsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        parent, parent_id = validator.parent(request)
        of_session = parent == "session_id"
        page_size = validator.page_size(request.page_size)
        after_time, after_id = paging.decode_token(
            validator,
            tenant_id,
            request,
            (convert.EPOCH, NIL_UUID),
            paging.parse_time,
            paging.parse_id,
        )
        validator.raise_if_invalid()
        rows = await tickets.chat_ticket_page(
            self._db,
            tenant_id,
            parent_id,
            of_session=of_session,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )
        # An empty list is an answer only when its parent exists.
        if not rows and of_session:
            await sessions.get(self._db, tenant_id, parent_id)
        elif not rows:
            await tickets.get(self._db, tenant_id, parent_id)
        page, next_page_token = paging.fill_page(
            rows,
            page_size,
            convert.chat_ticket,
            lambda last: paging.encode_token(tenant_id, request, last.created_at, last.id),
        )
        return pb.ListChatTicketsResponse(chat_tickets=page, next_page_token=next_page_token)

    async def DeleteChatTicket(
        self, request: pb.DeleteChatTicketRequest, context: Context
    ) -> pb.DeleteChatTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        chat_ticket_id = validator.id("chat_ticket_id", request.chat_ticket_id)
        validator.raise_if_invalid()
        session_id = await tickets.unlink(
            self._db, tenant_id, chat_ticket_id, allow_missing=request.allow_missing
        )
        if session_id is not None:
            self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatTicketResponse()

    async def CreateTicket(
        self, request: pb.CreateTicketRequest, context: Context
    ) -> pb.CreateTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        new = self._new_ticket(validator, request.ticket)
        validator.raise_if_invalid()
        if not new.has_client_id:
            request_context.set_not_repeatable(ticket_id=new.id)
        ticket = await tickets.create(self._db, tenant_id, new)
        self._watch_hub.notify_changed(tenant_id, ticket.id)
        return pb.CreateTicketResponse(ticket=convert.ticket(ticket))

    async def GetTicket(
        self, request: pb.GetTicketRequest, context: Context
    ) -> pb.GetTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        ticket_id = validator.id("ticket_id", request.ticket_id)
        validator.raise_if_invalid()
        ticket = await tickets.get(self._db, tenant_id, ticket_id)
        return pb.GetTicketResponse(ticket=convert.ticket(ticket))

    async def ListTickets(
        self, request: pb.ListTicketsRequest, context: Context
    ) -> pb.ListTicketsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        filters = ticket_listing.Filter(
            statuses=validator.enum_filter("statuses", request.statuses, convert.TICKET_STATUS),
            external_ref=validator.reference("external_ref", request.external_ref),
            updated_from=validator.start_time("start_update_time", request),
            updated_to=validator.end_time("end_update_time", request),
        )
        page_size = validator.page_size(request.page_size)
        after_time, after_id = paging.decode_token(
            validator,
            tenant_id,
            request,
            (paging.END_OF_TIME, MAX_UUID),
            paging.parse_time,
            paging.parse_id,
        )
        validator.raise_if_invalid()
        rows = await ticket_listing.page(
            self._db,
            tenant_id,
            filters,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )
        page, next_page_token = paging.fill_page(
            rows,
            page_size,
            convert.ticket,
            lambda last: paging.encode_token(tenant_id, request, last.created_at, last.id),
        )
        return pb.ListTicketsResponse(tickets=page, next_page_token=next_page_token)

    async def UpdateTicket(
        self, request: pb.UpdateTicketRequest, context: Context
    ) -> pb.UpdateTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        ticket_id = validator.id("ticket.id", request.ticket.id)
        etag = validator.etag("ticket.etag", request.ticket.etag)
        named = validator.update_mask(request.update_mask, ["title", "status", "external_ref"])
        changes: dict[str, Any] = {}
        if "title" in named:
            changes["title"] = validator.single_line(
                "ticket.title", request.ticket.title, self._limits.title
            )
        if "status" in named:
            changes["status"] = validator.enum(
                "ticket.status", request.ticket.status, convert.TICKET_STATUS
            )
        if "external_ref" in named:
            changes["external_ref"] = validator.reference(
                "ticket.external_ref", request.ticket.external_ref
            )
        validator.raise_if_invalid()
        if etag is not None:
            # Repeated after its own success, the call meets a revision that is not its etag.
            request_context.set_not_repeatable()
        ticket, changed_sessions = await ticket_update.update(
            self._db, tenant_id, ticket_id, changes, etag
        )
        for changed_id in (ticket_id, *changed_sessions):
            self._watch_hub.notify_changed(tenant_id, changed_id)
        return pb.UpdateTicketResponse(ticket=convert.ticket(ticket))

    async def DeleteTicket(
        self, request: pb.DeleteTicketRequest, context: Context
    ) -> pb.DeleteTicketResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        ticket_id = validator.id("ticket_id", request.ticket_id)
        etag = validator.etag("etag", request.etag)
        validator.raise_if_invalid()
        await tickets.delete(
            self._db, tenant_id, ticket_id, etag, allow_missing=request.allow_missing
        )
        self._watch_hub.notify_changed(tenant_id, ticket_id)
        return pb.DeleteTicketResponse()
