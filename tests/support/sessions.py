"""Short calls on chat sessions."""

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio
from google.protobuf.field_mask_pb2 import FieldMask

from chat_ticket.v1 import chat_session_pb2, chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import (
    DeleteChatSessionRequest,
    GetChatSessionRequest,
    ListChatSessionsRequest,
    UpdateChatSessionRequest,
)
from support.client import Api

ACTIVE = r.CHAT_SESSION_STATUS_ACTIVE
RESOLVED = r.CHAT_SESSION_STATUS_RESOLVED
ARCHIVED = r.CHAT_SESSION_STATUS_ARCHIVED


async def get_session(api: Api, session_id: str) -> r.ChatSession:
    response = await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
    return response.session


async def set_status(api: Api, session_id: str, status: int, etag: str = "") -> r.ChatSession:
    request = UpdateChatSessionRequest(
        session=r.ChatSession(id=session_id, status=status, etag=etag),
        update_mask=FieldMask(paths=["status"]),
    )
    return (await api.sessions.UpdateChatSession(request)).session


async def update_session(api: Api, session_id: str, *paths: str, **fields: Any) -> r.ChatSession:
    """Set these fields of a session: those that the paths name."""
    request = UpdateChatSessionRequest(
        session=r.ChatSession(id=session_id, **fields), update_mask=FieldMask(paths=paths)
    )
    return (await api.sessions.UpdateChatSession(request)).session


async def list_all_ids(api: Api, request: ListChatSessionsRequest) -> list[str]:
    """The ids on all pages of a list."""
    ids = []
    while True:
        page = await api.sessions.ListChatSessions(request)
        ids += [session.id for session in page.sessions]
        if not page.next_page_token:
            return ids
        request.page_token = page.next_page_token


async def delete_session(api: Api, session_id: str) -> None:
    await api.sessions.DeleteChatSession(DeleteChatSessionRequest(session_id=session_id))


async def get_revision(api: Api, session_id: str) -> int:
    response = await api.sessions.GetChatSession(GetChatSessionRequest(session_id=session_id))
    return response.session.revision


def create_session_at(address: str) -> None:
    """Create a session of tenant t."""
    with grpc.insecure_channel(address) as channel:
        chat_session_pb2_grpc.ChatSessionServiceStub(channel).CreateChatSession(
            chat_session_pb2.CreateChatSessionRequest(), metadata=[("x-tenant-id", "t")], timeout=10
        )


def list_sessions_at(address: str) -> list[str]:
    with grpc.insecure_channel(address) as channel:
        page = chat_session_pb2_grpc.ChatSessionServiceStub(channel).ListChatSessions(
            chat_session_pb2.ListChatSessionsRequest(), metadata=[("x-tenant-id", "t")], timeout=10
        )
    return [session.id for session in page.sessions]


async def list_sessions(api: Api) -> Any:
    return await api.sessions.ListChatSessions(ListChatSessionsRequest())


async def create_session_when_possible(api: Api) -> r.ChatSession:
    """A session, as soon as one can be created."""
    async with asyncio.timeout(15):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                return await api.session()
            await asyncio.sleep(0.1)
