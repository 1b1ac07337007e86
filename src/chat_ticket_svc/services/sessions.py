"""ChatSessionService."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc.aio

from chat_ticket.v1 import chat_session_pb2 as pb
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import convert, paging
from chat_ticket_svc.services.validate import MAX_UUID, Validator
from chat_ticket_svc.store import session_changes, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.session_deletion import SessionDeleter
from chat_ticket_svc.watch.hub import Position, WatchHub

Context = grpc.aio.ServicerContext[Any, Any]
Event = pb.WatchChatSessionResponse


class ChatSessionService(chat_session_pb2_grpc.ChatSessionServiceServicer):
    """Implements chat_session.proto, which documents each method."""

    def __init__(
        self,
        db: Database,
        watch_hub: WatchHub,
        settings: Settings,
        *,
        on_deleted: Callable[[str, str], object],
    ):
        """`on_deleted` gets (tenant, session) of each session that was deleted."""
        self._db = db
        self._watch_hub = watch_hub
        self._deleter = SessionDeleter(db, on_deleted)
        self._limits = settings.limits

    async def CreateChatSession(
        self, request: pb.CreateChatSessionRequest, context: Context
    ) -> pb.CreateChatSessionResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.new_id("session.id", request.session.id)
        status = "active"
        if request.session.status:
            status = validator.enum(
                "session.status", request.session.status, convert.SESSION_STATUS
            )
        validator.raise_if_invalid()
        if not request.session.id:
            request_context.set_not_repeatable(session_id=session_id)
        session = await sessions.create(self._db, tenant_id, session_id, status)
        return pb.CreateChatSessionResponse(session=convert.session(session))

    async def GetChatSession(
        self, request: pb.GetChatSessionRequest, context: Context
    ) -> pb.GetChatSessionResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        validator.raise_if_invalid()
        session = await sessions.get(self._db, tenant_id, session_id)
        return pb.GetChatSessionResponse(session=convert.session(session))

    async def ListChatSessions(
        self, request: pb.ListChatSessionsRequest, context: Context
    ) -> pb.ListChatSessionsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        filters = sessions.Filter(
            statuses=validator.enum_filter("statuses", request.statuses, convert.SESSION_STATUS),
            has_ticket=request.has_ticket if request.HasField("has_ticket") else None,
            created_from=validator.start_time("start_create_time", request),
            created_to=validator.end_time("end_create_time", request),
            updated_from=validator.start_time("start_update_time", request),
            updated_to=validator.end_time("end_update_time", request),
        )
        if request.order_by not in pb.ChatSessionOrder.values():
            validator.add_violation("order_by", f"unknown enum value {request.order_by}")
        by_update_time = request.order_by == pb.CHAT_SESSION_ORDER_UPDATE_TIME
        page_size = validator.page_size(request.page_size)
        after_time, after_id = paging.decode_token(
            validator,
            tenant_id,
            request,
            (paging.END_OF_TIME, MAX_UUID),
            paging.parse_time,
            paging.parse_id,
        )
        validator.raise_if_invalid()
        rows = await sessions.page(
            self._db,
            tenant_id,
            filters,
            by_update_time=by_update_time,
            after_time=after_time,
            after_id=after_id,
            limit=page_size + 1,
        )

        def token(last: sessions.Session) -> str:
            time = last.updated_at if by_update_time else last.created_at
            return paging.encode_token(tenant_id, request, time, last.id)

        page, next_page_token = paging.fill_page(rows, page_size, convert.session, token)
        return pb.ListChatSessionsResponse(sessions=page, next_page_token=next_page_token)

    async def UpdateChatSession(
        self, request: pb.UpdateChatSessionRequest, context: Context
    ) -> pb.UpdateChatSessionResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session.id", request.session.id)
        etag = validator.etag("session.etag", request.session.etag)
        status = ""
        if "status" in validator.update_mask(request.update_mask, ["status"]):
            status = validator.enum(
                "session.status", request.session.status, convert.SESSION_STATUS
            )
        validator.raise_if_invalid()
        if etag is not None:
            # Repeated after its own success, the call meets a revision that is not its etag.
            request_context.set_not_repeatable()
        session = await sessions.set_status(self._db, tenant_id, session_id, status, etag)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.UpdateChatSessionResponse(session=convert.session(session))

    async def DeleteChatSession(
        self, request: pb.DeleteChatSessionRequest, context: Context
    ) -> pb.DeleteChatSessionResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        etag = validator.etag("etag", request.etag)
        validator.raise_if_invalid()
        await self._deleter.delete(tenant_id, session_id, etag)
        return pb.DeleteChatSessionResponse()

    def WatchChatSession(
        self, request: pb.WatchChatSessionRequest, context: Context
    ) -> AsyncIterator[Any]:  # of bytes, which the types of the stubs do not allow
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        after = validator.non_negative("after_revision", request.after_revision)
        validator.raise_if_invalid()
        return self._watch(tenant_id, session_id, after)

    async def _watch(self, tenant_id: str, session_id: str, after: int) -> AsyncIterator[bytes]:
        page_size = paging.MIN_STREAM_PAGE
        stream = _WatchStream(session_id, after)
        with self._watch_hub.watch(tenant_id, session_id, self._read_page) as watcher:
            while not stream.is_finished:
                if stream.is_caught_up:
                    page = await watcher.next_page()
                else:
                    page = await watcher.read_page(stream.revision, page_size)
                    page_size = min(2 * page_size, paging.MAX_STREAM_PAGE)
                for event in stream.advance(page):
                    yield event
                # Many streams wait for a long time, and their local variables would keep memory.
                del page, event

    async def _read_page(
        self, tenant_id: str, session_id: str, after: int, limit: int | None = None
    ) -> "_SerializedPage":
        """Read the changes after a revision: `limit` of them, or as many as a page may hold.

        Without a limit it reads a small page first, because there are rarely more changes.
        """
        read = functools.partial(session_changes.page, self._db, tenant_id, session_id, after=after)
        page = await read(limit=limit or paging.MIN_STREAM_PAGE)
        if limit is None and page is not None and page.more:
            page = await read(limit=paging.MAX_STREAM_PAGE)
        return _SerializedPage(after, page)


class _SerializedPage:
    """The changes after a revision, serialised once for all streams that send them."""

    position: Position | None = None  # None when the session does not exist; nothing else is set
    has_more = False

    def __init__(self, after: int, page: session_changes.ChangePage | None):
        if page is None:
            return
        self.position = Position(page.session.created_at, page.revision)
        self.has_more = page.more
        self.after = after
        self.session = page.session
        self.session_state = (page.session.status, page.session.has_ticket)
        self.changes = [event.SerializeToString() for event in _events(page)]

    @functools.cached_property
    def session_event(self) -> bytes:
        """The event of a changed session, sent first: its place among the changes is unknown."""
        revision = self.after if self.changes else self.session.revision
        return _event(revision, session=convert.session(self.session))


class _WatchStream:
    """The position of a stream in its session, and the state of the session that it has sent."""

    def __init__(self, session_id: str, after: int):
        self._session_id = session_id
        self._created_at: int | None = None
        self._session_state: tuple[str, bool] | None = None
        self.revision = after
        self.is_caught_up = False
        self.is_finished = False

    def advance(self, page: _SerializedPage | None) -> list[bytes]:
        """Move to the end of a page, and return its events. None stands for a heartbeat."""
        if page is None:
            return [_event(self.revision, heartbeat=Event.Heartbeat())]
        if page.position is None or self._created_at not in (None, page.position.created_at):
            if self._created_at is None:
                raise sessions.not_found(self._session_id)
            # Ids are not reused. If one is, the session that was watched is gone all the same.
            self.is_finished = True
            return [_event(self.revision, session_deleted=Event.ChatSessionDeleted())]
        end = page.session.revision
        if self.revision > end:
            raise errors.OutOfRangeError(
                f"revision {self.revision} does not exist: the session is at revision {end}",
                reason="REVISION_OUT_OF_RANGE",
            )
        events = page.changes
        if self._session_state is None:
            events = [_event(self.revision, session=convert.session(page.session)), *events]
        elif self._session_state != page.session_state:
            events = [page.session_event, *events]
        if not page.has_more and not self.is_caught_up:
            events = [*events, _event(end, caught_up=Event.CaughtUp())]
            self.is_caught_up = True
        elif not events:
            # The changes have cancelled each other out. A heartbeat carries the new revision.
            events = [_event(end, heartbeat=Event.Heartbeat())]
        self._created_at, self.revision = page.position
        self._session_state = page.session_state
        return events


def _event(revision: int, **event: Any) -> bytes:
    return Event(revision=revision, **event).SerializeToString()


def _events(page: session_changes.ChangePage) -> Iterator[Event]:
    """Convert the changes of a page. Consecutive new messages share an event.

    The last event has the revision of the page, which may be beyond its last change.
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
