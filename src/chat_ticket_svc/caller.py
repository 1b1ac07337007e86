"""Which tenant the call at hand acts for, as the door has found."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_TENANT_ID: ContextVar[str] = ContextVar("tenant_id")


@contextlib.contextmanager
def acting_for(tenant_id: str) -> Iterator[None]:
    """Around the handling of a call."""
    token = _TENANT_ID.set(tenant_id)
    try:
        yield
    finally:
        _TENANT_ID.reset(token)


def tenant_id() -> str:
    """The tenant of the call. LookupError outside of one."""
    return _TENANT_ID.get()


def tenant_id_or_none() -> str | None:
    """The tenant of the call; None outside of one."""
    return _TENANT_ID.get(None)
