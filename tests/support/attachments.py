"""Short calls on attachments."""

from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_attachment_pb2 import (
    DeleteChatAttachmentRequest,
    GetChatAttachmentRequest,
    ListChatAttachmentsRequest,
    UpdateChatAttachmentRequest,
)
from support.client import Api


async def get_attachment(api: Api, attachment_id: str) -> r.ChatAttachment:
    request = GetChatAttachmentRequest(attachment_id=attachment_id)
    return (await api.attachments.GetChatAttachment(request)).attachment


async def update_attachment(api: Api, attachment_id: str, file_url: str) -> r.ChatAttachment:
    request = UpdateChatAttachmentRequest(
        attachment=r.ChatAttachment(id=attachment_id, file_url=file_url),
        update_mask=FieldMask(paths=["file_url"]),
    )
    return (await api.attachments.UpdateChatAttachment(request)).attachment


async def delete_attachment(api: Api, attachment_id: str) -> None:
    request = DeleteChatAttachmentRequest(attachment_id=attachment_id)
    await api.attachments.DeleteChatAttachment(request)


async def list_all_attachments(api: Api, **request: Any) -> list[r.ChatAttachment]:
    found: list[r.ChatAttachment] = []
    token = ""
    while True:
        page = await api.attachments.ListChatAttachments(
            ListChatAttachmentsRequest(**request, page_token=token)
        )
        found += page.attachments
        token = page.next_page_token
        if not token:
            return found
