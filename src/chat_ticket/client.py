"""A client of the service, for asyncio: the four stubs with tenant, credentials and retries set.

    async with ChatTicketClient("localhost:50051", tenant="acme") as client:
        await client.sessions.GetChatSession(GetChatSessionRequest(session_id=...))
        async for event in client.follow(session_id):
            ...

Requests and responses are those of chat_ticket.v1, and the comments in its protos are the
reference. Synchronous callers use the stubs of chat_ticket.v1 on a channel of their own, with
`channel_options()`, and `errors.typed` for what they raise.
"""

import asyncio
import inspect
import ipaddress
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

import grpc
import grpc.aio

from chat_ticket import errors
from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceStub
from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceStub
from chat_ticket.v1.chat_session_pb2 import WatchChatSessionRequest, WatchChatSessionResponse
from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceStub
from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceStub
from chat_ticket.v1.resources_pb2 import ChatSession

if TYPE_CHECKING:  # they are in the stubs only
    from chat_ticket.v1.chat_attachment_pb2_grpc import ChatAttachmentServiceAsyncStub
    from chat_ticket.v1.chat_message_pb2_grpc import ChatMessageServiceAsyncStub
    from chat_ticket.v1.chat_session_pb2_grpc import ChatSessionServiceAsyncStub
    from chat_ticket.v1.chat_ticket_pb2_grpc import ChatTicketServiceAsyncStub

log = logging.getLogger(__name__)

Token = str | Callable[[], str | Awaitable[str]]
Request = TypeVar("Request")
Response = TypeVar("Response")

SERVICE_CONFIG = "chat_ticket_grpc_service_config.json"
MIB = 1024 * 1024

# Three heartbeats, as a server sends them by default.
SILENCE_SECONDS = 45.0

# Before a call is made again: up to so long, twice as long each time, and no longer than that.
PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 10.0

PASSING = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
}
# Without a reason they are not the service's: as such a proxy ends the stream of a server that is
# gone (nginx by a reset, or an end without a status).
BROKEN = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}

# How often an expired token is taken for one that has expired on its way.
EXPIRED_TOKENS = 3


def channel_options() -> list[tuple[str, Any]]:
    """How a channel suits the service: reads are retried, and servers that are gone are noticed."""
    config = resources.files("chat_ticket.v1").joinpath(SERVICE_CONFIG).read_text()
    return [
        ("grpc.service_config", config),
        # Of several addresses all are used, and when one is gone the others.
        ("grpc.lb_policy_name", "round_robin"),
        # The server allows a ping every 20 seconds. A follower sends nothing but pings.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        # Two minutes by default: a follower is to be back soon after a long outage.
        ("grpc.max_reconnect_backoff_ms", 10_000),
        # What the server takes; it sends no more than 3.
        ("grpc.max_send_message_length", 4 * MIB),
        ("grpc.max_receive_message_length", 4 * MIB),
    ]


