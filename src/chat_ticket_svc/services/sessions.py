"""ChatSessionService."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

import grpc.aio

from chat_ticket.v1 import chat_session_pb2 as pb
from chat_ticket.v1 import chat_session_pb2_grpc
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import (
    change_feed_cursor,
    change_feed_stream,
    convert,
    paging,
    watch_stream,
)
from chat_ticket_svc.services.change_feed_cursor import Cursor
from chat_ticket_svc.services.change_feed_events import SessionFilter
from chat_ticket_svc.services.change_feed_stream import BEGINNING
from chat_ticket_svc.services.validate import MAX_FILTER_LABELS, MAX_UUID, Validator
from chat_ticket_svc.store import session_listing, sessions
from chat_ticket_svc.store.change_feed import Place
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.session_deletion import SessionDeleter
from chat_ticket_svc.watch.hub import WatchHub

Context = grpc.aio.ServicerContext[Any, Any]


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

    async def CreateChatSession(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.CreateChatSessionRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.new_id("session.id", request.session.id)
        status = "active"
        if request.session.status:
            status = validator.enum(
                "session.status", request.session.status, convert.SESSION_STATUS
            )
        new = sessions.NewSession(
            id=session_id,
            status=status,
            user_id=validator.reference("session.user_id", request.session.user_id),
            title=validator.optional_title("session.title", request.session.title) or None,
            labels=validator.labels("session.labels", request.session.labels, sessions.MAX_LABELS),
        )
        validator.raise_if_invalid()
        if not request.session.id:
            request_context.set_not_repeatable(session_id=session_id)
        session = await sessions.create(self._db, tenant_id, new)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return _response(session)

    async def GetChatSession(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.GetChatSessionRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        validator.raise_if_invalid()
        session = await sessions.get(self._db, tenant_id, session_id)
        return _response(session)

    async def ListChatSessions(
        self, request: pb.ListChatSessionsRequest, context: Context
    ) -> pb.ListChatSessionsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        labels = validator.labels("labels", request.labels, MAX_FILTER_LABELS)
        filters = session_listing.Filter(
            statuses=validator.enum_filter("statuses", request.statuses, convert.SESSION_STATUS),
            has_ticket=request.has_ticket if request.HasField("has_ticket") else None,
            created_from=validator.start_time("start_create_time", request),
            created_to=validator.end_time("end_create_time", request),
            updated_from=validator.start_time("start_update_time", request),
            updated_to=validator.end_time("end_update_time", request),
            user_id=validator.reference("user_id", request.user_id),
            labels=json.dumps(labels) if labels else None,
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
        rows = await session_listing.page(
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

    async def UpdateChatSession(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.UpdateChatSessionRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session.id", request.session.id)
        etag = validator.etag("session.etag", request.session.etag)
        changes = _changes(validator, request)
        validator.raise_if_invalid()
        if etag is not None:
            # Repeated after its own success, the call meets a revision that is not its etag.
            request_context.set_not_repeatable()
        session = await sessions.update(self._db, tenant_id, session_id, changes, etag)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return _response(session)

    async def DeleteChatSession(
        self, request: pb.DeleteChatSessionRequest, context: Context
    ) -> pb.DeleteChatSessionResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        etag = validator.etag("etag", request.etag)
        validator.raise_if_invalid()
        await self._deleter.delete(tenant_id, session_id, etag, allow_missing=request.allow_missing)
        return pb.DeleteChatSessionResponse()

    def WatchChatSession(
        self, request: pb.WatchChatSessionRequest, context: Context
    ) -> AsyncIterator[Any]:  # of bytes, which the types of the stubs do not allow
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        after = validator.non_negative("after_revision", request.after_revision)
        epoch = validator.epoch(request.epoch)
        validator.raise_if_invalid()
        start = self._db, self._watch_hub, tenant_id, session_id, after, epoch
        if request.include_drafts:
            return watch_stream.watch_with_drafts(*start)
        return watch_stream.watch(*start, cast(Any, context).writer)

    def WatchChatSessions(
        self, request: pb.WatchChatSessionsRequest, context: Context
    ) -> AsyncIterator[Any]:  # as above
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        statuses = validator.enum_filter("statuses", request.statuses, convert.SESSION_STATUS)
        session_filter = SessionFilter(
            statuses=None if statuses is None else frozenset(statuses),
            has_ticket=request.has_ticket if request.HasField("has_ticket") else None,
            user_id=validator.reference("user_id", request.user_id),
            labels=validator.labels("labels", request.labels, MAX_FILTER_LABELS),
        )
        digest = paging.digest(tenant_id, request, ("cursor", "from_beginning"))
        start: Cursor | Place | None = BEGINNING if request.from_beginning else None
        if request.cursor:
            start = change_feed_cursor.decode(validator, request.cursor, digest)
            if request.from_beginning:
                validator.add_violation("from_beginning", "not together with a cursor")
        validator.raise_if_invalid()
        return change_feed_stream.watch(
            self._db, self._watch_hub.change_feeds, tenant_id, digest, session_filter, start
        )


def _response(session: sessions.Session) -> bytes:
    """The response to a call that returns one session."""
    return convert.session_field(convert.tenant_field(session.tenant_id), session)


def _changes(validator: Validator, request: pb.UpdateChatSessionRequest) -> sessions.Update:
    session = request.session
    named = validator.update_mask(request.update_mask, ["status", "title", "labels"])
    status = title = labels = None
    if "status" in named:
        status = validator.enum("session.status", session.status, convert.SESSION_STATUS)
    if "title" in named:
        title = validator.optional_title("session.title", session.title)
    if "labels" in named:
        labels = validator.labels("session.labels", session.labels, sessions.MAX_LABELS)
    changed_labels: dict[str, str | None] = {}
    for path in named:
        field, _, key = path.partition(".")
        if field != "labels" or not key:
            continue
        changed_labels[key] = session.labels.get(key)
        if key in session.labels:
            validator.label_value(f"session.labels[{key:.100}]", session.labels[key])
    return sessions.Update(status, title, labels, changed_labels)
