"""What `watch` delivers of the session and of its ticket, with which every stream begins."""

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import grpc
import pytest_asyncio
from support.client_calls import NewClient, event_kind

from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket.v1 import resources_pb2 as r
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse

Script = Sequence[WatchChatSessionResponse]


class ScriptedSessions(chat_session_pb2_grpc.ChatSessionServiceServicer):
    """Streams one script after the other; each ends as if the connection had broken."""

    def __init__(self) -> None:
        self.scripts: Iterator[Script] = iter(())

    async def WatchChatSession(  # type: ignore[override]
        self, _: WatchChatSessionRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[WatchChatSessionResponse]:
        for response in next(self.scripts):
            yield response
        await context.abort(grpc.StatusCode.UNAVAILABLE)


@pytest_asyncio.fixture
async def scripted() -> AsyncIterator[tuple[ScriptedSessions, int]]:
    """A service whose watches are scripted, and its port."""
    server, sessions = grpc.aio.server(), ScriptedSessions()
    chat_session_pb2_grpc.add_ChatSessionServiceServicer_to_server(sessions, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield sessions, port
    await server.stop(None)


def session(revision: int, **fields: Any) -> WatchChatSessionResponse:
    return WatchChatSessionResponse(revision=revision, session=r.ChatSession(id="it", **fields))


def ticket(revision: int, status: r.TicketStatus) -> WatchChatSessionResponse:
    link = r.ChatTicket(id="link", ticket=r.Ticket(id="ticket", status=status))
    return WatchChatSessionResponse(revision=revision, ticket=link)


def unlinked(revision: int) -> WatchChatSessionResponse:
    return WatchChatSessionResponse(revision=revision, ticket=r.ChatTicket())


def deleted(revision: int) -> WatchChatSessionResponse:
    response = WatchChatSessionResponse(revision=revision)
    response.session_deleted.SetInParent()
    return response


async def delivered(
    scripted: tuple[ScriptedSessions, int], connect: NewClient, *scripts: Script
) -> list[tuple[str, int]]:
    """The events of a watch until its session is deleted, each with its revision."""
    sessions, port = scripted
    sessions.scripts = iter(scripts)
    return [(event_kind(event), event.revision) async for event in connect(port).watch("it")]


async def test_title_and_labels_are_delivered_when_they_change(
    scripted: tuple[ScriptedSessions, int], connect: NewClient
) -> None:
    """As the status is, and not when a new stream repeats them."""
    labels = {"channel": "web"}
    events = await delivered(
        scripted,
        connect,
        [session(0), session(1, title="a title")],
        [session(1, title="a title"), session(2, title="a title", labels=labels)],
        [session(2, title="a title", labels=labels), session(3, labels=labels), deleted(4)],
    )
    assert events == [
        ("session", 0),
        ("session", 1),
        ("session", 2),
        ("session", 3),
        ("session_deleted", 4),
    ]


async def test_ticket_is_delivered_when_it_changes(
    scripted: tuple[ScriptedSessions, int], connect: NewClient
) -> None:
    """Also when it has changed while no stream was open, and not when a stream repeats it."""
    linked = session(1, has_ticket=True)
    events = await delivered(
        scripted,
        connect,
        [linked, ticket(1, r.TICKET_STATUS_OPEN)],
        [linked, ticket(1, r.TICKET_STATUS_OPEN)],
        [linked, ticket(2, r.TICKET_STATUS_SOLVED), deleted(3)],
    )
    assert events == [("session", 1), ("ticket", 1), ("ticket", 2), ("session_deleted", 3)]


async def test_ticket_that_is_unlinked_is_delivered_with_its_revision(
    scripted: tuple[ScriptedSessions, int], connect: NewClient
) -> None:
    """The stream says so itself, after the session, whose event does not move the position."""
    linked = session(1, has_ticket=True)
    events = await delivered(
        scripted,
        connect,
        [linked, ticket(1, r.TICKET_STATUS_OPEN), session(1), unlinked(2)],
        [session(2), deleted(3)],
    )
    assert events == [
        ("session", 1),
        ("ticket", 1),
        ("session", 1),
        ("ticket", 2),
        ("session_deleted", 3),
    ]


async def test_ticket_that_was_unlinked_between_streams_is_delivered(
    scripted: tuple[ScriptedSessions, int], connect: NewClient
) -> None:
    """The new stream begins with a session that has no ticket, and does not say more."""
    linked = session(1, has_ticket=True)
    events = await delivered(
        scripted,
        connect,
        [linked, ticket(1, r.TICKET_STATUS_OPEN)],
        [session(1)],
        [session(1), deleted(3)],
    )
    assert events == [
        ("session", 1),
        ("ticket", 1),
        ("session", 1),
        ("ticket", 1),
        ("session_deleted", 3),
    ]


async def test_unknown_event_moves_the_position(
    scripted: tuple[ScriptedSessions, int], connect: NewClient
) -> None:
    """An event of a later version is delivered as a response without an event."""
    later = WatchChatSessionResponse.FromString(b"\x08\x05\xaa\x06\x00")  # field 101
    events = await delivered(scripted, connect, [session(0), later], [session(5), deleted(6)])
    assert events == [("session", 0), ("", 5), ("session_deleted", 6)]
