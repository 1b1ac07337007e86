"""ChatSessionService."""

import functools
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio

from chat_ticket.v1 import chat_session_pb2 as pb
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.services.validate import LAST_ID, Check
from chat_ticket_svc.store import session_changes, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.hub import Position, WatchHub

Context = grpc.aio.ServicerContext[Any, Any]
Event = pb.WatchChatSessionResponse


class ChatSessionService(chat_session_pb2_grpc.ChatSessionServiceServicer):
    """See chat_session.proto."""

    def __init__(self, db: Database, watch_hub: WatchHub, settings: Settings):
        self._db = db
        self._watch_hub = watch_hub
        self._limits = settings.limits

    async def CreateChatSession(
        self, request: pb.CreateChatSessionRequest, context: Context
    ) -> pb.CreateChatSessionResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.new_id("session.id", request.session.id)
        status = "active"
        if request.session.status:
            status = check.choice("session.status", request.session.status, convert.SESSION_STATUS)
        check.done()
        session = await sessions.create(self._db, tenant_id, session_id, status)
        return pb.CreateChatSessionResponse(session=convert.session(session))

    async def GetChatSession(
        self, request: pb.GetChatSessionRequest, context: Context
    ) -> pb.GetChatSessionResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        check.done()
        session = await sessions.get(self._db, tenant_id, session_id)
        return pb.GetChatSessionResponse(session=convert.session(session))

    async def ListChatSessions(
        self, request: pb.ListChatSessionsRequest, context: Context
    ) -> pb.ListChatSessionsResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)

        def time(field: str) -> Any:
            return check.time(field, request.HasField(field), getattr(request, field))  # type: ignore[arg-type]

        chosen = sessions.Filter(
            statuses=check.choices("statuses", request.statuses, convert.SESSION_STATUS),
            has_ticket=request.has_ticket if request.HasField("has_ticket") else None,
            created_from=time("start_create_time"),
            created_to=time("end_create_time"),
            updated_from=time("start_update_time"),
            updated_to=time("end_update_time"),
        )
        if request.order_by not in pb.ChatSessionOrder.values():
            check.add("order_by", f"has the unknown value {request.order_by}")
        by_update_time = request.order_by == pb.CHAT_SESSION_ORDER_UPDATE_TIME
        page_size = check.page_size(request.page_size)
        after_time, after_id = paging.position(
            check, tenant_id, request, (paging.END_OF_TIME, LAST_ID), paging.time_of, paging.id_of
        )
        check.done()
        rows = await sessions.page(
            self._db,
            tenant_id,
            chosen,
            by_update_time=by_update_time,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )

        def token(last: sessions.Session) -> str:
            time = last.updated_at if by_update_time else last.created_at
            return paging.token(tenant_id, request, time, last.id)

        found, next_page_token = paging.fill(rows, page_size, convert.session, token)
        return pb.ListChatSessionsResponse(sessions=found, next_page_token=next_page_token)

    async def UpdateChatSession(
        self, request: pb.UpdateChatSessionRequest, context: Context
    ) -> pb.UpdateChatSessionResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session.id", request.session.id)
        etag = check.etag("session.etag", request.session.etag)
        status = ""
        if "status" in check.mask(request.update_mask, ["status"]):
            status = check.choice("session.status", request.session.status, convert.SESSION_STATUS)
        check.done()
        session = await sessions.set_status(self._db, tenant_id, session_id, status, etag)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.UpdateChatSessionResponse(session=convert.session(session))

    async def DeleteChatSession(
        self, request: pb.DeleteChatSessionRequest, context: Context
    ) -> pb.DeleteChatSessionResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        etag = check.etag("etag", request.etag)
        check.done()
        await sessions.delete(self._db, tenant_id, session_id, etag)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatSessionResponse()

    def WatchChatSession(
        self, request: pb.WatchChatSessionRequest, context: Context
    ) -> AsyncIterator[Any]:  # bytes, but the stubs do not know
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        after = check.not_negative("after_revision", request.after_revision)
        check.done()
        return self._watch(tenant_id, session_id, after)

    async def _watch(self, tenant_id: str, session_id: str, after: int) -> AsyncIterator[bytes]:
        page_size = paging.FIRST_PAGE
        stream = _Stream(session_id, after)
        with self._watch_hub.watch(tenant_id, session_id, self._page) as watcher:
            while not stream.ended:
                if stream.caught_up:
                    page = await watcher.next_page()
                else:
                    page = await watcher.read_page(stream.position, page_size)
                    page_size = min(2 * page_size, paging.LARGEST_PAGE)
                for event in stream.tell(page):
                    yield event
                del page, event  # many streams wait for long, and hold what their variables do

    async def _page(
        self, tenant_id: str, session_id: str, after: int, limit: int | None = None
    ) -> "_Page":
        """What follows a revision; without a limit, as much as there is likely to be."""
        read = functools.partial(session_changes.page, self._db, tenant_id, session_id, after=after)
        found = await read(limit=limit or paging.FIRST_PAGE)
        if limit is None and found is not None and found.more:
            found = await read(limit=paging.LARGEST_PAGE)
        return _Page(after, found)


