"""Quotas of drafts in one server process: how many are written, and how many bytes a second.

A draft beyond the numbers is refused at once. Text beyond a rate waits: the service reads no more
of it, so that gRPC's flow control holds the writer back.
"""

import asyncio
import contextlib
from collections.abc import Iterator

from chat_ticket_svc.access.quotas import PRUNE_THRESHOLD_TENANTS, require_below
from chat_ticket_svc.limits import Quotas

# After a pause, text of this many seconds passes at once.
BURST_SECONDS = 1.0
# Each piece costs the server something, however short it is.
MIN_PIECE_BYTES = 128


class _Rate:
    """A rate of bytes that all who wait for it share, in the order in which they came."""

    def __init__(self, bytes_per_second: int):
        self._bytes_per_second = bytes_per_second
        self._next = 0.0  # of the event loop's clock
        self._turn = asyncio.Lock()

    @property
    def is_idle(self) -> bool:
        """Whether it is as a new one: a whole burst may pass."""
        return self._next <= asyncio.get_running_loop().time()

    async def wait(self, size: int) -> None:
        """Wait until `size` bytes may pass. They do not count if the caller leaves meanwhile."""
        async with self._turn:
            now = asyncio.get_running_loop().time()
            passes_at = max(self._next, now) + size / self._bytes_per_second
            if (delay := passes_at - now - BURST_SECONDS) > 0:
                await asyncio.sleep(delay)
            self._next = passes_at


class _TenantDrafts:
    def __init__(self, bytes_per_second: int, transactions: int):
        self.writers = 0
        self.rate = _Rate(bytes_per_second)
        self.turns = asyncio.Semaphore(transactions)


class DraftQuotas:
    """Counts the drafts that are written, and paces their text.

    `tenant_transactions` is how many drafts of one tenant may begin or end at once.
    """

    def __init__(self, limits: Quotas, *, tenant_transactions: int):
        self._limits = limits
        self._tenant_transactions = tenant_transactions
        self._writers = 0
        self._rate = _Rate(limits.draft_bytes_per_second)
        self._tenants: dict[str, _TenantDrafts] = {}
        self._prune_threshold = PRUNE_THRESHOLD_TENANTS

    @contextlib.contextmanager
    def writing(self, tenant_id: str) -> Iterator[None]:
        """Count a draft for the duration of the block. Raises QuotaExceededError."""
        tenant = self._tenant(tenant_id)
        require_below("tenant_drafts", self._limits.tenant_drafts, tenant.writers, tenant_id)
        require_below("drafts", self._limits.drafts, self._writers)
        tenant.writers += 1
        self._writers += 1
        try:
            yield
        finally:
            tenant.writers -= 1
            self._writers -= 1

    async def pace(self, tenant_id: str, size: int) -> None:
        """Wait until text of `size` bytes may pass."""
        size = max(size, MIN_PIECE_BYTES)
        # One after the other: what waits for the tenant's rate takes nothing from other tenants.
        await self._tenant(tenant_id).rate.wait(size)
        await self._rate.wait(size)

    def turn(self, tenant_id: str) -> asyncio.Semaphore:
        """Enter it around a transaction that begins or ends a draft.

        All writers of a process that has died come at once. The queue for connections has no room
        for so many.
        """
        return self._tenant(tenant_id).turns

    def _tenant(self, tenant_id: str) -> _TenantDrafts:
        if (tenant := self._tenants.get(tenant_id)) is not None:
            return tenant
        if len(self._tenants) >= self._prune_threshold:
            self._prune_idle_tenants()
        tenant = _TenantDrafts(
            self._limits.tenant_draft_bytes_per_second, self._tenant_transactions
        )
        self._tenants[tenant_id] = tenant
        return tenant

    def _prune_idle_tenants(self) -> None:
        """Forget the tenants that write nothing, once they have their whole burst again.

        A tenant that was forgotten before would have a new burst with each stream that it opens.
        """
        self._tenants = {
            tenant_id: tenant
            for tenant_id, tenant in self._tenants.items()
            if tenant.writers or not tenant.rate.is_idle
        }
        self._prune_threshold = max(PRUNE_THRESHOLD_TENANTS, 2 * len(self._tenants))
