"""ChatMessageService."""

import asyncio
import contextlib
import math
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any
from weakref import WeakValueDictionary

import grpc.aio

from chat_ticket.v1 import chat_message_pb2 as pb
from chat_ticket.v1 import chat_message_pb2_grpc
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import attachment_access, convert, paging
from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker
from chat_ticket_svc.services.validate import LAST_ID, Check
from chat_ticket_svc.store import group_commit, message_listing, messages, search, sessions
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.watch.hub import WatchHub

Context = grpc.aio.ServicerContext[Any, Any]

AFTER_THE_LAST = 2**63 - 1


class ChatMessageService(chat_message_pb2_grpc.ChatMessageServiceServicer):
    """See chat_message.proto."""

    def __init__(
        self,
        db: Database,
        watch_hub: WatchHub,
        urls: AttachmentUrlChecker | None,
        settings: Settings,
    ):
        self._db = db
        self._appends = group_commit.GroupCommitWriter(db)
        self._watch_hub = watch_hub
        self._urls = urls
        self._limits = settings.limits
        self._url_schemes = settings.attachment_url_schemes
        # A search can take a connection for a second: most are left to everybody else, and of these
        # few one to the other tenants. Weak: who does not search is forgotten.
        self._searches = max(1, settings.pool_size // 3)
        self._searching = asyncio.Semaphore(self._searches)
        self._shares = WeakValueDictionary[str, asyncio.Semaphore]()

    async def CreateChatMessage(
        self, request: pb.CreateChatMessageRequest, context: Context
    ) -> pb.CreateChatMessageResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits, self._url_schemes)
        session_id = check.id("session_id", request.session_id)
        new = [check.new_message("message", request.message)]
        check.together("message", new)
        check.done()
        [message] = await self._append(tenant_id, session_id, new)
        return pb.CreateChatMessageResponse(message=convert.message(message))

    async def BatchCreateChatMessages(
        self, request: pb.BatchCreateChatMessagesRequest, context: Context
    ) -> pb.BatchCreateChatMessagesResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits, self._url_schemes)
        session_id = check.id("session_id", request.session_id)
        new = check.new_messages("messages", request.messages)
        check.together("messages", new)
        check.done()
        created = await self._append(tenant_id, session_id, new)
        return pb.BatchCreateChatMessagesResponse(
            messages=[
                pb.BatchCreateChatMessagesResponse.CreatedChatMessage(
                    id=message.id,
                    sequence=message.sequence,
                    create_time=convert.timestamp(message.created_at),
                )
                for message in created
            ]
        )

    async def _append(
        self, tenant_id: str, session_id: str, new: list[messages.NewMessage]
    ) -> list[messages.Message]:
        stored = await attachment_access.repeat_or_check(
            self._urls,
            tenant_id,
            [each.file_url for message in new for each in message.attachments],
            lambda: group_commit.repeated(self._db, tenant_id, session_id, new),
        )
        if stored is None:
            stored = await self._appends.append(tenant_id, session_id, new)
            self._watch_hub.notify_changed(tenant_id, session_id)
        return stored

    async def GetChatMessage(
        self, request: pb.GetChatMessageRequest, context: Context
    ) -> pb.GetChatMessageResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        message_id = check.id("message_id", request.message_id)
        check.done()
        message = await messages.get(self._db, tenant_id, message_id)
        return pb.GetChatMessageResponse(message=convert.message(message))

    async def ListChatMessages(  # type: ignore[override] # bytes, which pass as they are
        self, request: pb.ListChatMessagesRequest, context: Context
    ) -> AsyncIterator[bytes]:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        session_id = check.id("session_id", request.session_id)
        after = check.not_negative("after_sequence", request.after_sequence)
        before = check.not_negative("before_sequence", request.before_sequence)
        limit = check.not_negative("limit", request.limit)
        roles = check.choices("roles", request.roles, convert.MESSAGE_ROLE)
        if request.order not in pb.ChatMessageOrder.values():
            check.add("order", f"has the unknown value {request.order}")
        check.done()

        pages = self._pages(
            tenant_id,
            session_id,
            after=after,
            before=before or AFTER_THE_LAST,
            descending=request.order == pb.CHAT_MESSAGE_ORDER_DESC,
            roles=roles,
            limit=limit or AFTER_THE_LAST,
        )
        async with contextlib.aclosing(pages):
            async for session, rows in pages:
                response = pb.ListChatMessagesResponse(
                    session=convert.session(session) if session else None
                )
                yield response.SerializeToString() + convert.messages(session_id, rows)

    async def _pages(
        self,
        tenant_id: str,
        session_id: str,
        *,
        after: int,
        before: int,
        descending: bool,
        roles: list[str] | None,
        limit: int,
    ) -> AsyncGenerator[tuple[sessions.Session | None, list[message_listing.Row]]]:
        """Pages that double in size, each but the second read while the one before is taken.

        The first has the session, and all end with what it held then.
        """

        def read(page_size: int, *, first: bool = False) -> asyncio.Task[message_listing.Page]:
            return asyncio.create_task(
                message_listing.page(
                    self._db,
                    tenant_id,
                    session_id,
                    first=first,
                    after=after,
                    before=before,
                    descending=descending,
                    roles=roles,
                    limit=min(page_size, limit),
                )
            )

        page_size = paging.FIRST_PAGE
        reading = read(page_size, first=True)
        try:
            while True:
                session, found, more = await reading
                if session is not None:
                    before = min(before, session.revision + 1)
                limit -= len(found)
                if more and limit:
                    if descending:
                        before = message_listing.sequence(found[-1])
                    else:
                        after = message_listing.sequence(found[-1])
                    page_size = min(2 * page_size, paging.LARGEST_PAGE)
                    if session is None:
                        reading = read(page_size)
                        await asyncio.sleep(0)  # the statement is sent before this page is encoded
                if found or session is not None:
                    yield session, found
                if not more or not limit:
                    return
                if session is not None:  # the first page had all there is to itself
                    reading = read(page_size)
        finally:
            # The caller has left in the middle: the page on its way is of no use to anybody.
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def UpdateChatMessage(
        self, request: pb.UpdateChatMessageRequest, context: Context
    ) -> pb.UpdateChatMessageResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        message_id = check.id("message.id", request.message.id)
        metadata = None
        if "metadata_json" in check.mask(request.update_mask, ["metadata_json"]):
            metadata = check.metadata("message.metadata_json", request.message.metadata_json)
        check.done()
        message = await messages.set_metadata(self._db, tenant_id, message_id, metadata)
        self._watch_hub.notify_changed(tenant_id, message.session_id)
        return pb.UpdateChatMessageResponse(message=convert.message(message))

    async def DeleteChatMessage(
        self, request: pb.DeleteChatMessageRequest, context: Context
    ) -> pb.DeleteChatMessageResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        message_id = check.id("message_id", request.message_id)
        check.done()
        session_id = await messages.delete(self._db, tenant_id, message_id)
        self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatMessageResponse()

    async def SearchChatMessages(
        self, request: pb.SearchChatMessagesRequest, context: Context
    ) -> pb.SearchChatMessagesResponse:
        tenant_id = request_context.tenant_id()
        check = Check(self._limits)
        query = check.text("query", request.query, self._limits.query)
        session_id = check.optional_id("session_id", request.session_id)
        roles = check.choices("roles", request.roles, convert.MESSAGE_ROLE)
        created_from = check.time(
            "start_create_time", request.HasField("start_create_time"), request.start_create_time
        )
        created_to = check.time(
            "end_create_time", request.HasField("end_create_time"), request.end_create_time
        )
        page_size = check.page_size(request.page_size)
        after_score, after_time, after_id = paging.position(
            check,
            tenant_id,
            request,
            (math.inf, paging.END_OF_TIME, LAST_ID),
            paging.number_of,
            paging.time_of,
            paging.id_of,
        )
        check.done()
        # Nobody who wrote a message could know these, so nothing in it can look like a hit.
        start_marker, stop_marker = secrets.token_hex(16), secrets.token_hex(16)
        share = self._shares.setdefault(tenant_id, asyncio.Semaphore(max(1, self._searches - 1)))
        async with share, self._searching:
            found = await search.page(
                self._db,
                tenant_id,
                query,
                session_id=session_id,
                roles=roles,
                created_from=created_from,
                created_to=created_to,
                after_score=after_score,
                after_time=after_time,
                after_id=after_id,
                start_marker=start_marker,
                stop_marker=stop_marker,
                limit=page_size + 1,
            )

        def convert_hit(hit: search.Hit) -> pb.SearchChatMessagesResponse.Hit:
            return pb.SearchChatMessagesResponse.Hit(
                message_id=hit.message_id,
                session_id=hit.session_id,
                sequence=hit.sequence,
                role=convert.MESSAGE_ROLE[hit.role],
                create_time=convert.timestamp(hit.created_at),
                score=hit.score,
                snippet=_snippet(hit.headline, start_marker, stop_marker),
            )

        def token(last: search.Hit) -> str:
            return paging.token(tenant_id, request, last.score, last.created_at, last.message_id)

        hits, next_page_token = paging.fill(found.hits, page_size, convert_hit, token)
        return pb.SearchChatMessagesResponse(
            hits=hits, next_page_token=next_page_token, incomplete_results=found.incomplete
        )


def _snippet(
    headline: str, start_marker: str, stop_marker: str
) -> list[pb.SearchChatMessagesResponse.SnippetPart]:
    if len(headline) == search.HEADLINE_CHARACTERS:  # cut off, perhaps within a marker
        headline = re.sub(f"{start_marker[0]}[0-9a-f]*$|{stop_marker[0]}[0-9a-f]*$", "", headline)
    parts = []
    hit = False
    for text in re.split(f"({start_marker}|{stop_marker})", headline):
        if text in (start_marker, stop_marker):
            hit = text == start_marker
        elif text:
            parts.append(pb.SearchChatMessagesResponse.SnippetPart(text=text, hit=hit))
    return parts
