"""Quotas of one server process: rate, calls in flight and open streams, per tenant and in total.

The limits of one tenant are below those of the server, so that one tenant cannot use it all up.

What exceeds the rate or the calls in flight waits for a bounded time before it is rejected. The
calls of a tenant are admitted in the order in which they came. Tenants whose calls wait for the
server's calls in flight take turns. What exceeds the open streams is rejected at once, because
streams stay open for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

from chat_ticket_svc.errors import QuotaExceededError
from chat_ticket_svc.limits import MIB, Quotas
from chat_ticket_svc.timeouts import Timeout

# For each method that requires no credential.
UNAUTHENTICATED_STREAMS_PER_METHOD = 100

# The number of tenants from which on idle ones are pruned.
PRUNE_THRESHOLD_TENANTS = 1024

# How long a call or a new stream may wait at most. Callers wait less if their deadline is near.
MAX_WAIT_SECONDS = 2.0
# A waiting call keeps its request in memory. What exceeds these numbers is rejected at once.
MAX_WAITING_PER_TENANT = 1000
MAX_WAITING = 4000
MAX_WAITING_BYTES_PER_TENANT = 64 * MIB
MAX_WAITING_BYTES = 128 * MIB

REJECTION_DELAY_SECONDS = 0.1
# A delayed rejection keeps its request in memory. Beyond these numbers rejections are immediate.
MAX_DELAYED_REJECTIONS_PER_TENANT = 64
MAX_DELAYED_REJECTIONS = 256

# Differences of the clock below this are rounding errors.
CLOCK_ERROR_SECONDS = 1e-6

# The calls or streams of a tenant that wait, in order: when each came, and how to admit it.
_Queue = OrderedDict["asyncio.Future[QuotaLease]", tuple[int, "Callable[[], QuotaLease]"]]


class _TenantUsage:
    """What a tenant currently uses, and what waits to be admitted."""

    call_lease: QuotaLease  # for all calls: it has nothing of its own

    def __init__(self, tenant_id: str) -> None:
        self.tenant_id = tenant_id
        self.calls = 0
        self.streams = 0
        self.delayed_rejections = 0
        self.session_streams: Counter[str] = Counter()
        # Of the rate limit, by time.monotonic. See QuotaEnforcer._consume_rate.
        self.theoretical_arrival_time = 0.0
        # Two queues, because a stream does not wait for calls in flight.
        self.waiting_calls: _Queue = OrderedDict()
        self.waiting_streams: _Queue = OrderedDict()
        self.waiting_bytes = 0
        # Set while the next one waits for the rate.
        self.rate_timer: asyncio.TimerHandle | None = None

    @property
    def waiting(self) -> int:
        return len(self.waiting_calls) + len(self.waiting_streams)


class QuotaLease(contextlib.AbstractContextManager[None]):
    """A share of the quotas that is released when the block ends."""

    # A class instead of a generator: it costs a third.
    def __init__(self, release: Callable[..., None], *arguments: Any):
        self._release = release
        self._arguments = arguments

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        self._release(*self._arguments)


class QuotaEnforcer:
    """Counts calls and streams, makes those beyond the limits wait, or raises QuotaExceededError.

    `calls_per_second` is the rate of each tenant.
    """

    def __init__(self, limits: Quotas, calls_per_second: float):
        self._limits = limits
        self._rate = calls_per_second
        self._interval = 1 / calls_per_second
        self._burst_seconds = limits.tenant_burst / calls_per_second
        self._usages: dict[str, _TenantUsage] = {}
        self._prune_threshold = PRUNE_THRESHOLD_TENANTS
        self._calls = 0
        self._streams = 0
        self._waiting = 0
        self._waiting_bytes = 0
        self._arrivals = itertools.count()
        # The tenants whose next call waits for the server's calls in flight, in turn.
        self._turns: OrderedDict[_TenantUsage, None] = OrderedDict()
        self._delayed_rejections = 0
        self._unauthenticated_streams: Counter[str] = Counter()

    async def acquire_call(
        self, tenant_id: str, *, wait_seconds: float, request_bytes: int
    ) -> QuotaLease:
        """Acquire the quotas of a unary call, until the returned lease is released.

        Waits `wait_seconds` or MAX_WAIT_SECONDS at most, whichever is less. Raises at once if the
        rate does not allow the call in time, or too many calls wait already. A rejected call does
        not count towards the rate.
        """
        usage = self._usages.get(tenant_id) or self._usage(tenant_id)
        if (
            not usage.waiting_calls
            and not self._turns
            and usage.calls < self._limits.tenant_calls_in_flight
            and self._calls < self._limits.calls_in_flight
            and self._try_consume_rate(usage)
        ):
            return self._count_call(usage)
        take = functools.partial(self._take_call, usage)
        return await self._wait(usage, usage.waiting_calls, take, wait_seconds, request_bytes)

    def _take_call(self, usage: _TenantUsage) -> QuotaLease:
        self._consume_rate(usage)
        return self._count_call(usage)

    def _count_call(self, usage: _TenantUsage) -> QuotaLease:
        usage.calls += 1
        self._calls += 1
        return usage.call_lease

    def _release_call(self, usage: _TenantUsage) -> None:
        usage.calls -= 1
        self._calls -= 1
        if usage.waiting_calls:
            self._turns[usage] = None
        if self._turns:
            self._admit_in_turn()

    async def acquire_stream(
        self, tenant_id: str, session_id: str, *, wait_seconds: float, request_bytes: int
    ) -> contextlib.AbstractContextManager[None]:
        """Acquire the quotas of a stream of one session. It waits for the rate only.

        See `acquire_call`.
        """
        usage = self._usage(tenant_id)
        take = functools.partial(self._take_stream, usage, session_id)
        self._require_stream_quotas(usage, session_id)
        if not usage.waiting_streams and self._rate_delay(usage) == 0:
            return take()
        return await self._wait(usage, usage.waiting_streams, take, wait_seconds, request_bytes)

    def _require_stream_quotas(self, usage: _TenantUsage, session_id: str) -> None:
        limits = self._limits
        require_below("tenant_streams", limits.tenant_streams, usage.streams, usage.tenant_id)
        if session_id:  # the session of a stream that writes a draft is in its first request
            require_below(
                "session_streams",
                limits.session_streams,
                usage.session_streams[session_id],
                usage.tenant_id,
            )
        require_below("streams", limits.streams, self._streams)

    def _take_stream(self, usage: _TenantUsage, session_id: str) -> QuotaLease:
        self._require_stream_quotas(usage, session_id)  # others may have opened meanwhile
        self._consume_rate(usage)
        usage.streams += 1
        usage.session_streams[session_id] += 1
        self._streams += 1
        return QuotaLease(self._release_stream, usage, session_id)

    def _release_stream(self, usage: _TenantUsage, session_id: str) -> None:
        usage.streams -= 1
        usage.session_streams[session_id] -= 1
        if not usage.session_streams[session_id]:
            del usage.session_streams[session_id]
        self._streams -= 1

    async def _wait(
        self,
        usage: _TenantUsage,
        queue: _Queue,
        take: Callable[[], QuotaLease],
        wait_seconds: float,
        request_bytes: int,
    ) -> QuotaLease:
        wait_seconds = min(wait_seconds, MAX_WAIT_SECONDS)
        if self._rate_delay(usage, usage.waiting) >= wait_seconds:
            raise self._exceeded(usage, queue)
        waiting_bytes = self._waiting_bytes + request_bytes
        tenant_id, tenant_bytes = usage.tenant_id, usage.waiting_bytes + request_bytes
        require_below("tenant_waiting_calls", MAX_WAITING_PER_TENANT, usage.waiting, tenant_id)
        require_below("waiting_calls", MAX_WAITING, self._waiting)
        require_below("tenant_waiting_bytes", MAX_WAITING_BYTES_PER_TENANT, tenant_bytes, tenant_id)
        require_below("waiting_bytes", MAX_WAITING_BYTES, waiting_bytes)
        lease: asyncio.Future[QuotaLease] = asyncio.get_running_loop().create_future()
        queue[lease] = next(self._arrivals), take
        self._waiting += 1
        self._waiting_bytes += request_bytes
        usage.waiting_bytes += request_bytes
        self._admit_next(usage)  # which sees to it that it is admitted later, too
        try:
            with Timeout(wait_seconds):
                try:
                    return await lease
                except asyncio.CancelledError:
                    if lease.done() and not lease.cancelled() and not lease.exception():
                        lease.result().release()  # it was admitted in the same moment
                    raise
        except TimeoutError as error:
            raise self._exceeded(usage, queue) from error
        finally:
            queue.pop(lease, None)
            self._waiting -= 1
            self._waiting_bytes -= request_bytes
            usage.waiting_bytes -= request_bytes

    def _admit_in_turn(self) -> None:
        """Admit waiting calls while the server's calls in flight allow it, one of each tenant."""
        while self._turns and self._calls < self._limits.calls_in_flight:
            usage, _ = self._turns.popitem(last=False)
            if self._admit_next(usage):
                self._turns[usage] = None

    def _admit_next(self, usage: _TenantUsage) -> bool:
        """Admit the tenant's next call or stream if the quotas allow it, else see to its turn."""
        queues = [usage.waiting_streams] if usage.waiting_streams else []
        if usage.waiting_calls and usage.calls < self._limits.tenant_calls_in_flight:
            if self._calls < self._limits.calls_in_flight:
                queues.append(usage.waiting_calls)
            else:
                self._turns.setdefault(usage)
        if not queues:
            return False
        if delay := self._rate_delay(usage):
            if usage.rate_timer is None:
                loop = asyncio.get_running_loop()
                usage.rate_timer = loop.call_later(delay, self._on_rate_regained, usage)
            return False
        # The one that came first.
        queue = min(queues, key=lambda queue: next(iter(queue.values()))[0])
        lease, (_, take) = queue.popitem(last=False)
        if not lease.done():  # its caller has not left in this moment
            try:
                lease.set_result(take())
            except QuotaExceededError as error:
                lease.set_exception(error)
        return True

    def _on_rate_regained(self, usage: _TenantUsage) -> None:
        usage.rate_timer = None
        while self._admit_next(usage):
            pass

    def _exceeded(self, usage: _TenantUsage, queue: _Queue) -> QuotaExceededError:
        """The error of a call or a stream that may not wait, or not any longer."""
        limits = self._limits
        delay = self._rate_delay(usage, usage.waiting)
        if queue is usage.waiting_calls:
            if usage.calls >= limits.tenant_calls_in_flight:
                return QuotaExceededError(
                    "tenant_calls_in_flight",
                    limits.tenant_calls_in_flight,
                    usage.tenant_id,
                    retry_seconds=max(1, delay),
                )
            if self._calls >= limits.calls_in_flight:
                return QuotaExceededError(
                    "calls_in_flight", limits.calls_in_flight, None, retry_seconds=max(1, delay)
                )
        return QuotaExceededError(
            "tenant_calls_per_second",
            self._rate,
            usage.tenant_id,
            retry_seconds=max(1 / self._rate, delay),
        )

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
        require_below("open_streams", UNAUTHENTICATED_STREAMS_PER_METHOD, streams[method])
        streams[method] += 1
        try:
            yield
        finally:
            streams[method] -= 1

    def _rate_delay(self, usage: _TenantUsage, ahead: int = 0) -> float:
        """Seconds until the tenant's rate allows a call, after `ahead` others. 0: at once.

        A token bucket that needs a single number: the generic cell rate algorithm (GCRA) of ITU-T
        I.371.
        """
        now = time.monotonic()
        arrival_time = max(now, usage.theoretical_arrival_time) + (ahead + 1) * self._interval
        delay = arrival_time - now - self._burst_seconds
        return delay if delay > CLOCK_ERROR_SECONDS else 0

    def _try_consume_rate(self, usage: _TenantUsage) -> bool:
        """`_consume_rate`, if `_rate_delay` is 0. Returns whether it was."""
        now = time.monotonic()
        arrival_time = usage.theoretical_arrival_time
        if arrival_time < now:
            arrival_time = now
        arrival_time += self._interval
        if arrival_time - now - self._burst_seconds > CLOCK_ERROR_SECONDS:
            return False
        usage.theoretical_arrival_time = arrival_time
        return True

    def _consume_rate(self, usage: _TenantUsage) -> None:
        """Count a call that `_rate_delay` allows towards the tenant's rate."""
        now = time.monotonic()
        usage.theoretical_arrival_time = max(now, usage.theoretical_arrival_time) + self._interval

    def _usage(self, tenant_id: str) -> _TenantUsage:
        if (usage := self._usages.get(tenant_id)) is not None:
            return usage
        if len(self._usages) >= self._prune_threshold:
            self._prune_idle_tenants()
        usage = self._usages[tenant_id] = _TenantUsage(tenant_id)
        usage.call_lease = QuotaLease(self._release_call, usage)
        return usage

    def _prune_idle_tenants(self) -> None:
        """Forget the tenants whose counters are all what they would be for a new tenant."""
        now = time.monotonic()
        self._usages = {
            tenant_id: usage
            for tenant_id, usage in self._usages.items()
            if usage.calls
            or usage.streams
            or usage.waiting
            or usage.delayed_rejections
            or usage.theoretical_arrival_time > now
        }
        self._prune_threshold = max(PRUNE_THRESHOLD_TENANTS, 2 * len(self._usages))


def require_below(quota: str, limit: int, used: int, tenant_id: str | None = None) -> None:
    """Raises QuotaExceededError, of the tenant or without one of the server, at the limit."""
    if used >= limit:
        raise QuotaExceededError(quota, limit, tenant_id, retry_seconds=1)
