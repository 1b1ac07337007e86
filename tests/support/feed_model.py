"""A service with a feed in memory, whose history changes when a test says so."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from chat_ticket.v1 import chat_session_pb2_grpc, chat_ticket_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import (
    GetChatSessionRequest,
    GetChatSessionResponse,
    WatchChatSessionsRequest,
    WatchChatSessionsResponse,
)
from chat_ticket.v1.chat_ticket_pb2 import GetTicketRequest, GetTicketResponse

Event = WatchChatSessionsResponse.Event
Context = grpc.aio.ServicerContext[Any, Any]


def session(id_: str, revision: int, **fields: Any) -> Event:
    return Event(session=r.ChatSession(id=id_, revision=revision, **fields))


def session_deleted(id_: str) -> Event:
    return Event(session_deleted=WatchChatSessionsResponse.ChatSessionDeleted(session_id=id_))


def left(id_: str) -> Event:
    return Event(left=WatchChatSessionsResponse.ChatSessionLeft(session_id=id_))


def ticket(id_: str, revision: int, **fields: Any) -> Event:
    return Event(ticket=r.Ticket(id=id_, revision=revision, **fields))


def ticket_deleted(id_: str) -> Event:
    return Event(ticket_deleted=WatchChatSessionsResponse.TicketDeleted(ticket_id=id_))


def subject(event: Event) -> str:
    """The id that an event is about; empty for caught_up and heartbeats."""
    [(_, value)] = event.ListFields()
    ids = (getattr(value, name, "") for name in ("id", "session_id", "ticket_id"))
    return next(filter(None, ids), "")


def response(cursor: str, *events: Event) -> WatchChatSessionsResponse:
    return WatchChatSessionsResponse(cursor=cursor, events=events)


async def refuse(context: Context, reason: str, **metadata: str) -> None:
    """End the call by OUT_OF_RANGE."""
    code = grpc.StatusCode.OUT_OF_RANGE
    status = status_pb2.Status(code=code.value[0], message=reason)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, metadata=metadata))
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    await context.abort(code, reason)


class FeedModel(
    chat_session_pb2_grpc.ChatSessionServiceServicer, chat_ticket_pb2_grpc.ChatTicketServiceServicer
):
    """The log of the events is the database.

    As the service does, a stream tells what is new in the log in passes, each in the order of the
    ids and in pages. A cursor is EPOCH:START:END:INDEX: of the pass from START to END, up to the
    INDEX. It is true if the log has still been the same up to END.

    It has no filters: a test writes what a filtered stream would tell. What has left is RESOLVED.
    """

    def __init__(self) -> None:
        self.log: list[Event] = []
        self.branches = [0]  # the length of the log at which each epoch begins
        self.page_size = 20
        self.requests: list[WatchChatSessionsRequest] = []
        self.reads: list[str] = []
        self.accepts_older = True  # epochs; not after a restore of a dump
        self.refusal_has_cursor = True
        self.breaks_first = 0  # so many streams end before their first response
        self.expired = 0  # cursors below this are
        self._changed = asyncio.Event()

    def write(self, *events: Event) -> None:
        self.log += events
        self._wake()

    def lose(self, count: int) -> None:
        """Go back to an older state of the log, in a new epoch."""
        del self.log[len(self.log) - count :]
        self.branches.append(len(self.log))
        self._wake()

    def state(self) -> dict[str, Event]:
        """The last event of each id."""
        return {subject(event): event for event in self.log}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def WatchChatSessions(  # type: ignore[override]
        self, request: WatchChatSessionsRequest, context: Context
    ) -> AsyncIterator[WatchChatSessionsResponse]:
        self.requests.append(request)
        if len(self.requests) <= self.breaks_first:
            await context.abort(grpc.StatusCode.UNAVAILABLE)
        start, first = 0 if request.from_beginning else len(self.log), 0
        end = len(self.log)
        if request.cursor:
            told_in, start, end, first = map(int, request.cursor.split(":"))
            await self._check(told_in, end, context)
        epoch, is_caught_up = len(self.branches), False
        while True:
            changed = self._changed
            ids = sorted({subject(event) for event in self.log[start:end]})
            for index in range(first, len(ids), self.page_size):
                page = ids[index : index + self.page_size]
                rest = f"{start}:{end}:{index + len(page)}"
                yield response(f"{epoch}:{rest}", *map(self.state().__getitem__, page))
                if epoch != len(self.branches):
                    await context.abort(grpc.StatusCode.UNAVAILABLE)
            start, end, first = end, len(self.log), 0
            if not is_caught_up:
                is_caught_up = True
                caught_up = Event(caught_up=WatchChatSessionsResponse.CaughtUp())
                yield response(f"{epoch}:{start}:{start}:0", caught_up)
            if start == end:
                await changed.wait()
            if epoch != len(self.branches):
                await context.abort(grpc.StatusCode.UNAVAILABLE)

    async def _check(self, told_in: int, end: int, context: Context) -> None:
        if end < self.expired:
            await refuse(context, "CURSOR_EXPIRED")
        shared = min(self.branches[told_in:], default=end)
        is_older = told_in < len(self.branches)
        if end > shared or (is_older and not self.accepts_older):
            cursor = f"{len(self.branches)}:{shared}:{shared}:0"
            await refuse(
                context,
                "HISTORY_CHANGED",
                **({"cursor": cursor} if self.refusal_has_cursor else {}),
            )

    async def GetChatSession(  # type: ignore[override]
        self, request: GetChatSessionRequest, context: Context
    ) -> GetChatSessionResponse:
        self.reads.append(request.session_id)
        event = self.state().get(request.session_id, Event())
        if event.HasField("left"):
            gone = r.ChatSession(id=request.session_id, status=r.CHAT_SESSION_STATUS_RESOLVED)
            return GetChatSessionResponse(session=gone)
        if not event.HasField("session"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "")
        return GetChatSessionResponse(session=event.session)

    async def GetTicket(  # type: ignore[override]
        self, request: GetTicketRequest, context: Context
    ) -> GetTicketResponse:
        self.reads.append(request.ticket_id)
        event = self.state().get(request.ticket_id, Event())
        if not event.HasField("ticket"):
            await context.abort(grpc.StatusCode.NOT_FOUND, "")
        return GetTicketResponse(ticket=event.ticket)
