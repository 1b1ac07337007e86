"""Domain errors: what can go wrong, without gRPC or SQL. rpc/status.py maps each to a status.

The store and the services raise these errors; only the RPC middleware catches them. Callers read
the texts, so a text may name ids and fields but never content, SQL, or another tenant's data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Violation:
    """What is wrong with one field of a request. An empty `field` means the whole request."""

    field: str
    description: str

    def __str__(self) -> str:
        return f"{self.field}: {self.description}" if self.field else self.description


class DomainError(Exception):
    """Base of all errors that callers are told: `reason` is for programs, the text for people.

    `retry_seconds` is the delay after which the same call may succeed. None: the service suggests
    no retry.
    """

    reason: str
    metadata: Mapping[str, str]
    retry_seconds: float | None = None

    def __init__(self, text: str, *, reason: str, metadata: Mapping[str, str] | None = None):
        super().__init__(text)
        self.reason = reason
        self.metadata = metadata or {}


class InvalidArgumentError(DomainError):
    """The request is malformed. Carries the violations, and the number of those not listed."""

    def __init__(self, violations: Sequence[Violation], *, unlisted: int = 0):
        text = "; ".join(map(str, violations))
        super().__init__(text, reason="INVALID_ARGUMENT")
        self.violations = violations
        self.unlisted = unlisted


class UnauthenticatedError(DomainError):
    """The call has no valid credential.

    `diagnosis` says why, for the log alone: whoever forges credentials must not learn it.
    """

    def __init__(self, text: str, *, reason: str, diagnosis: Mapping[str, str] | None = None):
        super().__init__(text, reason=reason)
        self.diagnosis = diagnosis or {}


class PermissionDeniedError(DomainError):
    """The caller is authenticated, but not allowed to make this call."""


class NotFoundError(DomainError):
    """The entity does not exist, or belongs to another tenant: callers cannot tell which."""

    def __init__(self, resource: str, resource_id: str):
        super().__init__(
            f"{resource.replace('_', ' ')} {resource_id} does not exist",
            reason=f"{resource.upper()}_NOT_FOUND",
        )
        self.resource = resource
        self.resource_id = resource_id


class AlreadyExistsError(DomainError):
    """Another entity has or had this id, or the session already has its one ticket."""

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
            f"id {resource_id} already belongs to another {resource.replace('_', ' ')}",
            reason=f"{resource.upper()}_ALREADY_EXISTS",
            resource=resource,
            resource_id=resource_id,
            metadata=metadata,
        )


class FailedPreconditionError(DomainError):
    """A rule forbids the call in the current state. `subject` is the entity or field concerned."""

    def __init__(self, text: str, *, reason: str, subject: str):
        super().__init__(text, reason=reason)
        self.subject = subject


class MessageRedactedError(FailedPreconditionError):
    """The message is redacted, for ever."""

    def __init__(self, message_id: str):
        super().__init__(
            f"the message {message_id} is redacted",
            reason="CHAT_MESSAGE_REDACTED",
            subject=f"chat_messages/{message_id}",
        )


class AbortedError(DomainError):
    """The call lost to a concurrent call. The caller may read again, or simply retry."""


class EtagMismatchError(AbortedError):
    """The session, or `entity`, is at another revision than the caller expects."""

    def __init__(self, entity: str, revision: int, expected: int):
        super().__init__(
            f"the {entity} is at revision {revision}, not {expected}",
            reason="ETAG_MISMATCH",
            metadata={"revision": str(revision)},
        )


class ContentionError(AbortedError):
    """Transactions conflicted, and the service's own retries are exhausted."""

    retry_seconds = 1.0

    def __init__(self) -> None:
        super().__init__("too many concurrent changes to the same data", reason="CONTENTION")


class OutOfRangeError(DomainError):
    """The revision, or the place in a draft, does not exist yet, or no more."""


class HistoryChangedError(OutOfRangeError):
    """The database has lost the position of the caller in a session.

    `revision` is the last one that the caller's history shares with the current one, `epoch`.
    """

    def __init__(self, revision: int, epoch: str):
        super().__init__(
            f"the history of the session has changed after revision {revision}",
            reason="HISTORY_CHANGED",
            metadata={"revision": str(revision), "epoch": epoch},
        )


class ResourceExhaustedError(DomainError):
    """A limit of the service, rather than of the request, is reached."""

    retry_seconds = 1.0


class QuotaExceededError(ResourceExhaustedError):
    """A tenant, or without `tenant_id` the whole server, has used up `quota`, named as its setting.

    The quotas of waiting calls and of their bytes are no settings.

    `retry_seconds` is the delay after which the quota may allow the call.
    """

    def __init__(self, quota: str, limit: float, tenant_id: str | None, *, retry_seconds: float):
        super().__init__(
            f"quota {quota} exceeded, limit {limit:g}",
            reason="QUOTA_EXCEEDED",
            metadata={"quota": quota, "limit": f"{limit:g}"},
        )
        self.subject = "server" if tenant_id is None else f"tenant:{tenant_id}"
        self.retry_seconds = retry_seconds


class UnavailableError(DomainError):
    """The service cannot answer now. Nothing was written, except perhaps with OUTCOME_UNKNOWN."""

    retry_seconds = 1.0


class DrainingError(UnavailableError):
    """The server is shutting down. The client resumes its stream elsewhere."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down: resume", reason="DRAINING")


class OutcomeUnknownError(UnavailableError):
    """The connection to the database broke during a write, which may have succeeded."""

    def __init__(self) -> None:
        super().__init__(
            "connection to the database lost during the write, which may have succeeded",
            reason="OUTCOME_UNKNOWN",
        )


class StatementCanceledError(UnavailableError):
    """Somebody canceled the statement in the database before its timeout."""

    def __init__(self) -> None:
        super().__init__("the statement was canceled in the database", reason="STATEMENT_CANCELED")


class DeadlineExceededError(DomainError):
    """The deadline of the caller, or the service's own timeout, has passed."""

    def __init__(self) -> None:
        super().__init__("deadline exceeded", reason="DEADLINE_EXCEEDED")


class UnsupportedError(DomainError):
    """The database server lacks a feature."""
