"""Quotas of drafts in one server process: how many are written, and how many bytes a second.

A draft beyond the numbers is refused at once. Text beyond a rate waits: the service reads no more
of it, so that gRPC's flow control holds the writer back.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from chat_ticket_svc.access.quotas import require_below
from chat_ticket_svc.config import Quotas

# After a pause, text of this many seconds passes at once.
BURST_SECONDS = 1.0
# Each piece costs the server something, however short it is.
MIN_PIECE_BYTES = 128


class _Rate:
    """A rate of bytes: each one is given the time at which it may pass."""

    def __init__(self, bytes_per_second: int):
        self._bytes_per_second = bytes_per_second
        self._next = 0.0  # of the event loop's clock

    def delay(self, size: int) -> float:
        """Count `size` bytes, and return the seconds after which they may pass."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next, now) + size / self._bytes_per_second
        return max(0.0, self._next - now - BURST_SECONDS)


class _TenantDrafts:
    def __init__(self, bytes_per_second: int):
        self.writers = 0
        self.rate = _Rate(bytes_per_second)


class DraftQuotas:
    """Counts the drafts that are written, and paces their text."""

    def __init__(self, limits: Quotas):
        self._limits = limits
        self._writers = 0
        self._rate = _Rate(limits.draft_bytes_per_second)
        self._tenants: dict[str, _TenantDrafts] = {}

    @contextlib.contextmanager
    def writing(self, tenant_id: str) -> Iterator[None]:
        """Count a draft for the duration of the block. Raises QuotaExceededError."""
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = _TenantDrafts(self._limits.tenant_draft_bytes_per_second)
        require_below("tenant_drafts", self._limits.tenant_drafts, tenant.writers, tenant_id)
        require_below("drafts", self._limits.drafts, self._writers)
        self._tenants[tenant_id] = tenant
        tenant.writers += 1
        self._writers += 1
        try:
            yield
        finally:
            tenant.writers -= 1
            self._writers -= 1
            if not tenant.writers:
                del self._tenants[tenant_id]

    async def pace(self, tenant_id: str, size: int) -> None:
        """Wait until text of `size` bytes may pass. Only for a tenant that is writing."""
        size = max(size, MIN_PIECE_BYTES)
        delay = max(self._tenants[tenant_id].rate.delay(size), self._rate.delay(size))
        if delay:
            await asyncio.sleep(delay)
