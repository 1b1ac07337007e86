"""Which tenant the call at hand acts for, as the door has found."""

from contextvars import ContextVar

_TENANT_ID: ContextVar[str] = ContextVar("tenant_id")


def set_tenant(tenant_id: str) -> None:
    """For the rest of a call, which has a context of its own: its task's."""
    _TENANT_ID.set(tenant_id)


def tenant_id() -> str:
    """The tenant of the call. LookupError outside of one."""
    return _TENANT_ID.get()


def tenant_id_or_none() -> str | None:
    """The tenant of the call; None outside of one."""
    return _TENANT_ID.get(None)
