"""Followers of a session and of the feed that keep their position, and do what its loss asks for.

They hold what a caller would hold. So that can be compared with the database in the end, whatever
has happened to its history.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import grpc.aio
from google.rpc import error_details_pb2 as details_pb2
from grpc import StatusCode
from support.client import Api
from support.messages import batches, get_message
from support.sessions import get_session

from chat_ticket.client import AsyncChatTicketClient
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import (
    ListChatSessionsRequest,
    WatchChatSessionRequest,
    WatchChatSessionsRequest,
)
from chat_ticket.v1.chat_ticket_pb2 import GetTicketRequest, ListTicketsRequest
from faults.record import info_of

STREAM_SECONDS = 3600
PAGE_SIZE = 1000


class Loss(NamedTuple):
    """That a follower was told that it has lost its position."""

    revision: int
    newest: int  # of what it was told: above the revision where the stream was catching up
    shared: int  # the last revision that it still has


class HeldSession:
    """A session as a follower of it has it."""

    def __init__(self, session_id: str):
        self.session_id = session_id
        self.revision = 0
        self.epoch = ""
        self.session = r.ChatSession()
        self.messages: dict[str, r.ChatMessage] = {}
        self.is_caught_up = False
        self.newest = 0
        self.losses: list[Loss] = []
        self.repeats: list[str] = []  # messages that came although it had them
        self._deleted: dict[str, int] = {}  # ids of messages, and when that was told

    def apply(self, event: Any) -> None:
        match event.WhichOneof("event"):
            case "session":
                self.session = event.session
                self.newest = max(self.newest, event.session.revision)
            case "messages_created":
                for message in event.messages_created.messages:
                    self.newest = max(self.newest, message.revision)
                    if message.id in self.messages:
                        self.repeats.append(f"message {message.id} at {message.sequence}")
                    self.messages[message.id] = message
                    self._deleted.pop(message.id, None)
            case "message_updated":
                self.messages[event.message_updated.id] = event.message_updated
            case "message_deleted":
                self.messages.pop(event.message_deleted.message_id, None)
                self._deleted[event.message_deleted.message_id] = event.revision
            case "caught_up":
                self.is_caught_up = True
        if event.revision < self.revision:
            self.lose(event.revision)
        self.revision, self.epoch = event.revision, event.epoch
        self.newest = max(self.newest, event.revision)

    def lose(self, shared: int) -> None:
        self.losses.append(Loss(self.revision, self.newest, shared))
        self.newest = shared

    async def differences(self, api: Api) -> list[str]:
        """What it holds that is not so, and what it lacks."""
        session = await get_session(api, self.session_id)
        found = {
            message.id: message
            for batch in await batches(api, self.session_id)
            for message in batch.messages
        }
        different = _differences("message", self.messages, found)
        if self.revision != session.revision:
            different.append(f"revision {self.revision} of {session.revision}")
        for name in ("status", "has_ticket", "title", "labels"):
            if getattr(self.session, name) != getattr(session, name):
                different.append(f"another {name} of session {session.id}")
        return different


class SessionFollower(HeldSession):
    """A follower by raw streams, which keeps the epoch of its revision."""

    async def follow(self, api: Api, *, until_caught_up: bool = False) -> None:
        """Follow until the stream ends. Raises its error, except for HISTORY_CHANGED."""
        self.is_caught_up = False
        request = WatchChatSessionRequest(
            session_id=self.session_id, after_revision=self.revision, epoch=self.epoch
        )
        call = api.sessions.WatchChatSession(request, timeout=STREAM_SECONDS)
        try:
            async for event in call:
                self.apply(event)
                if self.is_caught_up and until_caught_up:
                    return
        except grpc.aio.AioRpcError as error:
            info = info_of(error)
            if info.reason == "HISTORY_CHANGED":
                await self._go_back(api, info)
            elif info.reason != "REVISION_OUT_OF_RANGE" or request.epoch or not self.epoch:
                # Otherwise a stream that names its epoch is told what is shared.
                raise
        finally:
            call.cancel()

    async def catch_up(self, api: Api) -> None:
        """Follow to `caught_up`, and go back before if that is asked for."""
        self.is_caught_up = False
        while not self.is_caught_up:
            await self.follow(api, until_caught_up=True)

    async def _go_back(self, api: Api, info: details_pb2.ErrorInfo) -> None:
        """Forget what came after the shared revision, and read again what had changed after it."""
        shared = int(info.metadata["revision"])
        gone, unsure = [], [id_ for id_, at in self._deleted.items() if at > shared]
        for message in self.messages.values():
            if message.sequence > shared:
                gone.append(message.id)
            elif message.revision > shared:
                unsure.append(message.id)
        # Nothing changes before all is read: if a read fails, this is done again.
        read = {id_: await _read_message(api, id_) for id_ in unsure}
        for id_ in (*gone, *unsure):
            self.messages.pop(id_, None)
        for id_, found in read.items():
            # Others come with the stream.
            if found is not None and found.sequence <= shared:
                self.messages[id_] = found
                self._deleted.pop(id_, None)
        self.lose(shared)
        self.revision, self.epoch = shared, info.metadata["epoch"]


class ClientSessionFollower(HeldSession):
    """A follower by the Python client, which resumes and corrects by itself."""

    async def follow(self, client: AsyncChatTicketClient) -> None:
        async for event in client.watch(self.session_id):
            self.apply(event)


class HeldTenant:
    """The sessions and tickets of a tenant as a follower of the feed has them."""

    def __init__(self) -> None:
        self.sessions: dict[str, r.ChatSession] = {}
        self.tickets: dict[str, r.Ticket] = {}
        self.is_caught_up = False
        self.losses = 0  # how often it was told of one
        self._deleted_sessions: set[str] = set()
        self._deleted_tickets: set[str] = set()

    def apply(self, events: Iterable[Any]) -> None:
        for event in events:
            match event.WhichOneof("event"):
                case "session":
                    self.sessions[event.session.id] = event.session
                    self._deleted_sessions.discard(event.session.id)
                case "session_deleted":
                    self.sessions.pop(event.session_deleted.session_id, None)
                    self._deleted_sessions.add(event.session_deleted.session_id)
                case "ticket":
                    self.tickets[event.ticket.id] = event.ticket
                    self._deleted_tickets.discard(event.ticket.id)
                case "ticket_deleted":
                    self.tickets.pop(event.ticket_deleted.ticket_id, None)
                    self._deleted_tickets.add(event.ticket_deleted.ticket_id)
                case "caught_up":
                    self.is_caught_up = True

    async def differences(self, api: Api) -> list[str]:
        """What it holds that is not so, and what it lacks."""
        return [
            *_differences("session", self.sessions, await _all_sessions(api)),
            *_differences("ticket", self.tickets, await _all_tickets(api)),
        ]


class FeedFollower(HeldTenant):
    """A follower by raw streams, which keeps its cursor."""

    cursor = ""

    async def follow(self, api: Api, *, until_caught_up: bool = False) -> None:
        """Follow until the stream ends. Raises its error, except for HISTORY_CHANGED."""
        self.is_caught_up = False
        request = WatchChatSessionsRequest(cursor=self.cursor, from_beginning=not self.cursor)
        call = api.sessions.WatchChatSessions(request, timeout=STREAM_SECONDS)
        try:
            async for response in call:
                self.apply(response.events)
                self.cursor = response.cursor
                if self.is_caught_up and until_caught_up:
                    return
        except grpc.aio.AioRpcError as error:
            info = info_of(error)
            if info.reason != "HISTORY_CHANGED":
                raise
            await self._go_back(api, info.metadata["cursor"])
        finally:
            call.cancel()

    async def catch_up(self, api: Api) -> None:
        """Follow to `caught_up`, and go back before if that is asked for."""
        self.is_caught_up = False
        while not self.is_caught_up:
            await self.follow(api, until_caught_up=True)

    async def _go_back(self, api: Api, cursor: str) -> None:
        """Read again all that was told, and go on after the cursor of the error."""
        sessions = [
            await _read_session(api, id_) for id_ in self.sessions.keys() | self._deleted_sessions
        ]
        tickets = [
            await _read_ticket(api, id_) for id_ in self.tickets.keys() | self._deleted_tickets
        ]
        self.sessions = {session.id: session for session in sessions if session is not None}
        self.tickets = {ticket.id: ticket for ticket in tickets if ticket is not None}
        self.losses += 1
        self.cursor = cursor


class ClientFeedFollower(HeldTenant):
    """A follower by the Python client, which resumes and corrects by itself."""

    async def follow(self, client: AsyncChatTicketClient) -> None:
        async for response in client.follow_sessions(from_beginning=True):
            self.apply(response.events)


def _differences(kind: str, held: dict[str, Any], found: dict[str, Any]) -> list[str]:
    different = [f"{kind} {id_} is no more" for id_ in held.keys() - found.keys()]
    different += [f"{kind} {id_} is missing" for id_ in found.keys() - held.keys()]
    different += [
        f"{kind} {id_} is another: {_fields(held[id_], found[id_])}"
        for id_ in held.keys() & found.keys()
        if held[id_] != found[id_]
    ]
    return different


def _fields(held: Any, found: Any) -> str:
    """The names of the fields that differ."""
    names = [field.name for field in found.DESCRIPTOR.fields]
    return ", ".join(name for name in names if getattr(held, name) != getattr(found, name))


async def _read_message(api: Api, message_id: str) -> r.ChatMessage | None:
    try:
        return await get_message(api, message_id)
    except grpc.aio.AioRpcError as error:
        _raise_unless_not_found(error)
        return None


async def _read_session(api: Api, session_id: str) -> r.ChatSession | None:
    try:
        return await get_session(api, session_id)
    except grpc.aio.AioRpcError as error:
        _raise_unless_not_found(error)
        return None


async def _read_ticket(api: Api, ticket_id: str) -> r.Ticket | None:
    try:
        found = await api.tickets.GetTicket(GetTicketRequest(ticket_id=ticket_id))
    except grpc.aio.AioRpcError as error:
        _raise_unless_not_found(error)
        return None
    ticket: r.Ticket = found.ticket
    return ticket


def _raise_unless_not_found(error: grpc.aio.AioRpcError) -> None:
    if error.code() is not StatusCode.NOT_FOUND:
        raise error


async def _all_sessions(api: Api) -> dict[str, r.ChatSession]:
    request = ListChatSessionsRequest(page_size=PAGE_SIZE)
    found: dict[str, r.ChatSession] = {}
    while True:
        page = await api.sessions.ListChatSessions(request)
        found |= {session.id: session for session in page.sessions}
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


async def _all_tickets(api: Api) -> dict[str, r.Ticket]:
    request = ListTicketsRequest(page_size=PAGE_SIZE)
    found: dict[str, r.Ticket] = {}
    while True:
        page = await api.tickets.ListTickets(request)
        found |= {ticket.id: ticket for ticket in page.tickets}
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token
