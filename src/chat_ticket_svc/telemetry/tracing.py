"""OpenTelemetry traces: a span for each call, its wait for a connection, and its statements.

Before `configure` is called, or without the extra `tracing`, spans are no-ops and cost next to
nothing. OpenTelemetry's own variables set the endpoint and the sampling (OTEL_SERVICE_NAME,
OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES). Like log lines, spans
hold no values and no exception texts. SQL statements are constants of the source.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import structlog

from chat_ticket_svc.config import ConfigurationError
from chat_ticket_svc.telemetry.log_sampler import LogSampler

log = structlog.get_logger()

# While a collector does not accept spans, a line says so this often.
FAILURE_LOG_SECONDS = 60

# The collector may not answer.
SHUTDOWN_SECONDS = 1.0

_NO_SPAN = contextlib.nullcontext()

_provider: Any = None
_tracer: Any = None


def configure() -> None:
    """Start to trace. Raises ConfigurationError if the extra is not installed."""
    global _provider, _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError(
            "CHAT_TICKET_TRACES: requires the package's extra `tracing`"
        ) from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "chat-ticket-svc")
    name = {SERVICE_NAME: os.environ["OTEL_SERVICE_NAME"]}
    _provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    # No subclass of theirs: this module is imported where OpenTelemetry is not installed.
    exporter: Any = _ReportingExporter(OTLPSpanExporter())
    _provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = _provider.get_tracer("chat_ticket_svc")


class _ReportingExporter:
    """An exporter that logs when the collector begins to fail, and when it works again.

    OpenTelemetry's own exporter logs several lines for each batch.
    """

    def __init__(self, exporter: Any):
        self._exporter = exporter
        self._sampler = LogSampler(FAILURE_LOG_SECONDS)
        self._lost_spans = 0
        exporter_log = logging.getLogger(type(exporter).__module__)
        # Its last line about the first batch that fails has the HTTP status.
        exporter_log.addFilter(lambda line: line.levelno >= logging.ERROR and not self._lost_spans)

    def export(self, spans: Sequence[Any]) -> Any:
        from opentelemetry.sdk.trace.export import SpanExportResult

        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._lost_spans += len(spans)
            if self._sampler.sample("export") is not None:
                log.warning("spans not exported", lost_spans=self._lost_spans)
        elif self._lost_spans:
            log.info("spans exported again", lost_spans=self._lost_spans)
            self._lost_spans = 0
            self._sampler = LogSampler(FAILURE_LOG_SECONDS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return bool(self._exporter.force_flush(timeout_millis))


class CallSpan:
    """The span of a call, from its construction to `end`."""

    def __init__(self, method: str, metadata: Iterable[tuple[str, Any]]):
        from opentelemetry import context
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        _, service, name = method.split("/")
        self._span = _tracer.start_span(
            method[1:],
            context=TraceContextTextMapPropagator().extract(dict(metadata)),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        self._context = context.attach(set_span_in_context(self._span))

    @property
    def trace_id(self) -> str:
        """In hexadecimal, as collectors display it."""
        return f"{self._span.get_span_context().trace_id:032x}"

    def end(self, code: int, *, is_error: bool) -> None:
        """End with the status code of the call."""
        from opentelemetry import context
        from opentelemetry.trace import StatusCode

        context.detach(self._context)
        self._span.set_attribute("rpc.grpc.status_code", code)
        if is_error:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


def shutdown() -> None:
    """Export the remaining spans, for at most SHUTDOWN_SECONDS."""
    if _provider is not None:
        export = threading.Thread(target=_provider.shutdown, daemon=True)
        export.start()
        export.join(SHUTDOWN_SECONDS)


def start_call(method: str, metadata: Iterable[tuple[str, Any]]) -> CallSpan | None:
    """Start the span of a call, in the trace that its metadata name. None without tracing.

    It is the current span of the call's task until it ends.
    """
    return None if _tracer is None else CallSpan(method, metadata)


def pool_wait() -> AbstractContextManager[Any]:
    """The span of a call's wait for a database connection."""
    return _NO_SPAN if _tracer is None else _client_span("pool wait", {})


def statement(sql: str) -> AbstractContextManager[Any]:
    """The span of a statement that a call executes."""
    if _tracer is None:
        return _NO_SPAN
    return _client_span("statement", {"db.system.name": "postgresql", "db.query.text": sql.strip()})


@contextlib.contextmanager
def _client_span(name: str, attributes: dict[str, str]) -> Iterator[None]:
    """A child of the current call's span.

    Does nothing outside a traced call: background work and work shared by several calls belong to
    no single call.
    """
    from opentelemetry.trace import SpanKind, StatusCode, get_current_span

    if not get_current_span().is_recording():
        yield
        return
    with _tracer.start_as_current_span(
        name,
        kind=SpanKind.CLIENT,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield
        except BaseException as error:
            span.set_status(StatusCode.ERROR)
            span.set_attribute("error.type", type(error).__qualname__)
            if sqlstate := getattr(error, "sqlstate", None):
                span.set_attribute("db.response.status_code", sqlstate)
            raise