class ChatTicketClient:
    """The service, for one tenant. Make it within the event loop that uses it, and close it.

    Its stubs are `sessions`, `messages`, `attachments` and `tickets`. Their calls raise the
    exceptions of chat_ticket.errors. Reads are retried on UNAVAILABLE by gRPC itself, until their
    deadline; writes are not: see `repeat`. A task that is cancelled ends its call, and gets
    asyncio.CancelledError as ever.

    `tenant` may be left out when the token or certificate is for exactly one. `token` is sent as
    `authorization: Bearer`; when it is a function, or a coroutine function, it is asked for each
    call, so it should keep what it returns until that is about to expire; what it raises, the call
    raises. `credentials` are those of the channel, such as grpc.ssl_channel_credentials(); without
    any the connection is plain text, on which a token is sent to this machine only (`localhost`, a
    loopback address or a Unix socket): otherwise ValueError, as for a tenant or token that is not
    printable ASCII, such as one with a line break at its end. `timeout` is the deadline, in
    seconds, of calls with one response which say no other. `options` are of gRPC, and come last.
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
        token: Token | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = 10.0,
        options: Sequence[tuple[str, Any]] = (),
    ):
        asyncio.get_running_loop()  # gRPC would take another one, and hang
        local = _is_local(target)
        if token is not None and credentials is None and not local:
            raise ValueError(f"a token is not sent in plain text to {target}: give credentials")
        self._renews = callable(token)
        caller = _Caller(tenant, token)
        interceptors = [_Unary(caller, timeout), _Stream(caller)]
        # What is on this machine is not behind a proxy, which would be told the token.
        proxy = [("grpc.enable_http_proxy", 0)] if local else []
        all_options = [*channel_options(), *proxy, *options]
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(
                target, options=all_options, interceptors=interceptors
            )
        else:
            self._channel = grpc.aio.secure_channel(
                target, credentials, options=all_options, interceptors=interceptors
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
        """End all calls, and the connections."""
        await self._channel.close()

    async def repeat(
        self,
        method: Callable[[Request], Awaitable[Response]],
        request: Request,
        *,
        seconds: float = 60.0,
    ) -> Response:
        """Make a call until its outcome is known, for up to `seconds`; then raise as it did last.

            await client.repeat(client.messages.CreateChatMessage, request)

        For what is safe to repeat: reads, creates whose request has the ids of all that is new,
        updates without an etag. (A delete that has happened is NOT_FOUND the second time.) It is
        made again, with pauses, after what may pass: what `retry_seconds` says so of,
        UnavailableError, DeadlineExceededError, CallCancelledError.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        failures = 0
        while True:
            try:
                return await method(request)
            except ChatTicketError as error:
                pause = _pause(failures, error)
                if not _may_pass(error) or loop.time() + pause > end:
                    raise
            failures += 1
            await asyncio.sleep(pause)

    async def follow(
        self,
        session_id: str,
        after_revision: int = 0,
        *,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> AsyncGenerator[WatchChatSessionResponse, None]:
        """What changed in a session after a revision, then every change as it happens.

        As one stream of WatchChatSession that never breaks: when the server ends, drains or is out
        of reach, when the token expires and can be asked for again, or when nothing is heard for
        `silence_seconds` (the server sends heartbeats, every 15 seconds by default), it goes on
        after the last event by itself, for as long as that takes: use asyncio.timeout to give up.
        It logs that as `chat_ticket.client`. A session that was deleted meanwhile is told so.

        Each event is told once, and none is left out. The session is shown as it is, first of all
        and after a break when it has changed: that is ahead of the events that led there, which
        follow, up to its `revision`. To go on in another process, keep the
        `revision` of an event after all of it has been handled, and give that as `after_revision`:
        an event that was handled in part comes again whole. Events are read as they are asked for;
        who is slow loses nothing.

        Ends after `session_deleted`. Leaving the loop or cancelling the task ends the stream at the
        server. (Whoever holds the iterator itself ends it by `aclose`, or contextlib.aclosing.)

        Raises what does not pass: NotFoundError when there is no such session, OutOfRangeError for
        a revision it has not reached, InvalidArgumentError, PermissionDeniedError,
        UnauthenticatedError, UnimplementedError, and InternalError with a reason.
        """
        told = _Told(after_revision)
        failures = 0
        while True:
            request = WatchChatSessionRequest(session_id=session_id, after_revision=told.revision)
            call = self.sessions.WatchChatSession(request)
            responses = aiter(call)
            error: ChatTicketError | None = None
            try:
                while True:
                    async with asyncio.timeout(silence_seconds):
                        response = await anext(responses, None)
                    if response is None:
                        because = "the stream ended"
                        break
                    if (event := told.next(response)) is not None:
                        failures = 0
                        yield event
                    if told.ended:
                        return
            except TimeoutError:
                because = f"nothing was heard for {silence_seconds:g} s"
            except errors.NotFoundError:
                if told.session is None:
                    raise
                yield told.deleted()
                return
            except ChatTicketError as broken:
                expired = self._renews and broken.reason == "CREDENTIAL_EXPIRED"
                if not _may_pass(broken) and not (expired and failures < EXPIRED_TOKENS):
                    raise
                because, error = str(broken), broken
            finally:
                call.cancel()
            pause = _pause(failures, error)
            log.log(
                logging.WARNING if failures else logging.INFO,
                "following session %s again after revision %d in %.1f s: %s",
                session_id,
                told.revision,
                pause,
                because,
            )
            failures += 1
            await asyncio.sleep(pause)


class _Told:
    """What the caller of `follow` has been told, over all streams."""

    def __init__(self, revision: int):
        self.revision = revision
        self.session: ChatSession | None = None
        self.ended = False
        self._caught_up = False

    def next(self, response: WatchChatSessionResponse) -> WatchChatSessionResponse | None:
        """What to tell of a response: nothing, when it is what each stream begins with."""
        known = False
        match response.WhichOneof("event"):
            case "session":
                known, was = self._knows(response.session), self.session
                if was is not None and was.create_time != response.session.create_time:
                    return self.deleted()  # another session of the same id, which must not be
                self.session = response.session
            case "caught_up" if self._caught_up:
                known = response.revision == self.revision
                response.heartbeat.SetInParent()  # otherwise it says where we are, as those do
            case "caught_up":
                self._caught_up = True
            case "session_deleted":
                self.ended = True
        # Everything up to here has been told, whether this response is told or not.
        self.revision = response.revision
        return None if known else response

    def _knows(self, session: ChatSession) -> bool:
        """Whether it shows nothing new; what else it has changes with every message."""
        was = self.session
        return was is not None and (was.status, was.has_ticket) == (
            session.status,
            session.has_ticket,
        )

    def deleted(self) -> WatchChatSessionResponse:
        """What the server would have said."""
        self.ended = True
        return WatchChatSessionResponse(
            revision=self.revision, session_deleted=WatchChatSessionResponse.ChatSessionDeleted()
        )


class _Caller:
    """Who makes the calls."""

    def __init__(self, tenant: str | None, token: Token | None):
        self._tenant = [] if tenant is None else [("x-tenant-id", _sendable("tenant", tenant))]
        self._token = _sendable("token", token) if isinstance(token, str) else token

    async def details(
        self, given: grpc.aio.ClientCallDetails, timeout: float | None
    ) -> grpc.aio.ClientCallDetails:
        """Those of a call, completed."""
        metadata = [*(given.metadata or ()), *self._tenant]
        token = self._token
        if callable(token):
            asked = token()
            token = _sendable("token", await asked if inspect.isawaitable(asked) else asked)
        if token is not None:
            metadata.append(("authorization", f"Bearer {token}"))
        return grpc.aio.ClientCallDetails(
            given.method,
            timeout if given.timeout is None else given.timeout,
            grpc.aio.Metadata(*metadata),
            given.credentials,
            given.wait_for_ready,
        )


# gRPC sees one kind of an interceptor only, so there are two.
class _Unary(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, caller: _Caller, timeout: float):
        self._caller = caller
        self._timeout = timeout

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        call = await continuation(await self._caller.details(details, self._timeout), request)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            raise errors.typed(error) from error
        return call


class _Stream(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, caller: _Caller):
        self._caller = caller

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        call = await continuation(await self._caller.details(details, None), request)
        return self._responses(call)

    async def _responses(self, call: Any) -> AsyncIterator[Any]:
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise errors.typed(error) from error


def _sendable(name: str, text: str) -> str:
    """gRPC refuses any other, but says neither which it is nor that it is no error on the way."""
    if not (text.isascii() and text.isprintable()):
        raise ValueError(f"the {name} is not printable ASCII: does it end in a line break?")
    return text


def _may_pass(error: ChatTicketError) -> bool:
    """Whether the same call may succeed later."""
    if error.retry_seconds is not None or error.code in PASSING:
        return True
    return error.code in BROKEN and not error.reason


def _pause(failures: int, error: ChatTicketError | None) -> float:
    """Seconds: what the server asks for, and at random up to what the failures ask for."""
    asked = None if error is None else error.retry_seconds
    longest = min(PAUSE_SECONDS * 2 ** min(failures, 10), MAX_PAUSE_SECONDS)
    return (asked or 0) + random.uniform(0, longest)  # noqa: S311 - jitter


def _is_local(target: str) -> bool:
    """Whether all addresses of a target of gRPC are of this machine, as far as it says itself."""
    scheme, _, rest = target.partition(":")
    if scheme in ("unix", "unix-abstract"):
        return True
    addresses = rest.rpartition("/")[2] if scheme in ("dns", "ipv4", "ipv6") else target
    return all(_is_loopback(address) for address in addresses.split(","))


def _is_loopback(address: str) -> bool:
    try:
        host = urlsplit(f"//{address}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
