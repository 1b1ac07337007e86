"""How much callers may use at once, of one server process.

What one tenant may take is less than what there is, so that it cannot take it from the others.
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

# For each of the methods that ask for no credential.
UNAUTHENTICATED_STREAMS = 100

# How many tenants are remembered before those that do nothing are forgotten.
TENANTS = 1024

# How long a refusal is held back at most, and how many are, before more are answered at once.
REJECTION_DELAY_SECONDS = 0.1
# Each holds its request.
TENANT_DELAYED_REJECTIONS = 64
DELAYED_REJECTIONS = 256


class _Use:
    """What a tenant uses now."""

    def __init__(self) -> None:
        self.calls = 0
        self.streams = 0
        self.held = 0
        self.sessions: Counter[str] = Counter()
        # When, in the loop's time, all that was taken of the rate will have been given back.
        self.even_at = 0.0


class _Taken(contextlib.AbstractContextManager[None]):
    """What was taken, until it is given back by `end`."""

    # Not a generator: it is entered and left by every call, and costs a third.
    def __init__(self, end: Callable[..., None], *use: Any):
        self._end = end
        self._use = use

    def __exit__(self, *_: object) -> None:
        self._end(*self._use)


class Quotas:
    """Counts calls and streams, and refuses those beyond the limits with QuotaExceededError."""

    def __init__(self, limits: config.Quotas):
        self._limits = limits
        self._uses: dict[str, _Use] = {}
        self._forget_at = TENANTS
        self._calls = 0
        self._streams = 0
        self._held = 0
        self._open: Counter[str] = Counter()

    def call(self, tenant_id: str) -> contextlib.AbstractContextManager[None]:
        """Take what a unary call uses; leaving what is returned gives it back.

        Its turn is taken last: what is refused costs none.
        """
        limits, use = self._limits, self._use(tenant_id)
        _below("tenant_calls_in_flight", limits.tenant_calls_in_flight, use.calls, tenant_id)
        _below("calls_in_flight", limits.calls_in_flight, self._calls)
        self._take_turn(tenant_id, use)
        use.calls += 1
        self._calls += 1
        return _Taken(self._end_call, use)

    def _end_call(self, use: _Use) -> None:
        use.calls -= 1
        self._calls -= 1

    def stream(self, tenant_id: str, session_id: str) -> contextlib.AbstractContextManager[None]:
        """Take what a stream of a session's messages or changes uses, as `call` does."""
        limits, use = self._limits, self._use(tenant_id)
        _below("tenant_streams", limits.tenant_streams, use.streams, tenant_id)
        _below("session_streams", limits.session_streams, use.sessions[session_id], tenant_id)
        _below("streams", limits.streams, self._streams)
        self._take_turn(tenant_id, use)
        use.streams += 1
        use.sessions[session_id] += 1
        self._streams += 1
        return _Taken(self._end_stream, use, session_id)

    def _end_stream(self, use: _Use, session_id: str) -> None:
        use.streams -= 1
        use.sessions[session_id] -= 1
        if not use.sessions[session_id]:
            del use.sessions[session_id]
        self._streams -= 1

    async def delay_rejection(self, tenant_id: str, remaining: float | None) -> None:
        """Let a refused caller wait a little for the refusal: it costs us the less often.

        `remaining` is until its deadline. Without this, callers that call again at once keep the
        event loop busy with nothing but refusals, and everybody waits behind them.
        """
        use = self._use(tenant_id)
        if use.held >= TENANT_DELAYED_REJECTIONS or self._held >= DELAYED_REJECTIONS:
            return
        # Those that are refused together do not come back together.
        seconds = random.uniform(REJECTION_DELAY_SECONDS / 2, REJECTION_DELAY_SECONDS)  # noqa: S311 - jitter
        use.held += 1
        self._held += 1
        try:
            await asyncio.sleep(seconds if remaining is None else min(seconds, remaining / 2))
        finally:
            use.held -= 1
            self._held -= 1

    @contextlib.contextmanager
    def unauthenticated_stream(self, method: str) -> Iterator[None]:
        """A stream of a method that is open to everybody."""
        _below("open_streams", UNAUTHENTICATED_STREAMS, self._open[method])
        self._open[method] += 1
        try:
            yield
        finally:
            self._open[method] -= 1

    def _take_turn(self, tenant_id: str, use: _Use) -> None:
        """The generic cell rate algorithm of ITU-T I.371: a token bucket in one number."""
        rate, burst = self._limits.tenant_calls_per_second, self._limits.tenant_burst
        now = asyncio.get_running_loop().time()
        even_at = max(now, use.even_at) + 1 / rate
        too_early = even_at - now - burst / rate
        if too_early > 1e-6:
            raise QuotaExceededError(
                "tenant_calls_per_second", rate, tenant_id, retry_seconds=too_early
            )
        use.even_at = even_at

    def _use(self, tenant_id: str) -> _Use:
        if (known := self._uses.get(tenant_id)) is not None:
            return known
        if len(self._uses) >= self._forget_at:
            now = asyncio.get_running_loop().time()
            self._uses = {
                tenant: use
                for tenant, use in self._uses.items()
                if use.calls or use.streams or use.held or use.even_at > now
            }
            self._forget_at = max(TENANTS, 2 * len(self._uses))
        new = self._uses[tenant_id] = _Use()
        return new


def _below(quota: str, limit: int, used: int, tenant_id: str | None = None) -> None:
    if used >= limit:
        raise QuotaExceededError(quota, limit, tenant_id, retry_seconds=1)
