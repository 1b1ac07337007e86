"""The client for asyncio. The synchronous one is generated from this file (make proto)."""

import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client import _runtime_asyncio as runtime
from chat_ticket.client._channel import CallMetadata, options_for
from chat_ticket.client._channel_pool import ChannelPool
from chat_ticket.client._drafts import ChatDraftWriter, metadata_json
from chat_ticket.client._follow_async import SessionsFollower
from chat_ticket.client._resume import ListProgress, WatchProgress
from chat_ticket.client._resumed_async import ResumedStreams
from chat_ticket.client._retry import (
    backoff_seconds,
    calls_bounded_by,
    is_retryable,
    require_repeatable,
)
from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_draft_pb2 import WriteChatDraftRequest
from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2 import (
    WatchChatSessionResponse,
    WatchChatSessionsRequest,
    WatchChatSessionsResponse,
)
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub
from chat_ticket.v1.resources_pb2 import (
    ChatDraft,
    ChatMessage,
    ChatMessageAuthor,
    ChatSessionStatus,
)

if TYPE_CHECKING:  # the type stubs alone have these names
    from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceAsyncStub
    from chat_ticket.v1.chat_draft_pb2_grpc import ChatDraftServiceAsyncStub
    from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceAsyncStub
    from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceAsyncStub
    from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceAsyncStub
    from chat_ticket.v1.resources_pb2 import ChatMessageRole

log = logging.getLogger("chat_ticket.client")

Request = TypeVar("Request")
Response = TypeVar("Response")

# Three times the server's default interval of heartbeats.
SILENCE_SECONDS = 45.0

# How often `retry` logs that it still fails.
RETRY_LOG_SECONDS = 10.0

# How long a watch tries to read something again: as good as no limit, as for its stream.
READ_SECONDS = 24 * 3600.0


