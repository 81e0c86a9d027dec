"""Builds the HTTP API as one ASGI application."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

from loguru import logger
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.types import Receive, Scope, Send

from marketflow.api.alerting.alert_routes import alert_operations
from marketflow.api.alerting.alert_stream import alert_stream_operations
from marketflow.api.middleware.allowed_hosts import AllowedHosts, HostRule
from marketflow.api.middleware.body_limit import BodyLimit
from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.middleware.compression import GzipCompression
from marketflow.api.middleware.request_metrics import RequestMetrics, RequestTiming
from marketflow.api.middleware.same_site import SameSiteOnly
from marketflow.api.openapi.operation import Operation
from marketflow.api.prepared_answers import PREPARED_ANSWERS, PreparedAnswers
from marketflow.api.problems import ServiceUnavailable, answer_to, problem_handlers
from marketflow.api.reload_route import reload_operation
from marketflow.api.routes.candles import candle_operations
from marketflow.api.routes.charting.klines import kline_operations
from marketflow.api.routes.charting.udf_datafeed import udf_operations
from marketflow.api.routes.documentation import with_documentation
from marketflow.api.routes.exchange_reachability import reachability_operation
from marketflow.api.routes.feed_reports import feed_operations
from marketflow.api.routes.health import status_operations
from marketflow.api.routes.metrics import metrics_operations
from marketflow.api.routes.mode import mode_operations
from marketflow.api.routes.page import market_operations
from marketflow.api.routes.prices import price_operations
from marketflow.api.routes.static_files import static_route
from marketflow.api.routes.tickers import ticker_operations
from marketflow.api.streaming.sse_route import stream_operations
from marketflow.api.streaming.websocket_route import websocket_routes
from marketflow.logs import RateLimit
from marketflow.logs.rate_limit import omitted_text
from marketflow.settings import HttpSettings

ContextLifespan = Callable[[Starlette], AbstractAsyncContextManager[Mapping[str, Any]]]
"""Opens all resources, yields `{"context": Context}`, and closes them."""


class _Application(Starlette):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failures = RateLimit(10.0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, and log unexpected exceptions. At a stop the server cancels requests that take too long."""
        try:
            await super().__call__(scope, receive, send)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            with suppress(RuntimeError):  # a response had begun: the server closes the connection
                await answer_to(ServiceUnavailable("The server is stopping."))(scope, receive, send)
        except Exception as error:
            if scope["type"] != "http":
                raise
            # A 500 has been sent, unless a response had begun: the server then closes the connection.
            if (omitted := self._failures.admit(type(error).__name__)) is not None:
                more = omitted_text(omitted)
                logger.opt(exception=error).error("{} {!r} failed{}", scope["method"], scope["path"], more)


def operations(times: RequestMetrics) -> list[Operation]:
    """Return all operations, in the order of the OpenAPI description."""
    return with_documentation(
        [
            *price_operations(),
            *candle_operations(),
            *kline_operations(),
            *ticker_operations(),
            *udf_operations(),
            *stream_operations(times),
            *alert_operations(times),
            *alert_stream_operations(times),
            *mode_operations(times),
            reload_operation(times),
            *status_operations(),
            *feed_operations(),
            reachability_operation(),
            *metrics_operations(times),
            *market_operations(),
        ]
    )


def _cross_origin_reads(origins: Sequence[str]) -> list[Middleware]:
    """Return the CORS middleware: pages of these origins may read, and change nothing."""
    if not origins:
        return []
    from starlette.middleware.cors import CORSMiddleware

    return [
        Middleware(
            CORSMiddleware,
            allow_origins=[origin.lower() for origin in origins],
            allow_methods=["GET", "HEAD"],
            allow_headers=["Last-Event-ID", "If-None-Match", "Cache-Control"],
            expose_headers=["ETag", "Retry-After"],
            max_age=600,
        )
    ]


def create_app(lifespan: ContextLifespan, http: HttpSettings = HttpSettings()) -> Starlette:  # noqa: B008 - frozen
    """Build the application; its context comes from the lifespan.

    `http` has the host names, the origins whose pages may read, and the trusted proxies.
    """
    clients = ClientLimits(http.trusted_proxies)
    times = RequestMetrics()
    hosts = HostRule(http.host, http.allowed_hosts)
    added = [(b"vary", b"Origin")] if http.allowed_origins else []  # as the CORS middleware does without an Origin

    @asynccontextmanager
    async def with_prepared_answers(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        async with lifespan(app) as state:
            yield {**state, PREPARED_ANSWERS: PreparedAnswers(state["context"], hosts, times, added)}

    app = _Application(
        routes=[*(operation.route() for operation in operations(times)), *websocket_routes(times), static_route()],
        middleware=[
            Middleware(RequestTiming, times=times),
            Middleware(BodyLimit),
            Middleware(AllowedHosts, host=http.host, allowed=http.allowed_hosts),
            Middleware(SameSiteOnly, allowed=http.allowed_origins, host_of=clients.host),
            *_cross_origin_reads(http.allowed_origins),
            Middleware(GzipCompression),
        ],
        exception_handlers=problem_handlers(),
        lifespan=with_prepared_answers,
    )
    # No redirects: some clients would repeat POST /mode/test/ as a GET.
    app.router.redirect_slashes = False
    return app
