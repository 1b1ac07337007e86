"""The client for asyncio. The synchronous one is generated from this file (make proto)."""

import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc

from chat_ticket import errors
from chat_ticket.client import _runtime_asyncio as runtime
from chat_ticket.client._channel import CallMetadata, options_for
from chat_ticket.client._resume import ResumeState
from chat_ticket.client._retry import backoff_seconds, is_retryable
from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub

if TYPE_CHECKING:  # the type stubs alone have these names
    from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceAsyncStub
    from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceAsyncStub
    from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceAsyncStub
    from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceAsyncStub

log = logging.getLogger("chat_ticket.client")

Request = TypeVar("Request")
Response = TypeVar("Response")

# Three times the server's default interval of heartbeats.
SILENCE_SECONDS = 45.0

# A token may expire on its way to the server, so the watch asks for a new one. More expired tokens
# in a row than this are an error of their source.
MAX_EXPIRED_TOKENS = 3


class AsyncChatTicketClient:
    """A client of the chat ticket service, for one tenant.

    Its stubs are `sessions`, `messages`, `attachments` and `tickets`. Their calls raise the
    exceptions of `chat_ticket.errors`. gRPC retries reads on UNAVAILABLE until their deadline;
    writes are not retried: use `retry`.

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
        self._renews_token = callable(token)
        self._channel = runtime.open_channel(
            target,
            metadata=CallMetadata(tenant, token),
            timeout=timeout,
            credentials=credentials,
            options=all_options,
        )
        self.sessions = ChatSessionServiceStub(self._channel)
        self.messages = ChatMessageServiceStub(self._channel)
        self.attachments = ChatAttachmentServiceStub(self._channel)
        self.tickets = ChatTicketServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel all calls and close the connections."""
        await self._channel.close()

    async def retry(
        self,
        method: Callable[[Request], Awaitable[Response]],
        request: Request,
        *,
        timeout: float = 60.0,
    ) -> Response:
        """Make a call, and make it again until its outcome is known.

            await client.retry(client.messages.CreateChatMessage, request)

        Only for calls that are safe to repeat: reads, creates whose request sets the ids of all
        new resources, and updates without an etag. (When a delete is repeated, it may raise
        NotFoundError although it succeeded.)

        Retries errors that have `retry_seconds`, UnavailableError, DeadlineExceededError and
        CallCancelledError, with exponential backoff. Any other error is raised at once. After
        `timeout` seconds the last error is raised.
        """
        deadline = time.monotonic() + timeout
        failures = 0
        while True:
            try:
                return await method(request)
            except ChatTicketError as error:
                pause = backoff_seconds(failures, error)
                if not is_retryable(error) or time.monotonic() + pause > deadline:
                    raise
            failures += 1
            await runtime.sleep(pause)

    async def watch(
        self,
        session_id: str,
        after_revision: int = 0,
        *,
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

        To continue in another process, store the `revision` of an event after you have handled
        the whole event, and pass it as `after_revision`. An event that was handled in part is
        delivered again, as a whole. Slow readers lose nothing: events are read on demand.

        The watch ends after `session_deleted`. When you leave the loop or cancel the task, the
        stream ends at the server too. If you hold the iterator itself, close it with `aclose` or
        contextlib.aclosing.

        Raises errors that a retry cannot solve: NotFoundError when the session does not exist,
        OutOfRangeError for a revision that it has not reached, InvalidArgumentError,
        PermissionDeniedError, UnauthenticatedError, UnimplementedError, and InternalError with a
        reason.
        """
        state = ResumeState(after_revision)
        failures = expired_tokens = 0
        while True:
            request = WatchChatSessionRequest(session_id=session_id, after_revision=state.revision)
            responses: runtime.ResponseReader[WatchChatSessionResponse] = runtime.ResponseReader(
                self.sessions.WatchChatSession(request), silence_seconds
            )
            error: ChatTicketError | None = None
            try:
                while True:
                    response = await responses.read()
                    if response is None:
                        cause = "the stream ended"
                        break
                    expired_tokens = 0
                    if (event := state.accept(response)) is not None:
                        failures = 0
                        yield event
                    if state.ended:
                        return
            except TimeoutError:
                cause = f"no response for {silence_seconds:g} s"
            except errors.NotFoundError:
                if state.session is None:
                    raise
                yield state.session_deleted()
                return
            except ChatTicketError as failure:
                expired = self._renews_token and failure.reason == "CREDENTIAL_EXPIRED"
                expired_tokens = expired_tokens + 1 if expired else 0
                if not is_retryable(failure) and not 0 < expired_tokens <= MAX_EXPIRED_TOKENS:
                    raise
                cause, error = str(failure), failure
            finally:
                responses.cancel()
            pause = backoff_seconds(failures, error)
            log.log(
                logging.WARNING if failures else logging.INFO,
                "watch of session %s resumes after revision %d in %.1f s: %s",
                session_id,
                state.revision,
                pause,
                cause,
            )
            failures += 1
            await runtime.sleep(pause)
