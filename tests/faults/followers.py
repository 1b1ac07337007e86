"""Followers of a session and of the feed that keep their position, and do what its loss asks for.

They read raw streams, and hold what a caller would hold. So what they hold in the end can be
compared with the database, whatever has happened to its history.
"""

from typing import Any, Protocol

import grpc.aio
from google.rpc import error_details_pb2 as details_pb2
from grpc import StatusCode
from support.client import Api
from support.messages import batches, get_message
from support.sessions import get_session

from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import (
    ListChatSessionsRequest,
    WatchChatSessionRequest,
    WatchChatSessionsRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import GetTicketRequest, ListTicketsRequest
from faults.record import info_of

STREAM_SECONDS = 3600


class Follower(Protocol):
    """What a run does with every follower."""

    is_caught_up: bool

    async def stream(self, api: Api) -> None:
        """Follow until the stream ends. Raises its error, except for HISTORY_CHANGED."""

    async def differences(self, api: Api) -> list[str]:
        """What it holds that is not so, and what it lacks."""


class SessionFollower:
    """A follower of a session, which keeps the epoch of its revision."""

    def __init__(self, session_id: str):
        self.session_id = session_id
        self.revision = 0
        self.epoch = ""
        self.session = r.ChatSession()
        self.messages: dict[str, r.ChatMessage] = {}
        self.is_caught_up = False
        # The position at each HISTORY_CHANGED, and the revision that it named.
        self.lost_positions: list[tuple[int, int]] = []
        self.repeats: list[str] = []  # what came although it was before the position
        self._deleted: dict[str, int] = {}  # ids of messages, with a revision by which they were

    async def stream(self, api: Api) -> None:
        await self._stream(api, until_caught_up=False)

    async def catch_up(self, api: Api) -> None:
        """Resume, go back if that is asked for, and follow to `caught_up`."""
        self.is_caught_up = False
        while not self.is_caught_up:
            await self._stream(api, until_caught_up=True)

    async def _stream(self, api: Api, *, until_caught_up: bool) -> None:
        self.is_caught_up = False
        resumed_after = self.revision
        call = api.sessions.WatchChatSession(
            WatchChatSessionRequest(
                session_id=self.session_id, after_revision=self.revision, epoch=self.epoch
            ),
            timeout=STREAM_SECONDS,
        )
        try:
            async for event in call:
                self._apply(event, resumed_after)
                if self.is_caught_up and until_caught_up:
                    return
        except grpc.aio.AioRpcError as error:
            info = info_of(error)
            if info.reason != "HISTORY_CHANGED":
                raise
            await self._go_back(api, info)
        finally:
            call.cancel()

    def _apply(self, event: Any, resumed_after: int) -> None:
        kind = event.WhichOneof("event")
        match kind:
            case "session":
                self.session = event.session
            case "messages_created":
                for message in event.messages_created.messages:
                    if message.sequence <= resumed_after or message.id in self.messages:
                        self.repeats.append(f"message {message.id} at {message.sequence}")
                    self.messages[message.id] = message
                    self._deleted.pop(message.id, None)
            case "message_updated":
                message = event.message_updated
                if message.revision <= resumed_after:
                    self.repeats.append(f"update of {message.id} at {message.revision}")
                self.messages[message.id] = message
            case "message_deleted":
                self.messages.pop(event.message_deleted.message_id, None)
                self._deleted[event.message_deleted.message_id] = event.revision
            case "caught_up":
                self.is_caught_up = True
        self.revision, self.epoch = event.revision, event.epoch

    async def _go_back(self, api: Api, info: details_pb2.ErrorInfo) -> None:
        """Forget what came after the shared revision, and read again what had changed after it."""
        shared = int(info.metadata["revision"])
        again = [id_ for id_, revision in self._deleted.items() if revision > shared]
        for message in list(self.messages.values()):
            if message.revision > shared:
                if message.sequence <= shared:
                    again.append(message.id)
                else:
                    del self.messages[message.id]
        read = {id_: await self._read(api, id_) for id_ in again}
        # Nothing is changed before all has been read: the reads may fail, and are made again.
        for id_, message in read.items():
            self.messages.pop(id_, None)
            if message is None:
                continue
            self._deleted.pop(id_, None)
            if message.sequence <= shared:
                self.messages[id_] = message
        self.lost_positions.append((self.revision, shared))
        self.revision, self.epoch = shared, info.metadata["epoch"]

    async def _read(self, api: Api, message_id: str) -> r.ChatMessage | None:
        try:
            return await get_message(api, message_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is StatusCode.NOT_FOUND:
                return None
            raise

    async def differences(self, api: Api) -> list[str]:
        session = await get_session(api, self.session_id)
        found = {
            message.id: message
            for batch in await batches(api, self.session_id)
            for message in batch.messages
        }
        different = _different("message", self.messages, found)
        if self.revision != session.revision:
            different.append(f"revision {self.revision} of {session.revision}")
        for name in ("status", "has_ticket", "title", "labels"):
            if getattr(self.session, name) != getattr(session, name):
                different.append(f"session {session.id} has another {name}")
        return different


class FeedFollower:
    """A follower of the feed of a tenant, which keeps its cursor."""

    def __init__(self) -> None:
        self.cursor = ""
        self.sessions: dict[str, r.ChatSession] = {}
        self.tickets: dict[str, r.Ticket] = {}
        self.is_caught_up = False
        self.lost_positions = 0  # HISTORY_CHANGED
        self._deleted: set[str] = set()
        self._deleted_tickets: set[str] = set()

    async def stream(self, api: Api) -> None:
        await self._stream(api, until_caught_up=False)

    async def catch_up(self, api: Api) -> None:
        """Resume, go back if that is asked for, and follow to `caught_up`."""
        self.is_caught_up = False
        while not self.is_caught_up:
            await self._stream(api, until_caught_up=True)

    async def _stream(self, api: Api, *, until_caught_up: bool) -> None:
        self.is_caught_up = False
        call = api.sessions.WatchChatSessions(
            WatchChatSessionsRequest(cursor=self.cursor, from_beginning=not self.cursor),
            timeout=STREAM_SECONDS,
        )
        try:
            async for response in call:
                for event in response.events:
                    self._apply(event)
                self.cursor = response.cursor
                if self.is_caught_up and until_caught_up:
                    return
        except grpc.aio.AioRpcError as error:
            info = info_of(error)
            if info.reason != "HISTORY_CHANGED":
                raise
            await self._go_back(api, info)
        finally:
            call.cancel()

    def _apply(self, event: Any) -> None:
        match event.WhichOneof("event"):
            case "session":
                self.sessions[event.session.id] = event.session
                self._deleted.discard(event.session.id)
            case "session_deleted":
                self.sessions.pop(event.session_deleted.session_id, None)
                self._deleted.add(event.session_deleted.session_id)
            case "ticket":
                self.tickets[event.ticket.id] = event.ticket
                self._deleted_tickets.discard(event.ticket.id)
            case "ticket_deleted":
                self.tickets.pop(event.ticket_deleted.ticket_id, None)
                self._deleted_tickets.add(event.ticket_deleted.ticket_id)
            case "caught_up":
                self.is_caught_up = True

    async def _go_back(self, api: Api, info: details_pb2.ErrorInfo) -> None:
        """Read again all that was told, and go on after the cursor of the error."""
        sessions, tickets = {}, {}
        for id_ in self.sessions.keys() | self._deleted:
            try:
                sessions[id_] = await get_session(api, id_)
            except grpc.aio.AioRpcError as error:
                if error.code() is not StatusCode.NOT_FOUND:
                    raise
        for id_ in self.tickets.keys() | self._deleted_tickets:
            try:
                found = await api.tickets.GetTicket(GetTicketRequest(ticket_id=id_))
                tickets[id_] = found.ticket
            except grpc.aio.AioRpcError as error:
                if error.code() is not StatusCode.NOT_FOUND:
                    raise
        self.sessions, self.tickets = sessions, tickets
        self.cursor = info.metadata["cursor"]
        self.lost_positions += 1

    async def differences(self, api: Api) -> list[str]:
        return [
            *_different("session", self.sessions, await _all_sessions(api)),
            *_different("ticket", self.tickets, await _all_tickets(api)),
        ]


def _different(kind: str, held: dict[str, Any], found: dict[str, Any]) -> list[str]:
    return [
        f"{kind} {id_} is {'another' if id_ in held and id_ in found else 'held'}"
        if id_ in held
        else f"{kind} {id_} is missing"
        for id_ in held.keys() | found.keys()
        if held.get(id_) != found.get(id_)
    ]


async def _all_sessions(api: Api) -> dict[str, r.ChatSession]:
    request, found = ListChatSessionsRequest(page_size=500), {}
    while True:
        page = await api.sessions.ListChatSessions(request)
        found |= {session.id: session for session in page.sessions}
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _all_tickets(api: Api) -> dict[str, r.Ticket]:
    request, found = ListTicketsRequest(page_size=500), {}
    while True:
        page = await api.tickets.ListTickets(request)
        found |= {ticket.id: ticket for ticket in page.tickets}
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token
