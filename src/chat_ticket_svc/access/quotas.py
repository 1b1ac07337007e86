"""Quotas of one server process: rate, calls in flight and open streams, per tenant and in total.

The limits of one tenant are below those of the server, so that one tenant cannot use it all up.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from chat_ticket_svc import config
from chat_ticket_svc.errors import QuotaExceededError

# For each method that requires no credential.
UNAUTHENTICATED_STREAMS_PER_METHOD = 100

# The number of tenants from which on idle ones are pruned.
PRUNE_THRESHOLD_TENANTS = 1024

REJECTION_DELAY_SECONDS = 0.1
# A delayed rejection keeps its request in memory. Beyond these numbers rejections are immediate.
MAX_DELAYED_REJECTIONS_PER_TENANT = 64
MAX_DELAYED_REJECTIONS = 256


class _TenantUsage:
    """What a tenant currently uses."""

    def __init__(self) -> None:
        self.calls = 0
        self.streams = 0
        self.delayed_rejections = 0
        self.session_streams: Counter[str] = Counter()
        # Of the rate limit, in the event loop's time. See QuotaEnforcer._consume_rate.
        self.theoretical_arrival_time = 0.0


class _Lease(contextlib.AbstractContextManager[None]):
    """A share of the quotas that `release` returns when the block ends."""

    # A class instead of a generator, because every call enters one: it costs a third.
    def __init__(self, release: Callable[..., None], *arguments: Any):
        self._release = release
        self._arguments = arguments

    def __exit__(self, *_: object) -> None:
        self._release(*self._arguments)


class QuotaEnforcer:
    """Counts calls and streams, and raises QuotaExceededError for those beyond the limits."""

    def __init__(self, limits: config.Quotas):
        self._limits = limits
        self._usages: dict[str, _TenantUsage] = {}
        self._prune_threshold = PRUNE_THRESHOLD_TENANTS
        self._calls = 0
        self._streams = 0
        self._delayed_rejections = 0
        self._unauthenticated_streams: Counter[str] = Counter()

    def acquire_call(self, tenant_id: str) -> contextlib.AbstractContextManager[None]:
        """Acquire the quotas of a unary call. Leaving the returned lease releases them.

        The rate limit comes last, so that a rejected call does not count towards it.
        """
        limits, usage = self._limits, self._usage(tenant_id)
        _require_below(
            "tenant_calls_in_flight", limits.tenant_calls_in_flight, usage.calls, tenant_id
        )
        _require_below("calls_in_flight", limits.calls_in_flight, self._calls)
        self._consume_rate(tenant_id, usage)
        usage.calls += 1
        self._calls += 1
        return _Lease(self._release_call, usage)

    def _release_call(self, usage: _TenantUsage) -> None:
        usage.calls -= 1
        self._calls -= 1

    def acquire_stream(
        self, tenant_id: str, session_id: str
    ) -> contextlib.AbstractContextManager[None]:
        """Acquire the quotas of a stream of one session. See `acquire_call`."""
        limits, usage = self._limits, self._usage(tenant_id)
        _require_below("tenant_streams", limits.tenant_streams, usage.streams, tenant_id)
        _require_below(
            "session_streams", limits.session_streams, usage.session_streams[session_id], tenant_id
        )
        _require_below("streams", limits.streams, self._streams)
        self._consume_rate(tenant_id, usage)
        usage.streams += 1
        usage.session_streams[session_id] += 1
        self._streams += 1
        return _Lease(self._release_stream, usage, session_id)

    def _release_stream(self, usage: _TenantUsage, session_id: str) -> None:
        usage.streams -= 1
        usage.session_streams[session_id] -= 1
        if not usage.session_streams[session_id]:
            del usage.session_streams[session_id]
        self._streams -= 1

    async def delay_rejection(self, tenant_id: str, remaining_seconds: float | None) -> None:
        """Wait a moment before a rejection is sent, but not until the caller's deadline.

        Callers that retry at once would otherwise keep the event loop busy with rejections, and
        all other calls would wait behind them.
        """
        usage = self._usage(tenant_id)
        if (
            usage.delayed_rejections >= MAX_DELAYED_REJECTIONS_PER_TENANT
            or self._delayed_rejections >= MAX_DELAYED_REJECTIONS
        ):
            return
        # The jitter keeps callers that are rejected together from retrying together.
        seconds = random.uniform(REJECTION_DELAY_SECONDS / 2, REJECTION_DELAY_SECONDS)  # noqa: S311 - jitter
        usage.delayed_rejections += 1
        self._delayed_rejections += 1
        try:
            await asyncio.sleep(
                seconds if remaining_seconds is None else min(seconds, remaining_seconds / 2)
            )
        finally:
            usage.delayed_rejections -= 1
            self._delayed_rejections -= 1

    @contextlib.contextmanager
    def acquire_unauthenticated_stream(self, method: str) -> Iterator[None]:
        """Hold a stream of a method that requires no credential for the duration of the block."""
        streams = self._unauthenticated_streams
        _require_below("open_streams", UNAUTHENTICATED_STREAMS_PER_METHOD, streams[method])
        streams[method] += 1
        try:
            yield
        finally:
            streams[method] -= 1

    def _consume_rate(self, tenant_id: str, usage: _TenantUsage) -> None:
        """Count a call towards the tenant's rate: a token bucket that needs a single number.

        This is the generic cell rate algorithm (GCRA) of ITU-T I.371.
        """
        rate, burst = self._limits.tenant_calls_per_second, self._limits.tenant_burst
        now = asyncio.get_running_loop().time()
        arrival_time = max(now, usage.theoretical_arrival_time) + 1 / rate
        excess_seconds = arrival_time - now - burst / rate
        if excess_seconds > 1e-6:
            raise QuotaExceededError(
                "tenant_calls_per_second", rate, tenant_id, retry_seconds=excess_seconds
            )
        usage.theoretical_arrival_time = arrival_time

    def _usage(self, tenant_id: str) -> _TenantUsage:
        if (usage := self._usages.get(tenant_id)) is not None:
            return usage
        if len(self._usages) >= self._prune_threshold:
            self._prune_idle_tenants()
        usage = self._usages[tenant_id] = _TenantUsage()
        return usage

    def _prune_idle_tenants(self) -> None:
        """Forget the tenants whose counters are all what they would be for a new tenant."""
        now = asyncio.get_running_loop().time()
        self._usages = {
            tenant_id: usage
            for tenant_id, usage in self._usages.items()
            if usage.calls
            or usage.streams
            or usage.delayed_rejections
            or usage.theoretical_arrival_time > now
        }
        self._prune_threshold = max(PRUNE_THRESHOLD_TENANTS, 2 * len(self._usages))


def _require_below(quota: str, limit: int, used: int, tenant_id: str | None = None) -> None:
    if used >= limit:
        raise QuotaExceededError(quota, limit, tenant_id, retry_seconds=1)
