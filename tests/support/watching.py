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
from chat_ticket.v1.chat_ticket_pb2 import ListChatTicketsRequest
from support.client import Api
from support.sessions import get_session

Event = WatchChatSessionResponse
DRAFT_EVENTS = ("draft", "draft_appended", "draft_ended")


class Watcher:
    """A stream, and the state that a client builds from its events."""

    def __init__(self, call: Any):
        self._call = call
        self.kinds: list[str] = []
        self.revision = -1
        self.epoch = ""
        self.session: r.ChatSession | None = None
        self.ticket = r.ChatTicket()  # without any field set while there is none
        self.created: list[int] = []
        self.messages: dict[str, r.ChatMessage] = {}
        # The content of the open drafts, and of those that have ended as they stood then.
        self.drafts: dict[str, bytes] = {}
        self.ended_drafts: dict[str, bytes] = {}
        self._last: Event = Event()

    def resume(self, stream: "Watcher") -> None:
        """Go on with another stream, which sends all open drafts again."""
        self._call = stream._call
        self.drafts.clear()
        self.ended_drafts.clear()

    async def next(self, timeout: float = 10) -> Event:
        """The next event, applied."""
        async with asyncio.timeout(timeout):
            event = await self._call.read()
        assert event is not grpc.aio.EOF, "the stream has ended"
        kind = event.WhichOneof("event")
        self.kinds.append(kind)
        assert event.revision >= self.revision, "positions never go back"
        if kind in DRAFT_EVENTS:
            assert event.revision == self.revision, "drafts have no position of their own"
        assert event.epoch, "every position has one"
        self.revision, self.epoch = event.revision, event.epoch
        last, self._last = self._last, event
        match kind:
            case "session":
                assert event.session.epoch == event.epoch.partition("--")[0]
                self.session = event.session
            case "ticket":
                assert self.kinds[-2] == "session" or event.ticket != self.ticket
                self.ticket = event.ticket
            case "messages_created":
                for n, message in enumerate(event.messages_created.messages):
                    assert message.id not in self.drafts, "a draft ends before its message comes"
                    if message.id in self.ended_drafts:
                        assert n == 0, "the message of a draft is the first of its event"
                        assert last.draft_ended.draft_id == message.id, "nothing comes between"
                        assert message.content.encode().startswith(self.ended_drafts[message.id])
                    self.created.append(message.sequence)
                    self.messages[message.id] = message
            case "message_updated":
                assert event.message_updated.id in self.messages
                self.messages[event.message_updated.id] = event.message_updated
            case "message_deleted":
                assert event.message_deleted.message_id not in self.drafts
                self.messages.pop(event.message_deleted.message_id, None)
            case "session_deleted":
                assert not self.drafts
            case "draft":
                draft = event.draft
                assert draft.id not in self.messages, "it is a message already"
                assert draft.length == len(draft.content.encode())
                self.drafts[draft.id] = draft.content.encode()
            case "draft_appended":
                appended = event.draft_appended
                assert appended.text
                assert appended.offset == len(self.drafts[appended.draft_id]), "no gap, no repeat"
                self.drafts[appended.draft_id] += appended.text.encode()
            case "draft_ended":
                draft_id = event.draft_ended.draft_id
                self.ended_drafts[draft_id] = self.drafts.pop(draft_id)
        return event

    async def until(self, kind: str) -> Event:
        while True:
            event = await self.next()
            if event.WhichOneof("event") == kind:
                return event

    async def until_draft(self, draft_id: str, text: str) -> None:
        """Read until this is the content of a draft."""
        while self.drafts.get(draft_id) != text.encode():
            await self.next()

    async def until_revision(self, revision: int) -> None:
        while self.revision < revision:
            await self.next()

    async def end(self) -> None:
        """Read to the end of the stream."""
        while (await self._call.read()) is not grpc.aio.EOF:
            pass


@contextlib.asynccontextmanager
async def watching(
    api: Api, session_id: str, after: int = 0, *, epoch: str = "", include_drafts: bool = False
) -> AsyncIterator[Watcher]:
    call = api.sessions.WatchChatSession(
        WatchChatSessionRequest(
            session_id=session_id,
            after_revision=after,
            epoch=epoch,
            include_drafts=include_drafts,
        )
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
    tickets = await api.tickets.ListChatTickets(ListChatTicketsRequest(session_id=session_id))
    assert [watcher.ticket][: session.has_ticket] == list(tickets.chat_tickets)
    assert session.has_ticket or watcher.ticket == r.ChatTicket()
    assert watcher.created == sorted(set(watcher.created)), "once each, in order"
    for message_id, message in watcher.messages.items():
        request = GetChatMessageRequest(message_id=message_id)
        assert (await api.messages.GetChatMessage(request)).message == message


@contextlib.asynccontextmanager
async def following(api: Api, session_id: str, after: int = 0) -> AsyncIterator[Watcher]:
    """A watch with drafts that has caught up."""
    async with watching(api, session_id, after, include_drafts=True) as watcher:
        await watcher.until("caught_up")
        yield watcher
