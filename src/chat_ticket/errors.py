"""What a refused call raises: one exception for each gRPC status that callers tell apart.

The README's table says which reason comes with which status.
"""

from collections.abc import Sequence
from typing import NamedTuple

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status


class Violation(NamedTuple):
    """What is wrong with one field of a request, such as `message.metadata_json`."""

    field: str
    description: str


class ChatTicketError(Exception):
    """A call that did not succeed. Its `__cause__` is gRPC's own error.

    A write that ended with UnavailableError, DeadlineExceededError or CallCancelledError, or by
    anything without a reason, may have happened: repeat it with the same ids, for instance by
    `ChatTicketClient.repeat`.
    """

    code: grpc.StatusCode
    message: str
    """For people."""
    reason: str
    """For programs, such as SESSION_ARCHIVED. Empty when the service did not say it, but gRPC or
    something on the way."""
    metadata: dict[str, str]
    """What the reason is about, such as the `quota` that is used up."""
    violations: tuple[Violation, ...]
    """Every field of the request that is wrong, of an InvalidArgumentError."""
    retry_seconds: float | None
    """After how long the same call may succeed; None when the service does not know."""
    details: tuple[Message, ...]
    """All that the service said, as messages of google.rpc: ErrorInfo, BadRequest,
    PreconditionFailure, ResourceInfo, QuotaFailure, RetryInfo, …"""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()):
        super().__init__(code, message, tuple(details))
        self.code = code
        self.message = message
        self.details = tuple(details)
        self.reason = ""
        self.metadata = {}
        self.violations = ()
        self.retry_seconds = None
        for detail in details:
            match detail:
                case error_details_pb2.ErrorInfo():
                    self.reason, self.metadata = detail.reason, dict(detail.metadata)
                case error_details_pb2.BadRequest():
                    self.violations = tuple(
                        Violation(each.field, each.description) for each in detail.field_violations
                    )
                case error_details_pb2.RetryInfo():
                    self.retry_seconds = detail.retry_delay.ToTimedelta().total_seconds()

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.message}"


class InvalidArgumentError(ChatTicketError):
    """The request is wrong, whatever is stored: `violations` says where."""


class UnauthenticatedError(ChatTicketError):
    """The call does not say, or cannot prove, who makes it and for which tenant."""


class PermissionDeniedError(ChatTicketError):
    """The credential is not for this tenant, or not for this method."""


class NotFoundError(ChatTicketError):
    """There is no such thing, or it is another tenant's. A ResourceInfo names it."""


class AlreadyExistsError(ChatTicketError):
    """The id is taken by something else, or the session has a ticket. A ResourceInfo names it."""


class FailedPreconditionError(ChatTicketError):
    """A rule refuses it in the present state. A PreconditionFailure says what it is about."""


class AbortedError(ChatTicketError):
    """Changed since the etag was read (no `retry_seconds`), or in conflict with other calls."""


class OutOfRangeError(ChatTicketError):
    """A revision that the session has not reached."""


class ResourceExhaustedError(ChatTicketError):
    """A quota is used up, or the service is full; or a message is larger than gRPC takes."""


class UnavailableError(ChatTicketError):
    """The service, or its database, is out of reach. A write may have happened all the same."""


class DeadlineExceededError(ChatTicketError):
    """The deadline has passed. A write may have happened, or may happen still."""


class CallCancelledError(ChatTicketError):
    """The other side ended the call. A write may have happened.

    Not what a call raises when its own task is cancelled: that is asyncio.CancelledError.
    """


class UnimplementedError(ChatTicketError):
    """The server, or its database, does not know this."""


class InternalError(ChatTicketError):
    """A bug of the service, whose log has the `correlation_id` of `metadata`; or, without a
    reason, something on the way that broke."""


_KINDS: dict[grpc.StatusCode, type[ChatTicketError]] = {
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


def typed(error: grpc.RpcError) -> ChatTicketError:
    """The typed exception for an error of the plain stubs, synchronous or not."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # not what this service sends
        status = None
    details = [] if status is None else [_unpacked(packed) for packed in status.details]
    code = error.code()
    return _KINDS.get(code, ChatTicketError)(code, error.details() or "", details)


def _unpacked(packed: Any) -> Message:
    """What an Any holds, or itself when that is none of google.rpc's details."""
    package, _, name = packed.TypeName().rpartition(".")
    if package != "google.rpc" or name not in error_details_pb2.DESCRIPTOR.message_types_by_name:
        return packed
    message: Message = getattr(error_details_pb2, name)()
    try:
        packed.Unpack(message)
    except DecodeError:
        return packed
    return message
