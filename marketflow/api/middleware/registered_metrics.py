"""Metrics of requests, streams and the process, as prometheus-client keeps them; see RequestMetrics for when."""

from collections.abc import Callable, Iterable

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector
from prometheus_client.multiprocess import MultiProcessCollector

from marketflow.api.streaming.stream_counters import StreamCounters

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bounds of the histogram in seconds: from an answer out of memory up to the timeouts of the stores."""

# The creation times would double the number of series.
prometheus_client.disable_created_metrics()


class RegisteredMetrics:
    """A histogram of requests, counters of streams, and metrics of the process if there is only one.

    Args:
        shared: the folder in which processes share metrics; None for a single process.
    """

    def __init__(self, shared: str | None) -> None:
        self._shared = shared
        self._registry = CollectorRegistry()
        self._histogram = Histogram(
            "marketflow_http_request_seconds",
            "From a request to the end of its response.",
            ["route", "method", "status"],
            registry=self._registry,
            buckets=BOUNDS,
        )
        self.streams = StreamCounters(self._registry)
        """Counters of streams, which are not timed."""
        self.unauthorized = Counter(
            "marketflow_http_unauthorized", "Requests without the token they need.", registry=self._registry
        )
        """Requests to switch the mode with a wrong token, or with none."""
        self._observe: dict[tuple[str, str, int], Callable[[float], None]] = {}
        if shared is None:
            ProcessCollector(registry=self._registry)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        labels = (route, method, status)
        if (observe := self._observe.get(labels)) is None:  # the lookup takes longer than the observation
            observe = self._observe[labels] = self._histogram.labels(route, method, str(status)).observe
        observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Return all metrics, also those of the other processes of the shared folder."""
        return MultiProcessCollector(None, self._shared).collect() if self._shared else self._registry.collect()