class _Page:
    """What follows a position, serialised once for all the streams that tell it."""

    position: Position | None = None  # the session is gone, and there is nothing else
    has_more = False

    def __init__(self, after: int, found: session_changes.Page | None):
        if found is None:
            return
        self.position = Position(found.session.created_at, found.revision)
        self.has_more = found.more
        self.after = after
        self.session = found.session
        self.state = (found.session.status, found.session.has_ticket)
        self.changes = [event.SerializeToString() for event in _events(found)]

    @functools.cached_property
    def changed_session(self) -> bytes:
        """Before the changes of messages: it is not known where among them it belongs."""
        at = self.after if self.changes else self.session.revision
        return _event(at, session=convert.session(self.session))


class _Stream:
    """What a stream has told of its session, and what it tells next."""

    def __init__(self, session_id: str, after: int):
        self._session_id = session_id
        self._created_at: int | None = None
        self._shown: tuple[str, bool] | None = None
        self.position = after
        self.caught_up = False
        self.ended = False

    def tell(self, page: _Page | None) -> list[bytes]:
        """The events for the page after the position, or for silence."""
        if page is None:
            return [_event(self.position, heartbeat=Event.Heartbeat())]
        if page.position is None or self._created_at not in (None, page.position.created_at):
            if self._created_at is None:
                raise sessions.not_found(self._session_id)
            # Another session of the same id, which must not be, is not the one followed.
            self.ended = True
            return [_event(self.position, session_deleted=Event.ChatSessionDeleted())]
        end = page.session.revision
        if self.position > end:
            raise errors.OutOfRangeError(
                f"the session is at revision {end}, before {self.position}",
                reason="REVISION_OUT_OF_RANGE",
            )
        events = page.changes
        if self._shown is None:
            events = [_event(self.position, session=convert.session(page.session)), *events]
        elif self._shown != page.state:
            events = [page.changed_session, *events]
        if not page.has_more and not self.caught_up:
            events = [*events, _event(end, caught_up=Event.CaughtUp())]
            self.caught_up = True
        elif not events:
            # What happened has cancelled itself out: nothing to show but the place.
            events = [_event(end, heartbeat=Event.Heartbeat())]
        self._created_at, self.position = page.position
        self._shown = page.state
        return events


def _event(revision: int, **event: Any) -> bytes:
    return Event(revision=revision, **event).SerializeToString()


def _events(page: session_changes.Page) -> Iterator[Event]:
    """The changes of a page, runs of new messages together.

    The last one stands for all there is in the session when no more follows.
    """
    response = None
    for change in page.changes:
        if response is not None and not (
            change.kind == "created" and response.HasField("messages_created")
        ):
            yield response
            response = None
        response = response or Event()
        response.revision = change.revision
        if change.message is None:
            response.message_deleted.message_id = change.message_id
        elif change.kind == "created":
            response.messages_created.messages.append(convert.message(change.message))
        else:
            response.message_updated.CopyFrom(convert.message(change.message))
    if response is not None:
        response.revision = page.revision
        yield response
