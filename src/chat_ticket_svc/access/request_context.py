"""The tenant of the current call, a context variable. Admission and shared watch reads set it."""

from contextvars import ContextVar

_TENANT_ID: ContextVar[str] = ContextVar("tenant_id")


def set_tenant(tenant_id: str) -> None:
    """Set the tenant for the rest of the call. Each call is a task with its own context."""
    _TENANT_ID.set(tenant_id)


def tenant_id() -> str:
    """The tenant of the current call. Raises LookupError outside a call."""
    return _TENANT_ID.get()


def tenant_id_or_none() -> str | None:
    """The tenant of the current call, or None before admission and outside a call."""
    return _TENANT_ID.get(None)
