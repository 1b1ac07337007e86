"""The exceptions of failed calls: one class for each gRPC status that callers tell apart.

Two reasons of OUT_OF_RANGE have a class of their own.

The documentation's table of errors lists the reasons that come with each status.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import grpc
from google.protobuf.message import DecodeError, Message

from chat_ticket import _google_rpc


class Violation(NamedTuple):
    """What is wrong with one field of a request."""

    field: str
    """Its path in the request, such as `message.metadata_json`."""
    description: str


class Resource(NamedTuple):
    """The resource that a NotFoundError or AlreadyExistsError is about."""

    type: str
    """Such as `chat_session`."""
    name: str
    """Its id."""


class Precondition(NamedTuple):
    """A rule that refuses a call in the present state."""

    type: str
    """The reason, such as `SESSION_HAS_ACTIVE_TICKET`."""
    subject: str
    """What the rule is about."""
    description: str


class Quota(NamedTuple):
    """A quota that is used up."""

    subject: str
    """Whose quota it is."""
    description: str


class ChatTicketError(Exception):
    """A failed call. Its `__cause__` is gRPC's own error.

    A write may have succeeded when it raises UnavailableError, DeadlineExceededError,
    CallCancelledError, or any error without a reason. Make it again with the same ids, for example
    by the `retry` method of the client.

    Errors can be pickled, with their details.
    """

    code: grpc.StatusCode
    message: str
    """For people. It may change; do not parse it."""
    reason: str
    """For programs, such as SESSION_ARCHIVED. Empty when the error is not from the service, but
    from gRPC or from something between."""
    metadata: dict[str, str]
    """Facts about the reason, such as the `quota` that is used up."""
    violations: tuple[Violation, ...]
    """All wrong fields of the request, for an InvalidArgumentError."""
    resource: Resource | None
    """What a NotFoundError or AlreadyExistsError is about."""
    preconditions: tuple[Precondition, ...]
    """The rules that refuse the call, for a FailedPreconditionError."""
    quotas: tuple[Quota, ...]
    """The quotas that are used up, for a ResourceExhaustedError with the reason QUOTA_EXCEEDED."""
    retry_seconds: float | None
    """When to retry. None when the service does not say that a retry may succeed."""
    details: tuple[Message, ...]
    """All details as messages of google.rpc: ErrorInfo, BadRequest, PreconditionFailure,
    ResourceInfo, QuotaFailure, RetryInfo and others. Tell them apart by
    `detail.DESCRIPTOR.full_name`: their classes are not those of googleapis-common-protos. A
    detail of another package is a google.protobuf.Any."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()):
        super().__init__(code, message, tuple(details))
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.reason = ""
        self.metadata = {}
        self.violations = ()
        self.resource = None
        self.preconditions = ()
        self.quotas = ()
        self.retry_seconds = None
        for detail in details:
            self._read(detail)

    def _read(self, detail: Any) -> None:
        match detail.DESCRIPTOR.full_name:
            case "google.rpc.ErrorInfo":
                self.reason, self.metadata = detail.reason, dict(detail.metadata)
            case "google.rpc.BadRequest":
                self.violations = tuple(
                    Violation(each.field, each.description) for each in detail.field_violations
                )
            case "google.rpc.ResourceInfo":
                self.resource = Resource(detail.resource_type, detail.resource_name)
            case "google.rpc.PreconditionFailure":
                self.preconditions = tuple(
                    Precondition(each.type, each.subject, each.description)
                    for each in detail.violations
                )
            case "google.rpc.QuotaFailure":
                self.quotas = tuple(
                    Quota(each.subject, each.description) for each in detail.violations
                )
            case "google.rpc.RetryInfo":
                self.retry_seconds = detail.retry_delay.ToTimedelta().total_seconds()

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # pickle cannot import the classes of the details.
        details = _google_rpc.serialize_details(self.details)
        return type(self)._restored, (self.code, self.message, details)

    @classmethod
    def _restored(cls, code: grpc.StatusCode, message: str, details: bytes) -> Self:
        return cls(code, message, _google_rpc.parse_status(details)[2])