class AsyncChatTicketClient:
    """A client of the chat ticket service, for one tenant.

    Its stubs are `sessions`, `messages`, `drafts`, `attachments` and `tickets`. Their calls raise
    the exceptions of `chat_ticket.errors`. gRPC retries reads on UNAVAILABLE until their deadline;
    writes are not retried: use `retry`.

    The client has connections of its own, and one more for every 50 open streams. So calls with
    one response do not wait behind streams, and the number of streams is limited by quotas only.

    Create the client inside the event loop that uses it, and close it. A cancelled task cancels
    its call and gets asyncio.CancelledError as usual.

    Parameters:

    - `target`: a gRPC target, such as `localhost:50051` or `dns:///chat.example:443`.
    - `tenant`: sent as `x-tenant-id`. Optional when the token or the client certificate is valid
      for exactly one tenant.
    - `token`: sent as `authorization: Bearer`. A string, or a function or coroutine function that
      returns one. The function is called for each call, so it should cache its result until that
      is about to expire; if it raises, so does the call.
    - `credentials`: of the channel, such as `grpc.ssl_channel_credentials()`. The default is plain
      text. A token is sent in plain text to this machine only: to `localhost`, a loopback address
      or a Unix socket.
    - `timeout`: the deadline in seconds of calls with one response that set no `timeout` of their
      own. Streams have none.
    - `options`: gRPC channel options. They override those of `channel_options()`.

    Raises ValueError for a token that would go to another machine in plain text, and for a tenant
    or token that is not printable ASCII, such as one that ends in a line break.
    """

    sessions: "ChatSessionServiceAsyncStub"
    messages: "ChatMessageServiceAsyncStub"
    drafts: "ChatDraftServiceAsyncStub"
    attachments: "ChatAttachmentServiceAsyncStub"
    tickets: "ChatTicketServiceAsyncStub"

    def __init__(
        self,
        target: str,
        *,
        tenant: str | None = None,
        token: runtime.Token | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = 10.0,
        options: Sequence[tuple[str, Any]] = (),
    ):
        all_options = options_for(
            target,
            has_token=token is not None,
            has_credentials=credentials is not None,
            options=options,
        )
        self._closing = runtime.Closing()
        self._resumed = ResumedStreams(self._closing, renews_token=callable(token)).items
        self._channels: ChannelPool[runtime.Channel] = ChannelPool(
            functools.partial(
                runtime.open_channel,
                target,
                metadata=CallMetadata(tenant, token),
                timeout=timeout,
                credentials=credentials,
                options=all_options,
                closing=self._closing,
            )
        )
        channel: Any = self._channels
        self.sessions = ChatSessionServiceStub(channel)
        self.messages = ChatMessageServiceStub(channel)
        self.drafts = ChatDraftServiceStub(channel)
        self.attachments = ChatAttachmentServiceStub(channel)
        self.tickets = ChatTicketServiceStub(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End all calls, by CallCancelledError, and close the connections."""
        self._closing.begin()
        await runtime.close(self._channels.close())

    async def retry(
        self,
        method: Callable[[Request], Awaitable[Response]],
        request: Request,
        *,
        timeout: float = 60.0,
    ) -> Response:
        """Make a call, and make it again until its outcome is known.

            await client.retry(client.messages.CreateChatMessage, request)

        Only for calls that are safe to repeat: reads, deletes, updates without an etag, and creates
        whose request sets the ids. ValueError, before anything is sent, for a create without them
        and an update with an etag. The ids are `session.id`, `message.id`, `messages[i].id`,
        `attachment.id`, and `chat_ticket_id` or `ticket.id`. (When a delete without
        `allow_missing` is repeated, it may raise NotFoundError although it succeeded.)

        Retries errors that have `retry_seconds`, UnavailableError, DeadlineExceededError and
        CallCancelledError, with exponential backoff, and not before `retry_seconds`. Any other
        error is raised at once. After `timeout` seconds the last error is raised: no attempt takes
        longer than what is left of them. The logger `chat_ticket.client` warns of the first failure
        at once, and then every ten seconds.
        """
        require_repeatable(request)
        deadline = time.monotonic() + timeout
        next_log = time.monotonic()
        failures = 0
        while True:
            try:
                with calls_bounded_by(deadline):
                    return await method(request)
            except ChatTicketError as error:
                now, pause = time.monotonic(), backoff_seconds(failures, error)
                if not is_retryable(error) or self._closing.has_begun or now + pause > deadline:
                    raise
                failures += 1
                if now >= next_log:
                    next_log = now + RETRY_LOG_SECONDS
                    log.warning(
                        "%s: attempt %d failed, retrying for %.0f s more: %s",
                        type(request).__name__.removesuffix("Request"),
                        failures,
                        deadline - now,
                        error,
                    )
            await self._closing.sleep(pause)

    def watch(
        self,
        session_id: str,
        after_revision: int = 0,
        *,
        epoch: str = "",
        include_drafts: bool = False,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> AsyncGenerator[WatchChatSessionResponse, None]:
        """Every change of a session after a revision: first the past ones, then new ones live.

        It is one WatchChatSession stream that does not break. It resumes after the last event when
        the server stops, drains or cannot be reached, when the token expires and `token` is a
        function, and when nothing arrives for `silence_seconds`. (The server sends heartbeats,
        every 15 seconds by default.) It retries without a limit; set one with asyncio.timeout.
        Each retry is logged by the logger `chat_ticket.client`.

        Each event is delivered exactly once. The session comes first, and again after a break if
        its status or ticket changed. It shows the current state, so it may be ahead of the events
        that follow, up to its `revision`. When the session is deleted during a break, the watch
        still delivers `session_deleted`.

        With `include_drafts`, the watch also shows the messages that are being written: `draft`,
        `draft_appended` and `draft_ended`. These events go on over a break as well. What a draft
        has gained during the break comes as `draft_appended`, and a draft that has ended as
        `draft_ended`, just before its message.

        To continue in another process, store the `revision` and the `epoch` of an event after you
        have handled the whole event, and pass them as `after_revision` and `epoch`. An event that
        was handled in part is delivered again, as a whole. Slow readers lose nothing: events are
        read on demand.

        The database can lose changes when it is restored or a standby is promoted. Then the watch
        tells what is gone or different, and goes on after the last revision that both histories
        share. A lost message is deleted; it is created again if it is in the new history. A message
        that was changed since is read again, and is updated, created or deleted. Open drafts end
        and begin again. These events have the position before, so that nothing is lost when you
        stop between them. Then a heartbeat has the shared position, which is lower. The watch
        remembers its last 50,000 to 100,000 changes of messages for this, in at most 3.2 MB. It
        logs a warning.

        The watch ends after `session_deleted`, and by CallCancelledError when the client is
        closed. When you leave the loop or cancel the task, the stream ends at the server too. If
        you hold the iterator itself, close it with `aclose` or contextlib.aclosing.

        Raises HistoryChangedError when changes are lost that the watch does not remember, or that
        were delivered before `after_revision`. Forget what came after the `revision` of the error,
        or watch again from 0. Raises errors that a retry cannot solve: NotFoundError when the
        session does not exist, OutOfRangeError for a revision that it has not reached,
        InvalidArgumentError, PermissionDeniedError, UnauthenticatedError, UnimplementedError, and
        InternalError with a reason.
        """
        progress = WatchProgress(session_id, after_revision, epoch, include_drafts=include_drafts)
        return self._corrected(progress, f"watch of session {session_id}", silence_seconds)

    def follow_sessions(
        self,
        cursor: str = "",
        *,
        from_beginning: bool = False,
        statuses: Iterable["ChatSessionStatus.ValueType"] = (),
        has_ticket: bool | None = None,
        user_id: str = "",
        labels: Mapping[str, str] | None = None,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> AsyncGenerator[WatchChatSessionsResponse, None]:
        """Every change of the tenant's sessions and tickets after a cursor, or from now on.

            async for response in client.follow_sessions(cursor):
                for event in response.events:
                    ...
                cursor = response.cursor

        It is one WatchChatSessions stream that does not break: it resumes as `watch` does, after
        the last response. `caught_up` comes once. Store the cursor of a response when you have
        handled its events, and pass it to go on in another process, with the same filters.

        - `from_beginning`: whether to begin with all sessions and tickets that exist.
        - `statuses`, `has_ticket`, `user_id`, `labels`: as in WatchChatSessionsRequest.

        When the database is restored or a standby is promoted, changes that were told can be lost.
        Then the watch reads again what may be lost, and tells what is gone or different by ordinary
        events. So what is told last is right, also if its revision is lower than before. These
        events have the old cursor: whoever leaves between them is not told that all is well. The
        watch remembers the last 10,000 sessions and tickets that it told, in about 5 MB, and logs a
        warning.

        Raises CursorExpiredError for a cursor that is too old, and HistoryChangedError when more
        may be lost than what this call has told and remembers. In both cases follow from the
        beginning, and drop what is not told until `caught_up`. Raises the errors that a retry
        cannot solve, as `watch` does.
        """
        request = WatchChatSessionsRequest(
            cursor=cursor,
            from_beginning=from_beginning,
            statuses=statuses,
            has_ticket=has_ticket,
            user_id=user_id,
            labels=labels,
        )
        resumed = functools.partial(self._resumed, silence_seconds=silence_seconds)
        return SessionsFollower(self, request, resumed, self._find, self._closing.sleep).responses()

    def messages_of(
        self, session_id: str, after_sequence: int = 0, *, timeout: float = 60.0
    ) -> AsyncGenerator[ChatMessage, None]:
        """The messages of a session after a sequence, in order, each exactly once.

        It is one ListChatMessages stream that does not break. It resumes after the last message
        when the server stops or cannot be reached, when the connection ends (a server may limit its
        age), and when the token expires and `token` is a function. It ends where the first stream
        would have: at the messages that existed when it began.

        When nothing arrives for `timeout` seconds in spite of retries, the last error is raised.
        Each retry is logged by the logger `chat_ticket.client`.

        Raises the errors that a retry cannot solve, as `watch` does: NotFoundError also when the
        session is deleted meanwhile, and HistoryChangedError when the database has lost messages
        that were listed. Those with a sequence above the `revision` of the error are no more.
        """
        progress = ListProgress(session_id, after_sequence)
        return self._resumed(
            lambda: self.messages.ListChatMessages(progress.request()),
            progress,
            f"list of session {session_id}",
            silence_seconds=min(SILENCE_SECONDS, timeout),
            timeout=timeout,
        )

    def write(
        self,
        session_id: str,
        *,
        role: "ChatMessageRole.ValueType",
        author: ChatMessageAuthor | None = None,
        exclusive: bool = False,
        draft_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        language_code: str = "",
        expected_revision: int | None = None,
        timeout: float = 60.0,
    ) -> ChatDraftWriter:
        """Write a draft piece by piece: a message that others can read while it grows.

            async with client.write(session_id, role=CHAT_MESSAGE_ROLE_ASSISTANT) as draft:
                async for words in draft.until_stopped(generate()):
                    await draft.append(words)
            print(draft.message)

        The block begins when the draft is open. Leaving it finishes the draft as a message with the
        draft's id, and leaving it by an exception as an INCOMPLETE one. ChatDraftWriter says more.

        It is one WriteChatDraft stream that does not break. It resumes as `watch` does, on any
        server, and sends again what is not durable. When nothing is acknowledged for `timeout`
        seconds in spite of retries, the last error is raised.

        - `author`: who writes the message, beside its role.
        - `exclusive`: whether the draft must be the only open one of its session.
        - `draft_id`: to take over an open draft of a writer that is gone. Its text is kept, so go
          on at `draft.length`. If it is a message by now, the block begins with `draft.stopped`.
          The default is a new id.
        - `metadata`: of the message. `draft.finish` can replace it.
        - `expected_revision`: the revision that the session must have when a new draft begins.

        Raises AlreadyExistsError with the reason DRAFT_OPEN when `exclusive` is refused,
        AbortedError with DRAFT_TAKEN_OVER when another writer has taken the draft over,
        NotFoundError when the session is deleted, and the other errors of WriteChatDraft.
        """
        draft = ChatDraft(
            id=draft_id or str(uuid.uuid4()),
            role=role,
            author=author,
            metadata_json=metadata_json(metadata),
            language_code=language_code,
        )
        return ChatDraftWriter(
            WriteChatDraftRequest.Start(
                session_id=session_id,
                draft=draft,
                exclusive=exclusive,
                expected_revision=expected_revision,
            ),
            self.drafts.WriteChatDraft,
            functools.partial(self._resumed, silence_seconds=SILENCE_SECONDS, timeout=timeout),
        )

    async def _corrected(
        self, progress: WatchProgress, name: str, silence_seconds: float
    ) -> AsyncGenerator[WatchChatSessionResponse, None]:
        """What a watch delivers, also when the database has lost changes that were delivered."""
        changes = 0
        while True:
            stream = self._resumed(
                lambda: self.sessions.WatchChatSession(progress.request()),
                progress,
                name,
                silence_seconds=silence_seconds,
            )
            try:
                async with aclosing(stream):
                    async for event in stream:
                        changes = 0
                        yield event
                return
            except errors.HistoryChangedError as error:
                change = error
            except errors.OutOfRangeError:
                if not progress.has_new_epoch:
                    raise
                continue  # a stream that names its epoch is told what is shared
            corrections = progress.corrections(change)
            log.warning("%s: tells what is gone or different: %s", name, change)
            for event in corrections.first_events():
                yield event
            while (request := corrections.next_read()) is not None:
                found = await self._find(self.messages.GetChatMessage, request)
                for event in corrections.on_read(None if found is None else found.message):
                    yield event
            for event in corrections.last_events():
                yield event
            progress.resume_after(corrections)
            # Servers that disagree about the history must not keep the client busy.
            await self._closing.sleep(backoff_seconds(changes, None))
            changes += 1

    async def _find(
        self, method: Callable[[Request], Awaitable[Response]], request: Request
    ) -> Response | None:
        """The response of a read, which is tried as long as it takes. None if it finds nothing."""
        try:
            return await self.retry(method, request, timeout=READ_SECONDS)
        except errors.NotFoundError:
            return None
        except ValueError:  # as gRPC calls a closed channel
            if self._closing.has_begun:
                raise errors.client_closed() from None
            raise
