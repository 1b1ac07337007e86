"""Each call as operators see it: counted and timed, told in a line of the log, and traced."""

import asyncio
import functools
import random
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from prometheus_client import Counter, Histogram

from chat_ticket_svc.access import request_context
from chat_ticket_svc.access.credential import Metadata, metadata_values
from chat_ticket_svc.access.method_permissions import UNAUTHENTICATED_METHODS
from chat_ticket_svc.telemetry import metrics, tracing
from chat_ticket_svc.telemetry.log_writer import log_deferred

log = structlog.get_logger()

Context = grpc.aio.ServicerContext[Any, Any]

REQUEST_ID_KEY = "x-request-id"
# What fits into a line and looks like an id; another is made for what does not.
REQUEST_ID = re.compile(r"[!-~]{1,128}")

# A deadline is sent as what is left of it, so that ours ends later than the caller's, who cancels
# the call then: by as long as the call was on its way.
DEADLINE_SKEW_SECONDS = 0.05

# By OpenTelemetry's conventions: those that are not the caller's own doing.
FAILURES = {
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DATA_LOSS,
}


class Call:
    """What a call has to tell of itself. Sizes are those of the messages, in bytes."""

    __slots__ = (
        "_known",
        "_tell",
        "metadata",
        "reason",
        "request_bytes",
        "response_bytes",
        "responses",
    )

    def __init__(self, metadata: Metadata, tell: Callable[..., None] | None, known: dict[str, str]):
        self.metadata = metadata
        self._tell = tell
        self._known = known
        self.request_bytes: int | None = None  # those of a stream of requests are not counted
        self.response_bytes = self.responses = 0
        self.reason: str | None = None  # of an error of ours

    @property
    def request_id(self) -> str:
        return self._known["request_id"]

    def opened(self, session_id: str | None) -> None:
        """A stream was let in; `session_id` is a UUID."""
        if session_id is not None:
            self._known["session_id"] = session_id
        if self._tell is not None:
            log_deferred(self._tell, "stream opened", self._known | _tenant())

    def ended(self, event: str, code: grpc.StatusCode, seconds: float) -> None:
        if self._tell is None:
            return
        line: dict[str, Any] = self._known | _tenant()
        line["code"] = code.name
        if self.reason is not None:
            line["reason"] = self.reason
        line["duration_ms"] = round(1000 * seconds, 3)
        if self.request_bytes is not None:
            line["request_bytes"] = self.request_bytes
        line["responses"] = self.responses
        line["response_bytes"] = self.response_bytes
        log_deferred(self._tell, event, line)


def _tenant() -> dict[str, str]:
    """Once the door has found it."""
    tenant_id = request_context.tenant_id_or_none()
    return {} if tenant_id is None else {"tenant": tenant_id}


Behavior = Callable[[Any, Context, Call], Awaitable[Any]]


def told(
    method: str, kind: str, behavior: Behavior, *, logged: bool
) -> Callable[[Any, Context], Awaitable[Any]]:
    """`behavior`, told of, and without what keeps an aborted call in memory.

    gRPC's state of the call has the error that ended it, whose traceback has our frames, which
    have the call: only the garbage collector undoes that, and it stops everybody's calls for a
    tenth of a second when a flood of refused calls has left enough of it.
    """
    _, service, name = method.split("/")
    metrics_of = functools.cache(functools.partial(_metrics_of, kind, service, name))
    is_stream = kind != "unary"
    streams = metrics.STREAMS.labels(service, name) if is_stream else None
    event = "stream closed" if is_stream else "call"
    # Health checks come every few seconds, for ever.
    tell = (log.debug if method in UNAUTHENTICATED_METHODS else log.info) if logged else None

    async def outermost(request: Any, context: Context) -> Any:
        began = time.perf_counter()
        metadata: Metadata = context.invocation_metadata() or ()  # type: ignore[assignment]
        known = {"method": method[1:], "request_id": _request_id(metadata)}
        call = Call(metadata, tell, known)
        code = grpc.StatusCode.CANCELLED
        if streams is not None:
            streams.inc()
        with tracing.call(method, metadata) as span:
            if span is not None:
                known["trace_id"] = tracing.trace_id(span)
            try:
                response = await behavior(request, context, call)
                code = grpc.StatusCode.OK
                return response
            except grpc.aio.AbortError as error:
                code = context.code()
                error.__traceback__ = error.__context__ = None
                raise
            except asyncio.CancelledError:
                left = context.time_remaining()
                # gRPC cancels what its caller waits for no more.
                if left is not None and left <= DEADLINE_SKEW_SECONDS:
                    code = grpc.StatusCode.DEADLINE_EXCEEDED
                raise
            finally:
                seconds = time.perf_counter() - began
                handled, histogram = metrics_of(code)
                handled.inc()
                if streams is None:
                    histogram.observe(seconds)
                else:
                    streams.dec()
                if span is not None:
                    tracing.record_status(span, code.value[0], is_error=code in FAILURES)
                call.ended(event, code, seconds)

    return outermost


def _request_id(metadata: Metadata) -> str:
    """The caller's, by which it finds the line again, or one of ours."""
    for given in metadata_values(metadata, REQUEST_ID_KEY):
        if isinstance(given, str) and REQUEST_ID.fullmatch(given):
            return given
    # Not of the system's randomness, which is asked for without the interpreter's lock: no secret.
    return f"{random.getrandbits(64):016x}"


def _metrics_of(
    kind: str, service: str, name: str, code: grpc.StatusCode
) -> tuple[Counter, Histogram]:
    labels = (kind, service, name, code.name)
    return metrics.HANDLED.labels(*labels), metrics.HANDLING_SECONDS.labels(*labels)
