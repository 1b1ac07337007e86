"""ChatDraftService."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc.aio

from chat_ticket.v1 import chat_draft_pb2 as pb
from chat_ticket.v1 import chat_draft_pb2_grpc, resources_pb2
from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.draft_quotas import DraftQuotas
from chat_ticket_svc.config import Settings
from chat_ticket_svc.services import attachment_access, convert
from chat_ticket_svc.services.validate import Validator
from chat_ticket_svc.store import drafts, messages
from chat_ticket_svc.store.attachments import NewAttachment
from chat_ticket_svc.store.database import Database
from chat_ticket_svc.store.draft_commit import DraftEnded, DraftGroupCommit, DraftWriter
from chat_ticket_svc.store.drafts import Lease, NewDraft
from chat_ticket_svc.tasks import cancel_and_wait
from chat_ticket_svc.telemetry import metrics

if TYPE_CHECKING:  # imported at run time only when URLs are checked
    from chat_ticket_svc.services.attachment_url import AttachmentUrlChecker

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[pb.WriteChatDraftRequest]

# A writer that is further ahead than this waits, so that its text does not fill the memory.
MAX_UNWRITTEN_BYTES = 64 * 1024

# The states in which a writer can finish its draft, and their names in the database.
FINISHED_STATES = {
    resources_pb2.CHAT_MESSAGE_STATE_COMPLETE: None,
    resources_pb2.CHAT_MESSAGE_STATE_INCOMPLETE: "incomplete",
}


class ChatDraftService(chat_draft_pb2_grpc.ChatDraftServiceServicer):
    """Implements chat_draft.proto, which documents each method."""

    def __init__(
        self,
        db: Database,
        group_commit: DraftGroupCommit,
        quotas: DraftQuotas,
        url_checker: "AttachmentUrlChecker | None",
        settings: Settings,
        *,
        on_changed: Callable[[str, str], object],
        on_ended: Callable[[str, str], object],
    ):
        """`on_changed` and `on_ended` get (tenant, session) when a draft begins, and ends."""
        self._db = db
        self._on_changed = on_changed
        self._on_ended = on_ended
        self._group_commit = group_commit
        self._quotas = quotas
        self._url_checker = url_checker
        self._settings = settings

    async def WriteChatDraft(
        self, requests: Requests, context: Context
    ) -> AsyncIterator[pb.WriteChatDraftResponse]:
        tenant_id = request_context.tenant_id()
        self._group_commit.raise_if_draining()
        session_id, new, exclusive, expected_revision = await self._read_start(requests)
        request_context.set_draft(session_id, new.id)
        with self._quotas.writing(tenant_id):
            async with self._quotas.turn(tenant_id):
                opened = await drafts.open_(
                    self._db,
                    tenant_id,
                    session_id,
                    new,
                    exclusive=exclusive,
                    expected_revision=expected_revision,
                    lease_seconds=self._settings.draft_seconds,
                )
            if not isinstance(opened, Lease):
                yield _finished(opened)
                return
            if opened.is_takeover:
                metrics.DRAFT_TAKEOVERS.inc()
                self._group_commit.check_drafts((tenant_id, session_id))
            self._on_changed(tenant_id, session_id)
            writer = DraftWriter(tenant_id, session_id, new.id, opened)
            with self._group_commit.writing(writer):
                yield pb.WriteChatDraftResponse(
                    started=pb.WriteChatDraftResponse.Started(
                        length=opened.length, revision=opened.revision
                    )
                )
                responses = self._write(requests, writer)
                async with contextlib.aclosing(responses):
                    async for response in responses:
                        yield response

    async def _write(
        self, requests: Requests, writer: DraftWriter
    ) -> AsyncGenerator[pb.WriteChatDraftResponse]:
        """Add the text that the writer sends, until it finishes the draft or the draft ends."""
        acknowledged = writer.commits
        reading = asyncio.create_task(self._read_text(requests, writer))
        # Wakes the loop below when the reading has ended, be it with an error.
        reading.add_done_callback(lambda _: writer.changed.set())
        try:
            while True:
                if writer.commits > acknowledged:
                    acknowledged = writer.commits
                    yield pb.WriteChatDraftResponse(
                        written=pb.WriteChatDraftResponse.Written(length=writer.length)
                    )
                elif isinstance(writer.error, DraftEnded):
                    yield _stopped(await self._outcome(writer))
                    return
                elif writer.error is not None:
                    raise writer.error
                elif reading.done() and not writer.unwritten_bytes:
                    finish = reading.result()
                    yield await self._finish(writer, finish)
                    return
                else:
                    writer.changed.clear()
                    await writer.changed.wait()
        finally:
            await cancel_and_wait(reading)

    async def _read_start(self, requests: Requests) -> tuple[str, NewDraft, bool, int | None]:
        """The session, the draft, whether it must be the only one, and the expected revision."""
        validator = Validator(self._settings.limits)
        request = await anext(requests, pb.WriteChatDraftRequest())
        if not request.HasField("start"):
            validator.add_violation("start", "required in the first request")
            validator.raise_if_invalid()
        start = request.start
        session_id = validator.id("start.session_id", start.session_id)
        author_kind, author_id = validator.author("start.draft.author", start.draft.author)
        new = NewDraft(
            id=validator.id("start.draft.id", start.draft.id),
            role=validator.enum("start.draft.role", start.draft.role, convert.MESSAGE_ROLE),
            language_code=validator.language_code(
                "start.draft.language_code", start.draft.language_code
            ),
            metadata=validator.metadata("start.draft.metadata_json", start.draft.metadata_json),
            author_kind=author_kind,
            author_id=author_id,
        )
        expected_revision = validator.expected_revision(start, "start.")
        validator.raise_if_invalid()
        return session_id, new, start.exclusive, expected_revision

    async def _read_text(
        self, requests: Requests, writer: DraftWriter
    ) -> pb.WriteChatDraftRequest.Finish:
        """Read what the writer appends, up to its `finish`."""
        async for request in requests:
            kind = request.WhichOneof("request")
            if kind == "finish":
                return request.finish
            if kind is None:
                raise errors.InvalidArgumentError(
                    [
                        errors.Violation(field, "required: append or finish")
                        for field in ("append", "finish")
                    ]
                )
            if kind != "append":
                raise _invalid(kind, "only in the first request")
            await self._append(writer, request.append)
        raise _invalid("finish", "required as the last request")

    async def _append(self, writer: DraftWriter, append: pb.WriteChatDraftRequest.Append) -> None:
        text, offset = append.text, append.offset
        size = len(text) if text.isascii() else len(text.encode())
        length = writer.accepted_length
        if offset < 0:
            raise _invalid("append.offset", f"integer {offset:,}, at least 0")
        if "\0" in text:
            raise _invalid("append.text", "contains a NUL character")
        limit = self._settings.limits.content_bytes
        if offset + size > limit:
            raise _invalid(
                "append.text", f"content of {offset + size:,} bytes of UTF-8, at most {limit:,}"
            )
        if offset > length:
            raise errors.OutOfRangeError(
                f"offset {offset} is after the end of the draft, at {length}",
                reason="DRAFT_GAP",
                metadata={"length": str(length)},
            )
        # A writer whose text waits is not silent.
        with self._group_commit.renewing(writer):
            await self._quotas.pace(writer.tenant_id, size)
        if offset < length and size:
            text = await self._after_repeat(writer, offset, text)
            size = len(text.encode())
        self._group_commit.append(writer, text, size)
        if writer.unwritten_bytes > MAX_UNWRITTEN_BYTES:
            await writer.wait_until_written(MAX_UNWRITTEN_BYTES)

    async def _after_repeat(self, writer: DraftWriter, offset: int, text: str) -> str:
        """The part of `text` that the draft does not have. Raises AbortedError if they differ."""
        await writer.wait_until_written()
        # The whole draft is read, however short the text is.
        await self._quotas.pace(writer.tenant_id, writer.length)
        draft = await drafts.find(self._db, writer.tenant_id, writer.draft_id)
        if draft is None:
            # At once: the next text is no gap.
            writer.fail(DraftEnded())
            return ""
        # Not what comes after it: that is of a writer that has taken the draft over.
        stored = draft.content.encode()[offset : writer.length]
        repeated = text.encode()
        overlap = min(len(stored), len(repeated))
        if stored[:overlap] != repeated[:overlap]:
            raise errors.AbortedError(
                f"the draft has other text at offset {offset}",
                reason="DRAFT_CONFLICT",
                metadata={"length": str(draft.length)},
            )
        return repeated[overlap:].decode()

    async def _finish(
        self, writer: DraftWriter, finish: pb.WriteChatDraftRequest.Finish
    ) -> pb.WriteChatDraftResponse:
        validator = Validator(self._settings.limits, self._settings.attachment_url_schemes)
        if finish.state not in FINISHED_STATES:
            validator.add_violation("finish.state", "neither COMPLETE nor INCOMPLETE")
        metadata = validator.metadata("finish.metadata_json", finish.metadata_json)
        attachments = validator.new_attachments("finish.attachments", finish.attachments)
        validator.raise_if_invalid()
        state = FINISHED_STATES[finish.state]
        # A writer that waits for its end is not silent.
        with self._group_commit.renewing(writer):
            await self._check_urls(writer, attachments)
            async with self._quotas.turn(writer.tenant_id):
                message = await drafts.finish(
                    self._db,
                    writer.tenant_id,
                    writer.session_id,
                    writer.draft_id,
                    state,
                    default_search_language=self._settings.search_language,
                    fencing_token=writer.fencing_token,
                    metadata=metadata,
                    new_attachments=attachments,
                )
        self._on_ended(writer.tenant_id, writer.session_id)
        # Somebody else can have ended it in the last moment.
        if message is not None and message.state not in (None, state):
            return _stopped(message)
        return _finished(message)

    async def _check_urls(self, writer: DraftWriter, attachments: Sequence[NewAttachment]) -> None:
        async def find_stored() -> messages.Message | None:
            return None  # a draft that is open has stored none

        await attachment_access.find_stored_or_check_urls(
            self._url_checker,
            writer.tenant_id,
            [attachment.file_url for attachment in attachments],
            find_stored,
        )

    async def _outcome(self, writer: DraftWriter) -> messages.Message | None:
        return await drafts.outcome(self._db, writer.tenant_id, writer.session_id, writer.draft_id)

    async def StopChatDraft(
        self, request: pb.StopChatDraftRequest, context: Context
    ) -> pb.StopChatDraftResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._settings.limits)
        draft_id = validator.id("draft_id", request.draft_id)
        validator.raise_if_invalid()
        session_id, message = await drafts.stop(
            self._db,
            tenant_id,
            draft_id,
            default_search_language=self._settings.search_language,
        )
        self._on_ended(tenant_id, session_id)
        return pb.StopChatDraftResponse(message=convert.message(message) if message else None)

    async def GetChatDraft(
        self, request: pb.GetChatDraftRequest, context: Context
    ) -> pb.GetChatDraftResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._settings.limits)
        draft_id = validator.id("draft_id", request.draft_id)
        validator.raise_if_invalid()
        draft = await drafts.get(self._db, tenant_id, draft_id)
        return pb.GetChatDraftResponse(draft=convert.draft(draft))

    async def ListChatDrafts(
        self, request: pb.ListChatDraftsRequest, context: Context
    ) -> pb.ListChatDraftsResponse:
        tenant_id = request_context.tenant_id()
        validator = Validator(self._settings.limits)
        session_id = validator.id("session_id", request.session_id)
        validator.raise_if_invalid()
        rows = await drafts.of_session(self._db, tenant_id, session_id)
        return pb.ListChatDraftsResponse(drafts=map(convert.draft, rows))


def _invalid(field: str, description: str) -> errors.InvalidArgumentError:
    return errors.InvalidArgumentError([errors.Violation(field, description)])


def _finished(message: messages.Message | None) -> pb.WriteChatDraftResponse:
    return pb.WriteChatDraftResponse(
        finished=pb.WriteChatDraftResponse.Finished(
            message=convert.message(message) if message else None
        )
    )


def _stopped(message: messages.Message | None) -> pb.WriteChatDraftResponse:
    return pb.WriteChatDraftResponse(
        stopped=pb.WriteChatDraftResponse.Stopped(
            message=convert.message(message) if message else None
        )
    )
