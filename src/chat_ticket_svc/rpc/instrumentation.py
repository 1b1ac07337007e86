"""Metrics, the access log and the trace span of every call."""

import asyncio
import functools
import random
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import structlog
from prometheus_client import Counter, Histogram

from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.credential import Metadata, metadata_values
from chat_ticket_svc.access.method_permissions import UNAUTHENTICATED_METHODS
from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.telemetry.log_sampler import LogSampler
from chat_ticket_svc.telemetry.log_writer import log_deferred

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
        "_sent",
        "_write",
        "metadata",
        "reason",
        "request_bytes",
        "response_bytes",
        "responses",
    )

    def __init__(
        self,
        metadata: Metadata,
        write: Callable[..., None] | None,
        fields: dict[str, str],
        sent: Counter,
    ):
        self.metadata = metadata
        self._sent = sent
        self._write = write
        self._fields = fields
        self.request_bytes: int | None = None  # None for a stream of requests
        self.response_bytes = self.responses = 0
        self.reason: str | None = None  # of a domain error

    @property
    def request_id(self) -> str:
        return self._fields["request_id"]

    @property
    def log_fields(self) -> dict[str, str]:
        """What identifies the call in other log lines."""
        return {**self._fields, **request_context.log_fields()}

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
        self._sent.inc()

    def log_started(self, session_id: str | None) -> None:
        """Log that a stream was admitted; `session_id` is a UUID."""
        if session_id is not None:
            self._fields["session_id"] = session_id
        if self._write is not None:
            log_deferred(self._write, "started call", self._fields | request_context.log_fields())

    def log_finished(self, code: grpc.StatusCode, seconds: float) -> None:
        if self._write is None:
            return
        fields: dict[str, Any] = self._fields | request_context.log_fields()
        fields["code"] = code.name
        if self.reason is not None:
            fields["reason"] = self.reason
        fields["duration_ms"] = round(1000 * seconds, 3)
        if self.request_bytes is not None:
            fields["request_bytes"] = self.request_bytes
        fields["responses"] = self.responses
        fields["response_bytes"] = self.response_bytes
        log_deferred(self._write, "finished call", fields)


Behavior = Callable[[Any, Context, CallRecord], Awaitable[Any]]


def instrumented(
    method: str, grpc_type: str, behavior: Behavior, *, access_log: bool
) -> Callable[[Any, Context], Awaitable[Any]]:
    """Return `behavior` with metrics, the access log and a span around it."""
    _, service, name = method.split("/")
    metrics_for = functools.cache(functools.partial(_metrics_for, grpc_type, service, name))
    open_streams = metrics.STREAMS.labels(service, name) if grpc_type != "unary" else None
    of_method = (grpc_type, service, name)
    started, received, sent = (
        metric.labels(*of_method) for metric in (metrics.STARTED, metrics.RECEIVED, metrics.SENT)
    )
    write = None
    if access_log:
        # Health checks come every few seconds, for as long as the server runs.
        write = log.debug if method in UNAUTHENTICATED_METHODS else log.info

    async def handle(request: Any, context: Context) -> Any:
        started_at = time.perf_counter()
        metadata: Metadata = context.invocation_metadata() or ()  # type: ignore[assignment]
        fields = {"method": method[1:], "request_id": _request_id(metadata)}
        record = CallRecord(metadata, write, fields, sent)
        code = grpc.StatusCode.CANCELLED
        started.inc()
        if isinstance(request, bytes):
            received.inc()
        else:
            request = _counted(request, received)
        if open_streams is not None:
            open_streams.inc()
        with tracing.call(method, metadata) as span:
            if span is not None:
                fields["trace_id"] = tracing.trace_id(span)
            try:
                response = await behavior(request, context, record)
                code = grpc.StatusCode.OK
                return response
            except grpc.aio.AbortError:
                code = context.code()
                raise
            except asyncio.CancelledError:
                # gRPC also cancels the handler when the deadline has passed.
                remaining = context.time_remaining()
                if remaining is not None and remaining <= DEADLINE_SKEW_SECONDS:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                raise
            finally:
                seconds = time.perf_counter() - started_at
                handled, histogram = metrics_for(code)
                handled.inc()
                if open_streams is None:
                    histogram.observe(seconds)
                else:
                    open_streams.dec()
                if span is not None:
                    tracing.record_status(span, code.value[0], is_error=code in SERVER_ERROR_CODES)
                record.log_finished(code, seconds)

    return handle


async def _counted(requests: AsyncIterable[Any], received: Counter) -> AsyncIterator[Any]:
    async for request in requests:
        received.inc()
        yield request


def _request_id(metadata: Metadata) -> str:
    """Return the request id that the caller has sent, or a random one."""
    for value in metadata_values(metadata, REQUEST_ID_KEY):
        if isinstance(value, str) and REQUEST_ID.fullmatch(value):
            return value
    # The id is not a secret. The system's random numbers would cost a release of the GIL.
    return f"{random.getrandbits(64):016x}"


def _metrics_for(
    grpc_type: str, service: str, name: str, code: grpc.StatusCode
) -> tuple[Counter, Histogram]:
    labels = (grpc_type, service, name, code.name)
    return metrics.HANDLED.labels(*labels), metrics.HANDLING_SECONDS.labels(*labels)
