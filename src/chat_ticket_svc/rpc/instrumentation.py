"""Metrics, the access log and the trace span of every call."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Any

import grpc
import grpc.aio
import structlog

from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.credential import Metadata
from chat_ticket_svc.access.method_permissions import UNAUTHENTICATED_METHODS
from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.telemetry.log_sampler import LogSampler
from chat_ticket_svc.telemetry.log_writer import access_log

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_KEY = "x-request-id"
# Short enough for a log line, and printable. Any other request id is replaced.
REQUEST_ID = re.compile(r"[!-~]{1,128}")

# gRPC sends a deadline as the time that is left, so the server's expires later than the caller's by
# the time that the call has spent on the network. The caller cancels the call at its own deadline.
# A cancellation this close to the server's deadline therefore counts as DEADLINE_EXCEEDED.
DEADLINE_SKEW_SECONDS = 0.05

# The codes that OpenTelemetry's conventions call errors of the server.
SERVER_ERROR_CODES = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


REJECTION_LOG_SECONDS = 10
_rejected_credentials = LogSampler(REJECTION_LOG_SECONDS)


class CallRecord:
    """What the access log says about one call. Sizes are those of the messages, in bytes."""

    __slots__ = (
        "_fields",
        "code",
        "metadata",
        "method",
        "reason",
        "request_bytes",
        "response_bytes",
        "responses",
        "span",
        "started_at",
    )

    def __init__(self, method: MethodInstrumentation, metadata: Metadata):
        self.started_at = time.perf_counter()
        self.method = method
        self.metadata = metadata
        self.code = grpc.StatusCode.CANCELLED  # unless it ends otherwise
        self.request_bytes: int | None = None  # None for a stream of requests
        self.response_bytes = self.responses = 0
        self.reason: str | None = None  # of a domain error
        self._fields = {"method": method.name, "request_id": _request_id(metadata)}
        self.span = tracing.start_call(method.path, metadata)
        if self.span is not None:
            self._fields["trace_id"] = self.span.trace_id

    @property
    def request_id(self) -> str:
        return self._fields["request_id"]

    @property
    def log_fields(self) -> dict[str, str]:
        """What identifies the call in other log lines."""
        return self._fields | request_context.log_fields()

    def log_rejected_credential(self, diagnosis: Mapping[str, str]) -> None:
        """Log why the call's credential was rejected, unless there was such a line just now.

        Anybody can send invalid tokens, so the lines are sampled by the part that is wrong. Without
        a key of the issuer nobody can hide the lines about claims.
        """
        omitted = _rejected_credentials.sample(diagnosis["part"])
        if omitted is not None:
            log.info("credential rejected", **self.log_fields, **diagnosis, omitted=omitted)

    def count_response(self, size: int) -> None:
        """Count a message that was sent to the caller."""
        self.responses += 1
        self.response_bytes += size
        self.method.metrics.sent += 1

    def log_started(self, session_id: str | None) -> None:
        """Log that a stream was admitted; `session_id` is a UUID."""
        if session_id is not None:
            self._fields["session_id"] = session_id
        if self.method.log_level is not None:
            access_log.log(self.method.log_level, "started call", self.log_fields)

    def log_finished(self, level: str, seconds: float) -> None:
        fields: dict[str, Any] = self.log_fields
        fields["code"] = self.code.name
        if self.reason is not None:
            fields["reason"] = self.reason
        fields["duration_ms"] = round(1000 * seconds, 3)
        if self.request_bytes is not None:
            fields["request_bytes"] = self.request_bytes
        fields["responses"] = self.responses
        fields["response_bytes"] = self.response_bytes
        access_log.log(level, "finished call", fields)


class MethodInstrumentation:
    """Metrics, the access log and the span around the calls of one method.

    Use it as `begin`, then `end`, of each call, in the call's own task.
    """

    def __init__(self, path: str, grpc_type: str, *, access_log_enabled: bool):
        self.path = path
        self.name = path[1:]
        _, service, name = path.split("/")
        self.metrics = metrics.CALLS.method(grpc_type, service, name)
        self._open_streams = metrics.STREAMS.labels(service, name) if grpc_type != "unary" else None
        # Health checks come every few seconds, for as long as the server runs.
        level = "debug" if path in UNAUTHENTICATED_METHODS else "info"
        is_logged = access_log_enabled and access_log.is_enabled_for(level)
        self.log_level = level if is_logged else None

    def begin(self, context: Context) -> CallRecord:
        record = CallRecord(self, context.invocation_metadata() or ())  # type: ignore[arg-type]
        self.metrics.started += 1
        if self._open_streams is not None:
            self._open_streams.inc()
        return record

    def end(self, record: CallRecord) -> None:
        seconds = time.perf_counter() - record.started_at
        code = record.code
        if self._open_streams is None:
            self.metrics.observe_ended(code.name, seconds)
        else:
            self.metrics.count_ended(code.name)
            self._open_streams.dec()
        if record.span is not None:
            record.span.end(code.value[0], is_error=code in SERVER_ERROR_CODES)
        if self.log_level is not None:
            record.log_finished(self.log_level, seconds)

    async def counted(self, requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
        """The requests of a stream, counted."""
        async for request in requests:
            self.metrics.received += 1
            yield request


def status_code_of(context: Context, error: BaseException) -> grpc.StatusCode:
    """The status code of a call that ended with the error that aborts or cancels it."""
    if isinstance(error, grpc.aio.AbortError):
        code: grpc.StatusCode = context.code()
        return code
    if isinstance(error, asyncio.CancelledError):
        # gRPC also cancels the handler when the deadline has passed.
        remaining = context.time_remaining()
        if remaining is not None and remaining <= DEADLINE_SKEW_SECONDS:
            return grpc.StatusCode.DEADLINE_EXCEEDED
    return grpc.StatusCode.CANCELLED


def _request_id(metadata: Metadata) -> str:
    """Return the request id that the caller has sent, or a random one."""
    for key, value in metadata:
        if key == REQUEST_ID_KEY and isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    # The id is not a secret. The system's random numbers would cost a release of the GIL.
    return f"{random.getrandbits(64):016x}"
