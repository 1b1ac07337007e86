"""The metrics of calls, counted in plain numbers and turned into Prometheus's at a scrape.

The objects of prometheus_client take a lock for each increment. For the five metrics of a call that
costs as much as a tenth of it. Only the event loop counts here. A scrape, on its own thread, may
find a call in one number and not yet in the next.
"""

import bisect
import itertools
import time
from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

METHOD = ("grpc_type", "grpc_service", "grpc_method")
CALL = (*METHOD, "grpc_code")


class Ended:
    """The calls of one method that ended with one status."""

    __slots__ = ("buckets", "count", "created_at", "seconds")

    def __init__(self, bounds: int):
        self.count = 0
        self.seconds = 0.0
        self.buckets = [0] * (bounds + 1)
        self.created_at = time.time()


class MethodMetrics:
    """The calls of one method."""

    __slots__ = ("_bounds", "created_at", "ended", "received", "sent", "started")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = bounds
        self.started = self.received = self.sent = 0
        self.ended: dict[str, Ended] = {}  # by the name of the status code
        self.created_at = time.time()

    def count_ended(self, code: str) -> Ended:
        ended = self.ended.get(code)
        if ended is None:
            ended = self.ended[code] = Ended(len(self._bounds))
        ended.count += 1
        return ended

    def observe_ended(self, code: str, seconds: float) -> None:
        """Count a unary call, and how long it took."""
        ended = self.count_ended(code)
        ended.seconds += seconds
        ended.buckets[bisect.bisect_left(self._bounds, seconds)] += 1


class CallMetrics(Collector):
    """The metrics of all methods, with the names and labels of other gRPC implementations."""

    def __init__(self, bounds: Sequence[float]):
        """`bounds` are those of the buckets of the duration, in seconds."""
        self._bounds = bounds
        self._bound_labels = [*map(floatToGoString, bounds), "+Inf"]
        self._methods: dict[tuple[str, str, str], MethodMetrics] = {}

    def method(self, grpc_type: str, service: str, name: str) -> MethodMetrics:
        labels = grpc_type, service, name
        if labels not in self._methods:
            self._methods[labels] = MethodMetrics(self._bounds)
        return self._methods[labels]

    def describe(self) -> Iterable[Metric]:
        return _families()

    def collect(self) -> Iterable[Metric]:
        started, received, sent, handled, handling = families = _families()
        # Copied: the event loop may meanwhile add a method or a status.
        for labels, method in self._methods.copy().items():
            started.add_metric(labels, method.started, method.created_at)
            received.add_metric(labels, method.received, method.created_at)
            sent.add_metric(labels, method.sent, method.created_at)
            for code, ended in method.ended.copy().items():
                handled.add_metric((*labels, code), ended.count, ended.created_at)
                counts = list(itertools.accumulate(ended.buckets))
                if counts[-1]:
                    buckets = list(zip(self._bound_labels, counts, strict=True))
                    handling.add_metric((*labels, code), buckets, ended.seconds)
                    handling.add_sample(
                        f"{handling.name}_created",
                        dict(zip(CALL, (*labels, code), strict=True)),
                        ended.created_at,
                    )
        return families


def _families() -> tuple[
    CounterMetricFamily,
    CounterMetricFamily,
    CounterMetricFamily,
    CounterMetricFamily,
    HistogramMetricFamily,
]:
    return (
        CounterMetricFamily(
            "grpc_server_started", "Unary calls and streams that began.", labels=METHOD
        ),
        CounterMetricFamily(
            "grpc_server_msg_received", "Messages received from callers.", labels=METHOD
        ),
        CounterMetricFamily("grpc_server_msg_sent", "Messages sent to callers.", labels=METHOD),
        CounterMetricFamily(
            "grpc_server_handled", "Unary calls and streams that ended, by status.", labels=CALL
        ),
        HistogramMetricFamily(
            "grpc_server_handling_seconds",
            "Duration of unary calls, from when the server accepts them.",
            labels=CALL,
        ),
    )
