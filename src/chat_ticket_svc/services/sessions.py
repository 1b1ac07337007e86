"""ChatSessionService."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio

from chat_ticket.v1 import chat_session_pb2 as pb
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket_svc import caller, convert, errors, paging
from chat_ticket_svc.config import Settings
from chat_ticket_svc.follow import Follow
from chat_ticket_svc.store import changes, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.validate import LAST_ID, Check

Context = grpc.aio.ServicerContext[Any, Any]
Event = pb.WatchChatSessionResponse


class ChatSessionService(chat_session_pb2_grpc.ChatSessionServiceServicer):
    """See chat_session.proto."""

    def __init__(self, db: Database, follow: Follow, settings: Settings):
        self._db = db
        self._follow = follow
        self._limits = settings.limits
        self._heartbeat_seconds = settings.heartbeat_seconds

    async def CreateChatSession(
        self, request: pb.CreateChatSessionRequest, context: Context
    ) -> pb.CreateChatSessionResponse:
        tenant_id = caller.tenant_id()
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
        tenant_id = caller.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        check.done()
        session = await sessions.get(self._db, tenant_id, session_id)
        return pb.GetChatSessionResponse(session=convert.session(session))

    async def ListChatSessions(
        self, request: pb.ListChatSessionsRequest, context: Context
    ) -> pb.ListChatSessionsResponse:
        tenant_id = caller.tenant_id()
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
        tenant_id = caller.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session.id", request.session.id)
        etag = check.etag("session.etag", request.session.etag)
        status = ""
        if "status" in check.mask(request.update_mask, ["status"]):
            status = check.choice("session.status", request.session.status, convert.SESSION_STATUS)
        check.done()
        session = await sessions.set_status(self._db, tenant_id, session_id, status, etag)
        self._follow.changed(tenant_id, session_id)
        return pb.UpdateChatSessionResponse(session=convert.session(session))

    async def DeleteChatSession(
        self, request: pb.DeleteChatSessionRequest, context: Context
    ) -> pb.DeleteChatSessionResponse:
        tenant_id = caller.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        etag = check.etag("etag", request.etag)
        check.done()
        await sessions.delete(self._db, tenant_id, session_id, etag)
        self._follow.changed(tenant_id, session_id)
        return pb.DeleteChatSessionResponse()

    async def WatchChatSession(
        self, request: pb.WatchChatSessionRequest, context: Context
    ) -> AsyncIterator[Event]:
        tenant_id = caller.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        position = check.not_negative("after_revision", request.after_revision)
        check.done()

        clock = asyncio.get_running_loop().time
        page_size = paging.FIRST_PAGE
        first: sessions.Session | None = None
        shown: tuple[str, bool] | None = None
        caught_up = False
        sent_at = clock()
        with self._follow.watch(tenant_id, session_id) as watcher:
            while True:
                watcher.about_to_read()
                page = await self._follow.read(
                    tenant_id,
                    changes.page(self._db, tenant_id, session_id, after=position, limit=page_size),
                )
                if page is None or (first and first.created_at != page.session.created_at):
                    if first is None:
                        raise sessions.not_found(session_id)
                    # Another session of the same id, which must not be, is not the one followed.
                    yield Event(revision=position, session_deleted=Event.ChatSessionDeleted())
                    return
                first = first or page.session
                end = page.session.revision
                if position > end:
                    raise errors.OutOfRangeError(
                        f"the session is at revision {end}, before {position}",
                        reason="REVISION_OUT_OF_RANGE",
                    )
                events = list(_events(page))
                state = (page.session.status, page.session.has_ticket)
                if state != shown:
                    # Before the messages: it is not known where among them it belongs.
                    at = end if shown and not events else position
                    events.insert(0, Event(revision=at, session=convert.session(page.session)))
                    shown = state
                if not page.more and not caught_up:
                    events.append(Event(revision=end, caught_up=Event.CaughtUp()))
                    caught_up = True
                elif not events and position < end:
                    # What happened has cancelled itself out: nothing to show but the place.
                    events.append(Event(revision=end, heartbeat=Event.Heartbeat()))
                for event in events:
                    yield event
                    position = event.revision
                    sent_at = clock()
                if page.more:
                    page_size = min(2 * page_size, paging.LARGEST_PAGE)
                    continue
                watcher.revision = end
                while not await watcher.changed(sent_at + self._heartbeat_seconds - clock()):
                    yield Event(revision=position, heartbeat=Event.Heartbeat())
                    sent_at = clock()


def _events(page: changes.Page) -> Iterator[Event]:
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
        if not page.more:
            response.revision = page.session.revision
        yield response
