"""Which failures are worth another attempt, and how long to wait before it."""

import random

import grpc

from chat_ticket.errors import ChatTicketError

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
