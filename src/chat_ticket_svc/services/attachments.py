"""ChatAttachmentService."""

from typing import TYPE_CHECKING, Any

import grpc.aio

from chat_ticket.v1 import chat_attachment_pb2 as pb
from chat_ticket.v1 import chat_attachment_pb2_grpc
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import attachment_access, convert, paging
from chat_ticket_svc.services.validate import NIL_UUID, Validator
from chat_ticket_svc.store import attachments, messages, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.hub import WatchHub

if TYPE_CHECKING:  # imported at run time only when URLs are checked
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

Context = grpc.aio.ServicerContext[Any, Any]


class ChatAttachmentService(chat_attachment_pb2_grpc.ChatAttachmentServiceServicer):
    """Implements chat_attachment.proto, which documents each method."""

    def __init__(
        self,
        db: Database,
        watch_hub: WatchHub,
        url_checker: "AttachmentUrlChecker | None",
        settings: Settings,
    ):
        self._db = db
        self._watch_hub = watch_hub
        self._url_checker = url_checker
        self._limits = settings.limits
        self._url_schemes = settings.attachment_url_schemes

    async def CreateChatAttachment(
        self, request: pb.CreateChatAttachmentRequest, context: Context
    ) -> pb.CreateChatAttachmentResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits, self._url_schemes)
        message_id = validator.id("message_id", request.message_id)
        new = validator.new_attachment("attachment", request.attachment)
        validator.raise_if_invalid()
        if not new.has_client_id:
            request_context.set_not_repeatable(attachment_id=new.id)
        attachment = await attachment_access.find_stored_or_check_urls(
            self._url_checker,
            tenant_id,
            [new.file_url],
            lambda: attachments.find_repeat(self._db, tenant_id, message_id, new),
        )
        if attachment is None:
            attachment, session_id = await attachments.create(
                self._db, tenant_id, message_id, new, limit=self._limits.attachments
            )
            self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.CreateChatAttachmentResponse(attachment=convert.attachment(attachment))

    async def GetChatAttachment(
        self, request: pb.GetChatAttachmentRequest, context: Context
    ) -> pb.GetChatAttachmentResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        attachment_id = validator.id("attachment_id", request.attachment_id)
        validator.raise_if_invalid()
        attachment = await attachments.get(self._db, tenant_id, attachment_id)
        return pb.GetChatAttachmentResponse(attachment=convert.attachment(attachment))

    async def ListChatAttachments(
        self, request: pb.ListChatAttachmentsRequest, context: Context
    ) -> pb.ListChatAttachmentsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        parent, parent_id = validator.parent(request)
        of_session = parent == "session_id"
        page_size = validator.page_size(request.page_size)
        after_sequence, after_time, after_id = paging.decode_token(
            validator,
            tenant_id,
            request,
            (0, convert.EPOCH, NIL_UUID),
            paging.parse_integer,
            paging.parse_time,
            paging.parse_id,
        )
        validator.raise_if_invalid()
        rows = await attachments.page(
            self._db,
            tenant_id,
            parent_id,
            of_session=of_session,
            after_sequence=after_sequence,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )
        # An empty list is an answer only when its parent exists.
        if not rows and of_session:
            await sessions.get(self._db, tenant_id, parent_id)
        elif not rows:
            await messages.get(self._db, tenant_id, parent_id)

        def token(last: attachments.SequencedAttachment) -> str:
            attachment = last.attachment
            return paging.encode_token(
                tenant_id, request, last.sequence, attachment.created_at, attachment.id
            )

        page, next_page_token = paging.fill_page(
            rows, page_size, lambda placed: convert.attachment(placed.attachment), token
        )
        return pb.ListChatAttachmentsResponse(attachments=page, next_page_token=next_page_token)

    async def UpdateChatAttachment(
        self, request: pb.UpdateChatAttachmentRequest, context: Context
    ) -> pb.UpdateChatAttachmentResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits, self._url_schemes)
        attachment_id = validator.id("attachment.id", request.attachment.id)
        file_url = ""
        if "file_url" in validator.update_mask(request.update_mask, ["file_url"]):
            file_url = validator.file_url("attachment.file_url", request.attachment.file_url)
        validator.raise_if_invalid()
        attachment = await attachment_access.find_stored_or_check_urls(
            self._url_checker,
            tenant_id,
            [file_url],
            lambda: attachments.find_with_url(self._db, tenant_id, attachment_id, file_url),
        )
        if attachment is None:
            attachment, session_id = await attachments.set_url(
                self._db, tenant_id, attachment_id, file_url
            )
            self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.UpdateChatAttachmentResponse(attachment=convert.attachment(attachment))

    async def DeleteChatAttachment(
        self, request: pb.DeleteChatAttachmentRequest, context: Context
    ) -> pb.DeleteChatAttachmentResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        attachment_id = validator.id("attachment_id", request.attachment_id)
        validator.raise_if_invalid()
        session_id = await attachments.delete(
            self._db, tenant_id, attachment_id, allow_missing=request.allow_missing
        )
        if session_id is not None:
            self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatAttachmentResponse()
