"""Traces for OpenTelemetry: a span of each call, of its wait for a connection, of its statements.

Without `configure`, and without the extra `tracing`, a span is nothing and costs next to it. Where
they go and how many are kept is said by OpenTelemetry's own variables (OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES). Like the log, spans hold no
values and no texts of exceptions; statements are the constants of the code.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from chat_ticket_svc.config import ConfigurationError

# The collector may be dead.
SHUTDOWN_SECONDS = 1.0

_NOTHING = contextlib.nullcontext()

_provider: Any = None
_tracer: Any = None


def configure() -> None:
    """Trace from now on. ConfigurationError when the extra is not installed."""
    global _provider, _tracer
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError("CHAT_TICKET_TRACES: needs the wheel's extra, tracing") from error
    os.environ.setdefault("OTEL_SERVICE_NAME", "chat-ticket-svc")
    name = {SERVICE_NAME: os.environ["OTEL_SERVICE_NAME"]}
    _provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("chat_ticket_svc")


def shutdown() -> None:
    """Send what is left, for SHUTDOWN_SECONDS at most."""
    if _provider is not None:
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(SHUTDOWN_SECONDS)


def call(method: str, metadata: Iterable[tuple[str, Any]]) -> AbstractContextManager[Any]:
    """Around a call: its span, in the trace that the caller's metadata name; or None."""
    return _NOTHING if _tracer is None else _call(method, metadata)


@contextlib.contextmanager
def _call(method: str, metadata: Iterable[tuple[str, Any]]) -> Iterator[Any]:
    from opentelemetry.trace import SpanKind
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    _, service, name = method.split("/")
    with _tracer.start_as_current_span(
        method[1:],
        context=TraceContextTextMapPropagator().extract(dict(metadata)),
        kind=SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def ended(span: Any, code: int, *, failed: bool) -> None:
    """Say of a call's span how the call ended."""
    from opentelemetry.trace import StatusCode

    span.set_attribute("rpc.grpc.status_code", code)
    if failed:
        span.set_status(StatusCode.ERROR)


def trace_id(span: Any) -> str:
    """As the collector shows it."""
    return f"{span.get_span_context().trace_id:032x}"


def pool_wait() -> AbstractContextManager[Any]:
    """Around a call's wait for a connection."""
    return _NOTHING if _tracer is None else _part("pool wait", {})


def statement(sql: str) -> AbstractContextManager[Any]:
    """Around a statement of a call."""
    if _tracer is None:
        return _NOTHING
    return _part("statement", {"db.system.name": "postgresql", "db.query.text": sql.strip()})


@contextlib.contextmanager
def _part(name: str, attributes: dict[str, str]) -> Iterator[None]:
    """Of a call that is traced; what runs for nobody, or for many, is no part of one."""
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
