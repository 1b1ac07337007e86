"""Watches of a session, and the state that a client builds from their events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_message_pb2 import GetChatMessageRequest
from chat_ticket.v1.chat_session_pb2 import (
    WatchChatSessionRequest,
    WatchChatSessionResponse,
)
from support.client import Api
from support.sessions import get_session

Event = WatchChatSessionResponse


class Watcher:
    """A stream, and the state that a client builds from its events."""

    def __init__(self, call: Any):
        self._call = call
        self.kinds: list[str] = []
        self.revision = -1
        self.session: r.ChatSession | None = None
        self.created: list[int] = []
        self.messages: dict[str, r.ChatMessage] = {}

    async def next(self, timeout: float = 10) -> Event:
        """The next event, applied."""
        async with asyncio.timeout(timeout):
            event = await self._call.read()
        assert event is not grpc.aio.EOF, "the stream has ended"
        kind = event.WhichOneof("event")
        self.kinds.append(kind)
        assert event.revision >= self.revision, "positions never go back"
        self.revision = event.revision
        match kind:
            case "session":
                self.session = event.session
            case "messages_created":
                for message in event.messages_created.messages:
                    self.created.append(message.sequence)
                    self.messages[message.id] = message
            case "message_updated":
                assert event.message_updated.id in self.messages
                self.messages[event.message_updated.id] = event.message_updated
            case "message_deleted":
                self.messages.pop(event.message_deleted.message_id, None)
        return event

    async def until(self, kind: str) -> Event:
        while True:
            event = await self.next()
            if event.WhichOneof("event") == kind:
                return event

    async def until_revision(self, revision: int) -> None:
        while self.revision < revision:
            await self.next()

    async def end(self) -> None:
        """Read to the end of the stream."""
        while (await self._call.read()) is not grpc.aio.EOF:
            pass


@contextlib.asynccontextmanager
async def watching(api: Api, session_id: str, after: int = 0) -> AsyncIterator[Watcher]:
    call = api.sessions.WatchChatSession(
        WatchChatSessionRequest(session_id=session_id, after_revision=after)
    )
    try:
        yield Watcher(call)
    finally:
        call.cancel()


async def assert_same_state(api: Api, watcher: Watcher, session_id: str) -> None:
    """A watcher at the session's revision holds the session's state."""
    session = await get_session(api, session_id)
    assert watcher.revision == session.revision
    assert watcher.session is not None
    assert watcher.session.status == session.status
    assert watcher.session.has_ticket == session.has_ticket
    assert watcher.created == sorted(set(watcher.created)), "once each, in order"
    for message_id, message in watcher.messages.items():
        request = GetChatMessageRequest(message_id=message_id)
        assert (await api.messages.GetChatMessage(request)).message == message
