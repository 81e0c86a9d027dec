"""How long requests take, by route, method and status, and what is counted of those that do not end by themselves.

Several processes on one port add up what they count in files of a folder in memory, since nobody can choose which of
them answers when the counts are asked for.
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
"""In seconds: from what an answer out of memory takes up to the deadlines of the stores."""

OTHER = "other"
"""The route of a path that has none, and a method that no route has: whoever asks could make up any number of them."""

UNTIMED = "marketflow.untimed"
"""Set in the scope of a request whose answer lasts for as long as the client likes."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_IN_MEMORY = "/dev/shm"  # noqa: S108 - where there is none, the usual place for temporary files

# When each series began would be as many series again.
prometheus_client.disable_created_metrics()


class RequestMetrics:
    """A histogram of requests, and how the process does that serves them where there is only one."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._histogram = Histogram(
            "marketflow_http_request_seconds",
            "From a request to the end of its answer.",
            ["route", "method", "status"],
            registry=self._registry,
            buckets=BOUNDS,
        )
        self.streams = StreamCounters(self._registry)
        """What is counted of answers that do not end by themselves, which are not timed."""
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
        if (observe := self._observe.get(labels)) is None:  # looking it up takes longer than counting
            observe = self._observe[labels] = self._histogram.labels(route, method, str(status)).observe
        observe(seconds)

    def collect(self) -> Iterable[Metric]:
        """All that was counted, by other processes of the same folder as well."""
        shared = os.environ.get(_FOLDER)
        return MultiProcessCollector(None, shared).collect() if shared else self._registry.collect()


class RequestTiming:
    """Times every request that is HTTP. Middleware, to be the outermost."""

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
            status = HTTPStatus.INTERNAL_SERVER_ERROR.value  # as it is answered further out
            raise
        finally:
            if status is not None and not scope.get(UNTIMED):  # without a status the client has gone
                route = getattr(scope.get("route"), "path", OTHER)
                method = scope["method"] if scope["method"] in _METHODS else OTHER
                self._times.observe(route, method, status, perf_counter() - began)


@contextmanager
def shared_folder() -> Iterator[str]:
    """A folder in which processes add up what they count.

    Raises:
        StartError: it cannot be made.
    """
    place = _IN_MEMORY if os.access(_IN_MEMORY, os.W_OK) else None
    try:
        folder = tempfile.TemporaryDirectory(prefix="marketflow-", dir=place, ignore_cleanup_errors=True)
    except OSError as error:
        raise StartError(f"the workers have no folder for what they count: {error}") from error
    with folder as name:
        yield name


def share(folder: str, number: int) -> None:
    """Add up in this folder from now on.

    The number is that of this process among those that run; whoever has had it before is taken over from.
    """
    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: number)
