"""What belongs to the current call, in context variables.

Admission sets the tenant and the subject, shared watch reads the tenant. Services note which calls
are not repeatable.
"""

from collections.abc import Mapping
from contextvars import ContextVar

_TENANT_ID: ContextVar[str] = ContextVar("tenant_id")
_SUBJECT: ContextVar[str | None] = ContextVar("subject", default=None)
_DRAFT: ContextVar[Mapping[str, str] | None] = ContextVar("draft", default=None)
_NOT_REPEATABLE: ContextVar[Mapping[str, str] | None] = ContextVar("not_repeatable", default=None)


def set_tenant(tenant_id: str) -> None:
    """Set the tenant for the rest of the call. Each call is a task with its own context."""
    _TENANT_ID.set(tenant_id)


def set_subject(subject: str | None) -> None:
    """Set who the caller is, for the rest of the call."""
    _SUBJECT.set(subject)


def set_draft(session_id: str, draft_id: str) -> None:
    """Set the draft that the call writes, for the log."""
    _DRAFT.set({"session_id": session_id, "draft_id": draft_id})


def tenant_id() -> str:
    """The tenant of the current call. Raises LookupError outside a call."""
    return _TENANT_ID.get()


def tenant_id_or_none() -> str | None:
    """The tenant of the current call, or None before admission and outside a call."""
    return _TENANT_ID.get(None)


def log_fields() -> dict[str, str]:
    """What a log line says of the call: tenant, subject and draft, once they are known."""
    fields = dict(_DRAFT.get() or {})
    if (tenant := _TENANT_ID.get(None)) is not None:
        fields["tenant"] = tenant
    if (subject := _SUBJECT.get()) is not None:
        fields["subject"] = subject
    return fields


def set_not_repeatable(**assigned_ids: str) -> None:
    """Note that this call, repeated as it is, may write a second time or fail for its own write.

    `assigned_ids` are the ids that the service has chosen for it, as the caller has not. Repeated
    with them, the call is safe.
    """
    _NOT_REPEATABLE.set(assigned_ids)


def not_repeatable() -> Mapping[str, str] | None:
    """The assigned ids of a call that is not repeatable as it is. None: it is repeatable."""
    return _NOT_REPEATABLE.get()