class InvalidArgumentError(ChatTicketError):
    """The request is invalid, whatever is stored. `violations` names the fields."""


class UnauthenticatedError(ChatTicketError):
    """The call has no valid credential, or does not name its tenant."""


class PermissionDeniedError(ChatTicketError):
    """The credential is not valid for this tenant, or not for this method."""


class NotFoundError(ChatTicketError):
    """The resource does not exist, or belongs to another tenant. `resource` names it."""


class AlreadyExistsError(ChatTicketError):
    """Another resource has this id, or the session already has a ticket. `resource` names it."""


class FailedPreconditionError(ChatTicketError):
    """A rule refuses the call in the present state. `preconditions` says what it is about."""


class AbortedError(ChatTicketError):
    """The resource changed since its etag was read, or other calls conflict with this one.

    The second has `retry_seconds`; the first has not.
    """


class OutOfRangeError(ChatTicketError):
    """The position to go on from is not there, such as a revision that the session has not reached.

    HistoryChangedError and CursorExpiredError are two of these.
    """


class HistoryChangedError(OutOfRangeError):
    """The database has lost changes up to this position: it was restored, or a standby promoted.

    What was received after `revision` is no more, or is different. For a cursor of all sessions,
    see `follow_sessions` of the client: there is no revision.
    """

    @property
    def revision(self) -> int:
        """The last revision of the session that both histories share."""
        return int(self.metadata.get("revision", "0"))

    @property
    def epoch(self) -> str:
        """The history to go on with after `revision`."""
        return self.metadata.get("epoch", "")


class CursorExpiredError(OutOfRangeError):
    """The cursor is so old that deletions since then may be forgotten. Begin anew."""


class ResourceExhaustedError(ChatTicketError):
    """A quota is used up, the service is full, or a message exceeds gRPC's size limit."""


class UnavailableError(ChatTicketError):
    """The service or its database cannot be reached. A write may have succeeded."""


class DeadlineExceededError(ChatTicketError):
    """The deadline has passed. A write may have succeeded, or may succeed later."""


class CallCancelledError(ChatTicketError):
    """The other side cancelled the call, or the client was closed. A write may have succeeded.

    A call whose own asyncio task is cancelled raises asyncio.CancelledError instead.
    """


class UnimplementedError(ChatTicketError):
    """The server or its database does not support this."""


class InternalError(ChatTicketError):
    """A bug in the service: its log has the `correlation_id` of `metadata`.

    Without a reason it is a failure of something between, such as a proxy.
    """


_CLASSES: dict[grpc.StatusCode, type[ChatTicketError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgumentError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRangeError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: CallCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
}

# Reasons that callers handle apart from others of the same status.
_CLASSES_OF_REASONS: dict[str, type[ChatTicketError]] = {
    "CURSOR_EXPIRED": CursorExpiredError,
    "HISTORY_CHANGED": HistoryChangedError,
}


def from_rpc_error(error: grpc.RpcError) -> ChatTicketError:
    """The exception for an error of gRPC's own stubs, synchronous or asyncio."""
    code, message = error.code(), error.details() or ""
    typed = _CLASSES.get(code, ChatTicketError)(code, message, _details(error, code, message))
    special = _CLASSES_OF_REASONS.get(typed.reason)
    return typed if special is None else special(code, message, typed.details)


def _details(error: grpc.RpcError, code: grpc.StatusCode, message: str) -> tuple[Message, ...]:
    """The details in the trailing metadata; none when they belong to another status."""
    trailers: Any = error.trailing_metadata() or ()
    for key, value in trailers:
        if key == "grpc-status-details-bin":
            try:
                status, text, details = _google_rpc.parse_status(value)
            except DecodeError:
                return ()
            return details if (status, text) == (code.value[0], message) else ()
    return ()


def client_closed() -> CallCancelledError:
    """The exception of what closing the client ends."""
    return CallCancelledError(grpc.StatusCode.CANCELLED, "the client is closed")
