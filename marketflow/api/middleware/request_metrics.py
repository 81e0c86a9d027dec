"""Metrics of requests: durations by route, method and status, and counters of streams.

Worker processes on one port share their metrics in files of a folder in memory, because any of them may answer a
scrape.
"""

import os
import tempfile
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from functools import cached_property
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from marketflow.errors import StartError

if TYPE_CHECKING:
    from marketflow.api.middleware.registered_metrics import RegisteredMetrics

OTHER = "other"
"""Label of a path without a route, and of an unknown method: clients could send any number of them."""

UNTIMED = "marketflow.untimed"
"""Key in the scope of a request that is not timed, because its response is a stream."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_IN_MEMORY = "/dev/shm"  # noqa: S108 - where there is none, the usual place for temporary files


class RequestMetrics:
    """Metrics of requests and streams.

    They are made with the first one, when it has been answered: the library takes a twentieth of the imports before the
    first price.
    """

    def __init__(self) -> None:
        if _FOLDER in os.environ:
            _ = self.registered  # resets what a killed process with this number has left in the folder

    @cached_property
    def registered(self) -> "RegisteredMetrics":
        """The metrics."""
        from marketflow.api.middleware.registered_metrics import RegisteredMetrics

        return RegisteredMetrics(os.environ.get(_FOLDER))


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
                self._times.registered.observe(route, method, status, perf_counter() - began)


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
    from prometheus_client import values

    os.environ[_FOLDER] = folder
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: number)
