"""The tenant and the caller of the current call, as context variables.

Admission sets them; shared watch reads set the tenant.
"""

from contextvars import ContextVar

_TENANT_ID: ContextVar[str] = ContextVar("tenant_id")
_SUBJECT: ContextVar[str | None] = ContextVar("subject", default=None)


def set_tenant(tenant_id: str) -> None:
    """Set the tenant for the rest of the call. Each call is a task with its own context."""
    _TENANT_ID.set(tenant_id)


def set_subject(subject: str | None) -> None:
    """Set who the caller is, for the rest of the call."""
    _SUBJECT.set(subject)


def tenant_id() -> str:
    """The tenant of the current call. Raises LookupError outside a call."""
    return _TENANT_ID.get()


def tenant_id_or_none() -> str | None:
    """The tenant of the current call, or None before admission and outside a call."""
    return _TENANT_ID.get(None)


def log_fields() -> dict[str, str]:
    """What a log line says of the caller: the tenant and the subject, once they are known."""
    fields = {}
    if (tenant := _TENANT_ID.get(None)) is not None:
        fields["tenant"] = tenant
    if (subject := _SUBJECT.get()) is not None:
        fields["subject"] = subject
    return fields
