"""Metrics of requests: durations by route, method and status, and counters of streams.

Worker processes on one port share their metrics in files of a folder in memory, because any of them may answer a
scrape.
"""

import os
import tempfile
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from time import perf_counter

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, ProcessCollector, values
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.api.streaming.stream_counters import StreamCounters
from marketflow.errors import StartError

BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
"""Bounds of the histogram in seconds: from an answer out of memory up to the timeouts of the stores."""

OTHER = "other"
"""Label of a path without a route, and of an unknown method: clients could send any number of them."""

UNTIMED = "marketflow.untimed"
"""Key in the scope of a request that is not timed, because its response is a stream."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_IN_MEMORY = "/dev/shm"  # noqa: S108 - where there is none, the usual place for temporary files

# The creation times would double the number of series.
prometheus_client.disable_created_metrics()


class RequestMetrics:
    """A histogram of requests, and metrics of the process if there is only one."""

    def __init__(self) -> None:
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
        if _FOLDER not in os.environ:
            ProcessCollector(registry=self._registry)

    def observe(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count one request."""
        labels = (route, method, status)
        if (observe := self._observe.get(labels)) is None:  # the lookup takes longer than the observation
            observe = self._observe[labels] = self._histogram.labels(route, method, str(status)).observe
        observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """Return all metrics, also those of the other processes of the shared folder."""
        shared = os.environ.get(_FOLDER)
        return MultiProcessCollector(None, shared).collect() if shared else self._registry.collect()


class RequestTiming:
    """Outermost middleware: times every HTTP request."""

    def __init__(self, app: ASGIApp, times: RequestMetrics) -> None:
        self._app = app
        self._times = times

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve the request."""
        return (self._timed if scope["type"] == "http" else self._app)(scope, receive, send)

    async def _timed(self, scope: Scope, receive: Receive, send: Send) -> None:
        status: int | None = None

        def observed(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        began = perf_counter()
        try:
            await self._app(scope, receive, observed)
        except Exception:
            status = HTTPStatus.INTERNAL_SERVER_ERROR.value  # which the outer error handler answers
            raise
        finally:
            if status is not None and not scope.get(UNTIMED):  # no status: the client has disconnected
                route = getattr(scope.get("route"), "path", OTHER)
                method = scope["method"] if scope["method"] in _METHODS else OTHER
                self._times.observe(route, method, status, perf_counter() - began)


@contextmanager
def shared_folder() -> Iterator[str]:
    """Yield a folder in which processes share metrics.

    Raises:
        StartError: it cannot be made.
    """
    place = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    try:
        folder = tempfile.TemporaryDirectory(prefix="marketflow-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise StartError(f"cannot make the folder for metrics of the workers: {error}") from error
    with folder as name:
        yield name


def share(folder: str, number: int) -> None:
    """Share the metrics of this process in a folder from now on.

    `number` identifies this process among those that run; its metrics continue those of an earlier process with the
    same number.
    """
    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: number)
