"""Short calls on chat messages."""

from typing import Any

import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    DeleteChatMessageRequest,
    GetChatMessageRequest,
    ListChatMessagesRequest,
    ListChatMessagesResponse,
    RedactChatMessageRequest,
    UpdateChatMessageRequest,
)
from support.client import Api

USER = r.CHAT_MESSAGE_ROLE_USER
ASSISTANT = r.CHAT_MESSAGE_ROLE_ASSISTANT
KIB = 1024


async def get_message(api: Api, message_id: str) -> r.ChatMessage:
    response = await api.messages.GetChatMessage(GetChatMessageRequest(message_id=message_id))
    return response.message


async def create_batch(
    api: Api, session_id: str, messages: list[r.ChatMessage], **fields: Any
) -> list[tuple[str, int]]:
    """Create a batch; returns the id and sequence of each message."""
    request = BatchCreateChatMessagesRequest(session_id=session_id, messages=messages, **fields)
    response = await api.messages.BatchCreateChatMessages(request)
    return [(message.id, message.sequence) for message in response.messages]


async def set_metadata(
    api: Api, message_id: str, metadata: str, *, etag: str = "", **fields: Any
) -> r.ChatMessage:
    request = UpdateChatMessageRequest(
        message=r.ChatMessage(id=message_id, metadata_json=metadata, etag=etag),
        update_mask=FieldMask(paths=["metadata_json"]),
        **fields,
    )
    return (await api.messages.UpdateChatMessage(request)).message


async def redact_message(api: Api, message_id: str, etag: str = "") -> r.ChatMessage:
    request = RedactChatMessageRequest(message_id=message_id, etag=etag)
    return (await api.messages.RedactChatMessage(request)).message


async def merge_metadata(
    api: Api, message_id: str, patch: str, *, etag: str = "", **fields: Any
) -> r.ChatMessage:
    request = UpdateChatMessageRequest(
        message=r.ChatMessage(id=message_id, etag=etag), metadata_merge_json=patch, **fields
    )
    return (await api.messages.UpdateChatMessage(request)).message


async def delete_message(api: Api, message_id: str, **fields: Any) -> None:
    await api.messages.DeleteChatMessage(DeleteChatMessageRequest(message_id=message_id, **fields))


def user_message(content: str, **fields: object) -> r.ChatMessage:
    return r.ChatMessage(content=content, role=USER, **fields)  # type: ignore[arg-type]


async def batches(api: Api, session_id: str, **fields: Any) -> list[ListChatMessagesResponse]:
    request = ListChatMessagesRequest(session_id=session_id, **fields)
    return [response async for response in api.messages.ListChatMessages(request)]


async def sequences(api: Api, session_id: str, **fields: Any) -> list[int]:
    return [
        message.sequence
        for response in await batches(api, session_id, **fields)
        for message in response.messages
    ]


async def read_rest(call: Any) -> list[ListChatMessagesResponse]:
    """What is still to be read of a call."""
    responses = []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
    return responses


async def session_with_messages(api: Api, count: int, content: str = "x", **fields: Any) -> str:
    """A session with `count` messages, users and assistants in turn; returns its id."""
    session = await api.session()
    messages = [
        r.ChatMessage(content=content, role=ASSISTANT if n % 2 else USER, **fields)
        for n in range(count)
    ]
    for start in range(0, count, 500):
        request = BatchCreateChatMessagesRequest(
            session_id=session.id, messages=messages[start : start + 500]
        )
        await api.messages.BatchCreateChatMessages(request)
    return session.id
