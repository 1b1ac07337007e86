"""The I/O of follow_sessions, for asyncio. The synchronous one is generated (make proto)."""

import functools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from chat_ticket import errors
from chat_ticket.client import _runtime_asyncio as runtime
from chat_ticket.client._followed_sessions import (
    Event,
    FirstResponse,
    FollowedSessions,
    Key,
    gone_event,
)
from chat_ticket.client._resume import Resumable
from chat_ticket.client._retry import backoff_seconds
from chat_ticket.v1.chat_session_pb2 import (
    GetChatSessionRequest,
    WatchChatSessionsRequest,
    WatchChatSessionsResponse,
)
from chat_ticket.v1.chat_ticket_pb2 import GetTicketRequest

if TYPE_CHECKING:
    from chat_ticket.client._async import AsyncChatTicketClient

log = logging.getLogger("chat_ticket.client")

NAME = "watch of all sessions"  # in the log

READS_AT_ONCE = 10


class SessionsFollower:
    """Follows the sessions and tickets of a tenant, also when the database has lost changes.

    `resumed` makes many streams look like one, `find` reads until it knows the answer, and `pause`
    ends when the client is closed.
    """

    def __init__(
        self,
        client: "AsyncChatTicketClient",
        request: WatchChatSessionsRequest,
        resumed: Callable[..., AsyncGenerator[Any, None]],
        find: Callable[[Any, Any], Awaitable[Any]],
        pause: Callable[[float], Awaitable[None]],
    ):
        self._client = client
        self._feed = FollowedSessions(request)
        self._resumed = resumed
        self._find = find
        self._pause = pause

    async def responses(self) -> AsyncGenerator[WatchChatSessionsResponse, None]:
        """Those of the stream that does not break."""
        feed, refusals = self._feed, 0
        while True:
            stream = self._stream(feed.request, feed)
            try:
                async with aclosing(stream):
                    async for response in stream:
                        refusals = 0
                        yield response
                return
            except errors.HistoryChangedError as error:
                refusal = error
            log.warning("%s: changes are lost: checks what it told last: %s", NAME, refusal)
            cursor = await self._accepted_cursor() or feed.cursor_of_refusal(refusal)
            for keys in feed.told_after(cursor):
                events = await runtime.map_concurrently(self._read, keys, READS_AT_ONCE)
                for response in feed.corrections(events):
                    yield response
            feed.resume_after(cursor)
            # Servers that disagree about the history must not keep the client busy.
            await self._pause(backoff_seconds(refusals, refusal))
            refusals += 1

    def _stream(
        self,
        request: Callable[[], WatchChatSessionsRequest],
        progress: Resumable[WatchChatSessionsResponse, WatchChatSessionsResponse],
    ) -> AsyncGenerator[WatchChatSessionsResponse, None]:
        return self._resumed(
            lambda: self._client.sessions.WatchChatSessions(request()), progress, NAME
        )

    async def _accepted_cursor(self) -> str:
        """The newest cursor of this call that the server accepts; empty if there is none."""
        for cursor in self._feed.older_cursors():
            request = functools.partial(self._feed.request_after, cursor)
            stream = self._stream(request, FirstResponse())
            try:
                async with aclosing(stream):
                    async for _ in stream:
                        return cursor
            except (errors.HistoryChangedError, errors.CursorExpiredError):
                continue
        return ""

    async def _read(self, key: Key) -> Event:
        """How a stream would tell the session or ticket now."""
        if key.is_session:
            get_session = self._client.sessions.GetChatSession
            found = await self._find(get_session, GetChatSessionRequest(session_id=key.id))
            return gone_event(key) if found is None else self._feed.session_event(found.session)
        get_ticket = self._client.tickets.GetTicket
        found = await self._find(get_ticket, GetTicketRequest(ticket_id=key.id))
        return gone_event(key) if found is None else Event(ticket=found.ticket)
