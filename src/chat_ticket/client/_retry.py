"""Which calls and failures are worth another attempt, when, and for how long."""

import contextlib
import random
import time
from collections.abc import Iterator
from contextvars import ContextVar

import grpc

from chat_ticket.errors import ChatTicketError
from chat_ticket.v1.chat_attachment_pb2 import CreateChatAttachmentRequest
from chat_ticket.v1.chat_message_pb2 import (
    BatchCreateChatMessagesRequest,
    CreateChatMessageRequest,
    UpdateChatMessageRequest,
)
from chat_ticket.v1.chat_session_pb2 import CreateChatSessionRequest, UpdateChatSessionRequest
from chat_ticket.v1.chat_ticket_pb2 import (
    CreateChatTicketRequest,
    CreateTicketRequest,
    UpdateTicketRequest,
)

RETRYABLE_CODES = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)
# A proxy that loses its server ends the stream with one of these. nginx does so by a reset, or by
# an end without a status. Such an error has no reason; the service's own errors have one.
PROXY_CODES = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN})

FIRST_BACKOFF_SECONDS = 0.2
MAX_BACKOFF_SECONDS = 10.0
MAX_DOUBLINGS = 10


def is_retryable(error: ChatTicketError) -> bool:
    """Whether the same call may succeed later."""
    if error.retry_seconds is not None or error.code in RETRYABLE_CODES:
        return True
    return error.code in PROXY_CODES and not error.reason


def backoff_seconds(failures: int, error: ChatTicketError | None) -> float:
    """How long to wait after `failures` earlier failures in a row and this one.

    The server's own `retry_seconds`, plus a random part whose limit doubles with each failure, up
    to MAX_BACKOFF_SECONDS.
    """
    requested = None if error is None else error.retry_seconds
    limit = min(FIRST_BACKOFF_SECONDS * 2 ** min(failures, MAX_DOUBLINGS), MAX_BACKOFF_SECONDS)
    return (requested or 0) + random.uniform(0, limit)  # noqa: S311 - jitter


def require_repeatable(request: object) -> None:
    """ValueError for a request that could do something else when it is made again."""
    match request:
        case CreateChatSessionRequest():
            _require_id("session.id", request.session.id)
        case CreateChatMessageRequest():
            _require_id("message.id", request.message.id)
        case BatchCreateChatMessagesRequest():
            for index, message in enumerate(request.messages):
                _require_id(f"messages[{index}].id", message.id)
        case CreateChatAttachmentRequest():
            _require_id("attachment.id", request.attachment.id)
        case CreateChatTicketRequest():
            _require_id("chat_ticket_id", request.chat_ticket_id or request.ticket.id)
        case CreateTicketRequest():
            _require_id("ticket.id", request.ticket.id)
        case UpdateChatSessionRequest():
            _require_no_etag("session.etag", request.session.etag)
        case UpdateChatMessageRequest():
            _require_no_etag("message.etag", request.message.etag)
        case UpdateTicketRequest():
            _require_no_etag("ticket.etag", request.ticket.etag)


def _require_id(field: str, value: str) -> None:
    if not value:
        raise ValueError(f"{field}: must be set in a call that is retried, so that it creates once")


def _require_no_etag(field: str, value: str) -> None:
    if value:
        raise ValueError(
            f"{field}: must be empty in a call that is retried: when an attempt succeeds and its "
            "answer is lost, the next one fails with ETAG_MISMATCH"
        )


_deadline: ContextVar[float | None] = ContextVar("_deadline", default=None)


@contextlib.contextmanager
def calls_bounded_by(deadline: float) -> Iterator[None]:
    """Calls within end by this time.monotonic(), also when the caller's function makes them."""
    token = _deadline.set(deadline)
    try:
        yield
    finally:
        _deadline.reset(token)


def bounded(timeout: float | None) -> float | None:
    """The timeout of a call, or what is left of the retries that it belongs to."""
    deadline = _deadline.get()
    if deadline is None:
        return timeout
    left = max(deadline - time.monotonic(), 0.0)
    return left if timeout is None else min(timeout, left)
