"""The gRPC status of every error: the table of codes, and the google.rpc details in the trailers.

store/driver_errors.py maps errors of the driver to domain errors; this module maps domain errors to
statuses. Any other error becomes INTERNAL: the log has all of it, the caller only gets an id.
"""

import asyncio
import math
import uuid
from collections.abc import Iterator
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details_pb2
from google.rpc import status_pb2

from chat_ticket_svc import errors
from chat_ticket_svc.access import request_context
from chat_ticket_svc.rpc.instrumentation import CallRecord
from chat_ticket_svc.telemetry import metrics, redaction

log = structlog.get_logger()

DOMAIN = "chat-ticket-svc"

# The first match counts, so a subclass stands before its base class.
STATUS_CODES: tuple[tuple[type[errors.DomainError], grpc.StatusCode], ...] = (
    (errors.InvalidArgumentError, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.UnauthenticatedError, grpc.StatusCode.UNAUTHENTICATED),
    (errors.PermissionDeniedError, grpc.StatusCode.PERMISSION_DENIED),
    (errors.NotFoundError, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS),
    (errors.FailedPreconditionError, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.AbortedError, grpc.StatusCode.ABORTED),
    (errors.OutOfRangeError, grpc.StatusCode.OUT_OF_RANGE),
    (errors.ResourceExhaustedError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.UnavailableError, grpc.StatusCode.UNAVAILABLE),
    (errors.DeadlineExceededError, grpc.StatusCode.DEADLINE_EXCEEDED),
    (errors.UnsupportedError, grpc.StatusCode.UNIMPLEMENTED),
)

# Callers accept 8 KiB of trailers, in which the details are encoded as base64.
MAX_MESSAGE_BYTES = 300
MAX_BAD_REQUEST_BYTES = 3500


def status_code(error: errors.DomainError) -> grpc.StatusCode:
    return next(code for kind, code in STATUS_CODES if isinstance(error, kind))


def _details(error: errors.DomainError) -> Iterator[Message]:
    info = details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    if isinstance(error, errors.InvalidArgumentError):
        bad_request = _bad_request(error)
        omitted = len(error.violations) + error.unlisted - len(bad_request.field_violations)
        if omitted:
            info.metadata["omitted_violations"] = str(omitted)
        yield from (info, bad_request)
        return
    retry_seconds = error.retry_seconds
    if isinstance(error, errors.OutcomeUnknownError | errors.DeadlineExceededError):
        assigned_ids = request_context.not_repeatable()
        if assigned_ids is not None:
            info.metadata.update(assigned_ids)
            retry_seconds = None
    yield info
    match error:
        case errors.FailedPreconditionError():
            violation = details_pb2.PreconditionFailure.Violation(
                type=error.reason, subject=error.subject, description=str(error)
            )
            yield details_pb2.PreconditionFailure(violations=[violation])
        case errors.NotFoundError() | errors.AlreadyExistsError():
            yield details_pb2.ResourceInfo(
                resource_type=error.resource,
                resource_name=error.resource_id,
                description=str(error),
            )
        case errors.QuotaExceededError():
            quota = details_pb2.QuotaFailure.Violation(
                subject=error.subject, description=str(error)
            )
            yield details_pb2.QuotaFailure(violations=[quota])
    if retry_seconds is not None:
        delay = Duration()
        delay.FromMilliseconds(math.ceil(1000 * retry_seconds))
        yield details_pb2.RetryInfo(retry_delay=delay)


def _bad_request(error: errors.InvalidArgumentError) -> details_pb2.BadRequest:
    """As many of the violations as fit."""
    details = details_pb2.BadRequest()
    for violation in error.violations:
        details.field_violations.add(field=violation.field, description=violation.description)
        if details.ByteSize() > MAX_BAD_REQUEST_BYTES:
            del details.field_violations[-1]
            break
    return details


def _truncate(text: str) -> str:
    """Limit a status message by its bytes, each of which may be percent-encoded in three."""
    data = text.encode()
    if len(data) <= MAX_MESSAGE_BYTES:
        return text
    return data[:MAX_MESSAGE_BYTES].decode(errors="ignore") + "..."


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any],
    record: CallRecord,
    status: status_pb2.Status,
    *details: Message,
) -> NoReturn:
    for detail in (*details, details_pb2.RequestInfo(request_id=record.request_id)):
        status.details.add().Pack(detail)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    trailer = ("grpc-status-details-bin", status.SerializeToString())
    try:
        await context.abort(code, status.message, trailing_metadata=(trailer,))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as error:  # the caller has left before the status
        raise asyncio.CancelledError from error


async def abort_with_domain_error(
    context: grpc.aio.ServicerContext[Any, Any], record: CallRecord, error: errors.DomainError
) -> NoReturn:
    record.reason = error.reason
    if isinstance(error, errors.UnauthenticatedError) and error.diagnosis:
        record.log_rejected_credential(error.diagnosis)
    if isinstance(error, errors.ResourceExhaustedError):
        metrics.REJECTED.labels(error.metadata.get("quota", error.reason)).inc()
    status = status_pb2.Status(code=status_code(error).value[0], message=_truncate(str(error)))
    await _abort(context, record, status, *_details(error))


async def abort_with_internal_error(
    context: grpc.aio.ServicerContext[Any, Any], record: CallRecord, error: BaseException
) -> NoReturn:
    """Log the error and its origin, and abort the call with nothing but a correlation id."""
    correlation_id = uuid.uuid4().hex
    log.error(
        "internal error",
        correlation_id=correlation_id,
        **record.log_fields,
        errors=redaction.exception_chain(error),
    )
    status = status_pb2.Status(
        code=grpc.StatusCode.INTERNAL.value[0], message=f"internal error {correlation_id}"
    )
    info = details_pb2.ErrorInfo(
        reason="INTERNAL", domain=DOMAIN, metadata={"correlation_id": correlation_id}
    )
    record.reason = info.reason
    await _abort(context, record, status, info)
