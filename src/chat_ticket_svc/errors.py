"""What can go wrong, in the words of the domain. status.py says which gRPC status each becomes.

The store raises these and never learns gRPC; services let them pass. Texts are for the caller:
they name ids and fields, never content, SQL, or anything of another tenant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """What is wrong with one field of a request, or with all of it: then `field` is empty."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class DomainError(Exception):
    """An error that its caller is told about: `reason` is for programs, the text for people.

    `retry_seconds` is after how long the same call may succeed; None where it never does.
    """

    reason: str
    metadata: Mapping[str, str]
    retry_seconds: float | None = None

    def __init__(self, text: str, *, reason: str, metadata: Mapping[str, str] | None = None):
        super().__init__(text)
        self.reason = reason
        self.metadata = metadata or {}


class InvalidArgumentError(DomainError):
    """The request itself is wrong; carries the violations found, and how many more there are."""

    def __init__(self, violations: Sequence[Violation], *, unlisted: int = 0):
        text = "; ".join(map(str, violations))
        super().__init__(text, reason="INVALID_ARGUMENT")
        self.violations = violations
        self.unlisted = unlisted


class UnauthenticatedError(DomainError):
    """The call does not say, or cannot prove, who makes it."""


class PermissionDeniedError(DomainError):
    """The call has proved who makes it, who may not make it."""


class NotFoundError(DomainError):
    """There is no such entity, or it is another tenant's: the two look the same."""

    def __init__(self, resource: str, resource_id: str):
        super().__init__(
            f"{resource.replace('_', ' ')} {resource_id} does not exist",
            reason=f"{resource.upper()}_NOT_FOUND",
        )
        self.resource = resource
        self.resource_id = resource_id


class AlreadyExistsError(DomainError):
    """An id is taken by something else, or the one place that there is."""

    def __init__(
        self,
        text: str,
        *,
        reason: str,
        resource: str,
        resource_id: str,
        metadata: Mapping[str, str] | None = None,
    ):
        super().__init__(text, reason=reason, metadata=metadata)
        self.resource = resource
        self.resource_id = resource_id

    @classmethod
    def id_taken(
        cls, resource: str, resource_id: str, metadata: Mapping[str, str] | None = None
    ) -> "AlreadyExistsError":
        return cls(
            f"the id {resource_id} is taken by another {resource.replace('_', ' ')}",
            reason=f"{resource.upper()}_ALREADY_EXISTS",
            resource=resource,
            resource_id=resource_id,
            metadata=metadata,
        )


class FailedPreconditionError(DomainError):
    """A rule refuses the call in the present state; `subject` is what it is about."""

    def __init__(self, text: str, *, reason: str, subject: str):
        super().__init__(text, reason=reason)
        self.subject = subject


class AbortedError(DomainError):
    """Lost against a concurrent call: read again, or simply retry."""


class ContentionError(AbortedError):
    """The database gave up on a conflict between transactions, after our own retries."""

    retry_seconds = 1.0

    def __init__(self) -> None:
        super().__init__("too many concurrent changes to the same data", reason="CONTENTION")


class OutOfRangeError(DomainError):
    """A position that does not exist yet."""


class ResourceExhaustedError(DomainError):
    """A limit of the service, not of the request, has been reached."""

    retry_seconds = 1.0


class QuotaExceededError(ResourceExhaustedError):
    """A caller uses all that it may: `quota` is the setting's name; without a tenant, all do."""

    def __init__(self, quota: str, limit: float, tenant_id: str | None, *, retry_seconds: float):
        super().__init__(
            f"the limit {quota} of {limit:g} is reached",
            reason="QUOTA_EXCEEDED",
            metadata={"quota": quota, "limit": f"{limit:g}"},
        )
        self.subject = "server" if tenant_id is None else f"tenant:{tenant_id}"
        self.retry_seconds = retry_seconds


class UnavailableError(DomainError):
    """The service cannot answer now; nothing was done."""

    retry_seconds = 1.0


class OutcomeUnknownError(UnavailableError):
    """The connection broke during a write, which may have happened."""

    def __init__(self) -> None:
        super().__init__(
            "the connection to the database broke during the write, which may have happened: "
            "repeat it with the same id",
            reason="OUTCOME_UNKNOWN",
        )


class DeadlineExceededError(DomainError):
    """The caller's deadline, or the service's own, has passed."""

    def __init__(self) -> None:
        super().__init__("the deadline has passed", reason="DEADLINE_EXCEEDED")


class UnsupportedError(DomainError):
    """The database server lacks a feature."""
