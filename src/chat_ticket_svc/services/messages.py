"""ChatMessageService."""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import grpc.aio

from chat_ticket.v1 import chat_message_pb2 as pb
from chat_ticket.v1 import chat_message_pb2_grpc
from chat_ticket_svc.access import request_context
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import attachment_access, convert, paging
from chat_ticket_svc.services.validate import MAX_UUID, Validator
from chat_ticket_svc.store import (
    append,
    epochs,
    group_commit,
    message_listing,
    messages,
    search,
    sessions,
)
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.search_hits import Hit
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.watch.hub import WatchHub

if TYPE_CHECKING:  # imported at run time only when URLs are checked
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

Context = grpc.aio.ServicerContext[Any, Any]

MAX_SEQUENCE = 2**63 - 1
# An error names the ids of at most this many messages, as its details are limited to 8 KiB.
MAX_NAMED_IDS = 100
# A read costs the server as much as 300 messages do. So a list reads two responses at once while
# its messages are so small that they fit into PAGE_BYTES together.
MAX_SMALL_PAGE = 2 * paging.MAX_STREAM_PAGE


class ChatMessageService(chat_message_pb2_grpc.ChatMessageServiceServicer):
    """Implements chat_message.proto, which documents each method."""

    def __init__(
        self,
        db: Database,
        watch_hub: WatchHub,
        url_checker: "AttachmentUrlChecker | None",
        settings: Settings,
    ):
        self._db = db
        self._search_language = settings.search_language
        self._group_commit = group_commit.GroupCommitWriter(db, settings.search_language)
        self._watch_hub = watch_hub
        self._url_checker = url_checker
        self._limits = settings.limits
        self._url_schemes = settings.attachment_url_schemes
        # A search may hold a connection for a second. So searches get a third of the pool, and one
        # tenant all but one of these connections. Weak: only tenants that search have an entry.
        self._max_searches = max(1, settings.pool_size // 3)
        self._searches = asyncio.Semaphore(self._max_searches)
        self._tenant_searches = WeakValueDictionary[str, asyncio.Semaphore]()

    async def CreateChatMessage(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.CreateChatMessageRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits, self._url_schemes)
        session_id = validator.id("session_id", request.session_id)
        new = [validator.new_message("message", request.message)]
        expected_revision = validator.expected_revision(request)
        validator.raise_if_invalid()
        if not request.message.id:
            request_context.set_not_repeatable(message_id=new[0].id)
        [message] = await self._append(tenant_id, session_id, new, expected_revision)
        return convert.message_field(message)

    async def BatchCreateChatMessages(
        self, request: pb.BatchCreateChatMessagesRequest, context: Context
    ) -> pb.BatchCreateChatMessagesResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits, self._url_schemes)
        session_id = validator.id("session_id", request.session_id)
        new = validator.new_messages("messages", request.messages)
        expected_revision = validator.expected_revision(request)
        validator.raise_if_invalid()
        if not all(message.id for message in request.messages):
            _set_assigned_message_ids(new)
        created = await self._append(tenant_id, session_id, new, expected_revision)
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
        self,
        tenant_id: str,
        session_id: str,
        new: list[messages.NewMessage],
        expected_revision: int | None,
    ) -> list[messages.Message]:
        stored = None
        if urls := [attachment.file_url for message in new for attachment in message.attachments]:
            stored = await attachment_access.find_stored_or_check_urls(
                self._url_checker,
                tenant_id,
                urls,
                lambda: append.find_repeat(self._db, tenant_id, session_id, new),
            )
        if stored is None:
            stored = await self._group_commit.append(tenant_id, session_id, new, expected_revision)
            self._watch_hub.notify_changed(tenant_id, session_id)
        return stored

    async def GetChatMessage(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.GetChatMessageRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        message_id = validator.id("message_id", request.message_id)
        validator.raise_if_invalid()
        message = await messages.get(self._db, tenant_id, message_id)
        return convert.message_field(message)

    async def ListChatMessages(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.ListChatMessagesRequest, context: Context
    ) -> AsyncIterator[bytes | paging.LastResponse]:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        session_id = validator.id("session_id", request.session_id)
        after = validator.non_negative("after_sequence", request.after_sequence)
        before = validator.non_negative("before_sequence", request.before_sequence)
        limit = validator.non_negative("limit", request.limit)
        roles = validator.enum_filter("roles", request.roles, convert.MESSAGE_ROLE)
        epoch = validator.epoch(request.epoch)
        if request.order not in pb.ChatMessageOrder.values():
            validator.add_violation("order", f"unknown enum value {request.order}")
        validator.raise_if_invalid()

        pages = self._read_pages(
            tenant_id,
            session_id,
            after=after,
            before=before,
            descending=request.order == pb.CHAT_MESSAGE_ORDER_DESC,
            roles=roles,
            limit=limit or MAX_SEQUENCE,
            epoch=epoch,
        )
        async with contextlib.aclosing(pages):
            async for session, rows, is_only in pages:
                response = pb.ListChatMessagesResponse(
                    session=convert.session(session) if session else None
                )
                data = response.SerializeToString() + convert.messages(session_id, rows)
                is_last = is_only and len(data) <= paging.MAX_LAST_RESPONSE_BYTES
                yield paging.LastResponse(data) if is_last else data

    async def _read_pages(
        self,
        tenant_id: str,
        session_id: str,
        *,
        after: int,
        before: int,
        descending: bool,
        roles: list[str] | None,
        limit: int,
        epoch: str,
    ) -> AsyncGenerator[tuple[sessions.Session | None, list[message_listing.Row], bool]]:
        """Yield the rows of each response, which double in number. Only the first has the session.

        The last value says whether it is the only response.

        Raises HistoryChangedError if the session does not have the message where the list goes on,
        or no more. Where it begins is checked if `epoch` is not empty.

        From the third on, each page is read while the caller handles the previous one. The second
        is read after the caller has handled the first, so that it does not delay the first.
        """

        def read(
            page_size: int, *, first: bool = False
        ) -> Coroutine[Any, Any, message_listing.MessagePage]:
            return message_listing.page(
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

        page_size = paging.MIN_STREAM_PAGE
        position = before if descending else after
        before = before or MAX_SEQUENCE
        reading: asyncio.Task[message_listing.MessagePage] | None = None
        page = await read(page_size, first=True)
        try:
            while True:
                session, revision, current_epoch, rows, more = page
                if epoch:
                    epochs.check(epoch, position, current_epoch, revision)
                epoch = current_epoch
                is_first = session is not None
                if session is not None:
                    # The list ends at the session's revision in the first page. Messages that are
                    # created during the list do not prolong it.
                    before = min(before, session.revision + 1)
                limit -= len(rows)
                if more and limit:
                    position = message_listing.sequence(rows[-1])
                    if descending:
                        before = position
                    else:
                        after = position
                    page_size = _next_page_size(page_size, rows)
                    if not is_first:
                        reading = asyncio.create_task(read(page_size))
                        await asyncio.sleep(0)  # sends the statement before this page is encoded
                is_only = is_first and not (more and limit)
                for start in range(0, max(len(rows), is_first), paging.MAX_STREAM_PAGE):
                    yield session, rows[start : start + paging.MAX_STREAM_PAGE], is_only
                if not more or not limit:
                    return
                page = await (read(page_size) if reading is None else reading)
                reading = None
        finally:
            # When the caller has left, nobody needs the page that is being read.
            await cancel_and_wait(reading)

    async def UpdateChatMessage(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.UpdateChatMessageRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        message_id = validator.id("message.id", request.message.id)
        etag = validator.etag("message.etag", request.message.etag)
        expected_revision = validator.expected_revision(request)
        metadata = None
        patch = validator.metadata("metadata_merge_json", request.metadata_merge_json)
        if patch is None and not request.update_mask.paths:
            for field in ("update_mask", "metadata_merge_json"):
                validator.add_violation(field, "required: update_mask or metadata_merge_json")
        elif patch is not None and request.update_mask.paths:
            validator.add_violation("update_mask", "not allowed with metadata_merge_json")
        elif patch is None and "metadata_json" in validator.update_mask(
            request.update_mask, ["metadata_json"]
        ):
            metadata = validator.metadata("message.metadata_json", request.message.metadata_json)
        validator.raise_if_invalid()
        if etag is not None:
            # Repeated after its own success, the call meets a revision that is not its etag.
            request_context.set_not_repeatable()
        message = await messages.set_metadata(
            self._db,
            tenant_id,
            message_id,
            metadata,
            patch=patch,
            check_result=self._check_merged_metadata,
            etag=etag,
            expected_revision=expected_revision,
        )
        self._watch_hub.notify_changed(tenant_id, message.session_id)
        return convert.message_field(message)

    def _check_merged_metadata(self, merged: str) -> None:
        validator = Validator(self._limits)
        validator.merged_metadata("metadata_merge_json", merged)
        validator.raise_if_invalid()

    async def DeleteChatMessage(
        self, request: pb.DeleteChatMessageRequest, context: Context
    ) -> pb.DeleteChatMessageResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        message_id = validator.id("message_id", request.message_id)
        etag = validator.etag("etag", request.etag)
        expected_revision = validator.expected_revision(request)
        validator.raise_if_invalid()
        session_id = await messages.delete(
            self._db,
            tenant_id,
            message_id,
            etag=etag,
            expected_revision=expected_revision,
            allow_missing=request.allow_missing,
        )
        if session_id is not None:
            self._watch_hub.notify_changed(tenant_id, session_id)
        return pb.DeleteChatMessageResponse()

    async def RedactChatMessage(  # type: ignore[override] # bytes, which the middleware passes on
        self, request: pb.RedactChatMessageRequest, context: Context
    ) -> bytes:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        message_id = validator.id("message_id", request.message_id)
        etag = validator.etag("etag", request.etag)
        validator.raise_if_invalid()
        message = await messages.redact(self._db, tenant_id, message_id, etag)
        self._watch_hub.notify_changed(tenant_id, message.session_id)
        return convert.message_field(message)

    async def SearchChatMessages(
        self, request: pb.SearchChatMessagesRequest, context: Context
    ) -> pb.SearchChatMessagesResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._limits)
        query = validator.text("query", request.query, self._limits.query)
        session_id = validator.optional_id("session_id", request.session_id)
        roles = validator.enum_filter("roles", request.roles, convert.MESSAGE_ROLE)
        created_from = validator.start_time("start_create_time", request)
        created_to = validator.end_time("end_create_time", request)
        page_size = validator.page_size(request.page_size)
        after_score, after_time, after_id = paging.decode_token(
            validator,
            tenant_id,
            request,
            (math.inf, paging.END_OF_TIME, MAX_UUID),
            paging.parse_real,
            paging.parse_time,
            paging.parse_id,
        )
        validator.raise_if_invalid()
        tenant_searches = self._tenant_searches.setdefault(
            tenant_id, asyncio.Semaphore(max(1, self._max_searches - 1))
        )
        async with tenant_searches, self._searches:
            page = await search.page(
                self._db,
                tenant_id,
                query,
                search_language=self._search_language,
                session_id=session_id,
                roles=roles,
                created_from=created_from,
                created_to=created_to,
                after_score=after_score,
                after_time=after_time,
                after_id=after_id,
                limit=page_size + 1,
            )

        def convert_hit(hit: Hit) -> pb.SearchChatMessagesResponse.Hit:
            return pb.SearchChatMessagesResponse.Hit(
                message_id=hit.match.message_id,
                session_id=hit.match.session_id,
                sequence=hit.match.sequence,
                role=convert.MESSAGE_ROLE[hit.match.role],
                create_time=convert.timestamp(hit.match.created_at),
                score=hit.match.score,
                snippet=[
                    pb.SearchChatMessagesResponse.SnippetPart(text=part.text, hit=part.is_hit)
                    for part in hit.snippet
                ],
            )

        def token(last: Hit) -> str:
            return paging.encode_token(
                tenant_id, request, last.match.score, last.match.created_at, last.match.message_id
            )

        hits, next_page_token = paging.fill_page(page.hits, page_size, convert_hit, token)
        return pb.SearchChatMessagesResponse(
            hits=hits,
            next_page_token=next_page_token,
            incomplete_results=page.incomplete,
            ignored_words=page.ignored_words,
        )


def _next_page_size(page_size: int, rows: list[message_listing.Row]) -> int:
    """Twice as many messages, up to MAX_STREAM_PAGE, or MAX_SMALL_PAGE while all are small."""
    if page_size < paging.MAX_STREAM_PAGE:
        return min(2 * page_size, paging.MAX_STREAM_PAGE)
    are_small = max(map(message_listing.size, rows)) <= messages.PAGE_BYTES // MAX_SMALL_PAGE
    return MAX_SMALL_PAGE if are_small else paging.MAX_STREAM_PAGE


def _set_assigned_message_ids(new: list[messages.NewMessage]) -> None:
    if len(new) > MAX_NAMED_IDS:
        request_context.set_not_repeatable()
    else:
        request_context.set_not_repeatable(message_ids=",".join(message.id for message in new))
