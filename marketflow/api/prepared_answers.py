"""Prepared answers: GET /prices/* answered in the server's protocol, where the memory of this process has the data.

Parsing, routing, middleware and a task take ten times as long as such a query. So once a request was parsed, what it
asks for is kept by its bytes: the same bytes at the start of a message ask for the same again. A server calls the
application where there is no prepared answer: for the first of equal requests, for whatever is unusual, for every
error, and whenever a store must be queried.

Data, mode and clock are read anew for each request, by the queries of the routes, so no answer is older than theirs.
Responses are made by the routes' functions. What the middleware does for such a request is done here: the Host header
is checked, the request is counted and timed. No limit of clients applies to such requests.
"""

import re
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

from loguru import logger

from marketflow.api.context import Context
from marketflow.api.middleware.allowed_hosts import HostRule
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import refuse_unknown_parameters
from marketflow.api.problems import Problem
from marketflow.api.queries.path_parameters import PathParameters, path_parameters
from marketflow.api.queries.period import PERIOD
from marketflow.api.queries.prices import PriceQueries, newest_of, summary_of
from marketflow.api.rendering import RawHeaders, message_of
from marketflow.api.routes.prices import (
    SummaryResponse,
    average_response,
    highest_response,
    latest_response,
    lowest_response,
    period_in,
)
from marketflow.clock import milliseconds
from marketflow.logs import RateLimit
from marketflow.logs.rate_limit import omitted_text
from marketflow.model import Candle, Mode, Tick
from marketflow.stores.cache_limits import RECENT_MS

PREPARED_ANSWERS = "prepared_answers"
"""Key of the PreparedAnswers in the state of the lifespan."""

MAX_PREPARED = 2048
"""Requests that are kept; the oldest are evicted first."""

LONGEST_REQUEST = 1024

_URL = re.compile(rb"/prices/(latest|highest|lowest|average)(?:/([\w.~:-]+))?/([\w.~:-]+)(?:\?([\w=&]*))?")
"""Without escaped characters, so that the path is the same bytes."""

_RESPONSES: dict[str, SummaryResponse] = {
    "highest": highest_response,
    "lowest": lowest_response,
    "average": average_response,
}

_WITHOUT_EFFECT = frozenset(
    name.encode()
    for name in (
        *("host", "connection", "user-agent", "accept", "accept-encoding", "accept-language", "referer", "cookie"),
        *("cache-control", "pragma", "dnt", "priority", "te", "upgrade-insecure-requests", "from", "via", "forwarded"),
        *("sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user", "sec-gpc"),
        *("sec-ch-ua", "sec-ch-ua-mobile", "sec-ch-ua-platform", "x-real-ip", "x-request-id", "traceparent"),
        *("x-forwarded-for", "x-forwarded-host", "x-forwarded-port", "x-forwarded-proto"),
    )
)
"""Headers that change no answer of these routes, but for the check of Host. Requests with others are not prepared."""

Server = tuple[str, int | None] | None
"""The address at which a connection was accepted, as in an ASGI scope."""


class _Prepared(Protocol):
    route: str

    def message(self, mode: Mode, server_headers: RawHeaders) -> bytes | None:
        """Return the response of now, as bytes; None if a store must be queried or there is no 200."""
        ...


class PreparedAnswers:
    """Answers requests without waiting, or not at all; for one event loop.

    Args:
        context: of the routes.
        hosts: which hosts may be addressed.
        times: where requests are counted.
        added: headers that middleware adds to the response to any request without an Origin.
    """

    def __init__(self, context: Context, hosts: HostRule, times: RequestMetrics, added: RawHeaders = ()) -> None:
        self._context = context
        self._hosts = hosts
        self._times = times
        self._added = added
        self._failures = RateLimit(10.0)
        self._prepared: dict[tuple[bytes, Server], _Prepared] = {}

    def take_context(self, context: Context) -> None:
        """Replace the context, and with it all that was prepared."""
        self._context = context
        self._prepared.clear()

    def answer(self, request: bytes, server: Server, server_headers: RawHeaders) -> bytes | None:
        """Return the whole response to a request; None if the application has to answer it.

        Args:
            request: what was received from the start of a message on.
            server: where it was received.
            server_headers: what the server adds to each response, as a list that is never changed.
        """
        if (prepared := self._prepared.get((request, server))) is None:
            return None
        began = perf_counter()
        try:
            message = prepared.message(self._context.mode.current, server_headers)
        except Exception as error:  # noqa: BLE001 - a bug here; the route may yet answer
            if (omitted := self._failures.admit(type(error).__name__)) is not None:
                logger.opt(exception=error).error(
                    "prepared answer of {} failed{}", prepared.route, omitted_text(omitted)
                )
            return None
        if message is not None:
            self._times.registered.observe(prepared.route, "GET", 200, perf_counter() - began)
        return message

    def prepare(self, request: bytes, url: bytes, headers: Sequence[tuple[bytes, bytes]], server: Server) -> None:
        """Prepare answers to a GET of HTTP/1.1 without a body that keeps its connection alive, if it is a usual one.

        Args:
            request: all of it, as it was received.
            url: of it.
            headers: of it, names in lower case.
            server: where it was received.
        """
        if (
            not (match := _URL.fullmatch(url))
            or len(request) > LONGEST_REQUEST
            or (request, server) in self._prepared
            or not _WITHOUT_EFFECT.issuperset(name for name, _ in headers)
            or not self._hosts.allows(headers, server)
            or (prepared := self._prepared_for(match)) is None
        ):
            return
        if len(self._prepared) >= MAX_PREPARED:
            del self._prepared[next(iter(self._prepared))]
        self._prepared[request, server] = prepared

    def _prepared_for(self, match: "re.Match[bytes]") -> _Prepared | None:
        name, symbol, query = match[1].decode(), match[3].decode(), match[4] or b""
        exchange = match[2].decode() if match[2] else None
        route = f"/prices/{name}/{{exchange}}/{{symbol}}" if exchange else f"/prices/{name}/{{symbol}}"
        prices = self._context.prices
        try:
            parameters = {mode: path_parameters(self._context, mode, exchange, symbol) for mode in Mode}
            refuse_unknown_parameters(query, (PERIOD.name,) if name in _RESPONSES else ())
            if name not in _RESPONSES:
                return _Latest(route, prices, parameters, self._added)
            text, period = period_in(query)
        except Problem:
            return None
        if period is None or period > RECENT_MS:
            return None
        return _Summary(route, prices, parameters, self._added, _RequestedPeriod(text, period), _RESPONSES[name])


class _Latest:
    """The newest tick; its message is kept while it is the same."""

    def __init__(
        self, route: str, prices: PriceQueries, parameters: Mapping[Mode, PathParameters], added: RawHeaders
    ) -> None:
        self.route = route
        self._added = added
        self._newest_in_memory = prices.cache.newest_in_memory
        self._parameters = parameters
        self._ticks: list[Tick | None] | None = None
        self._server_headers: RawHeaders = []
        self._message: bytes | None = None

    def message(self, mode: Mode, server_headers: RawHeaders) -> bytes | None:
        parameters = self._parameters[mode]
        ticks = self._newest_in_memory(parameters.series)
        # Ticks of two modes that are equal have equal responses.
        if ticks != self._ticks or server_headers is not self._server_headers:
            quote = None if ticks is None else newest_of(parameters.series, ticks)
            response = None if quote is None else latest_response(parameters, quote)
            self._message = None if response is None else message_of(response, server_headers, self._added)
            self._ticks, self._server_headers = ticks, server_headers
        return self._message


class _RequestedPeriod(NamedTuple):
    """As it was given, and in ms."""

    text: str
    length: int


class _Summary:
    """Something of the summary of a period; its message is kept while its candles are the same list."""

    def __init__(
        self,
        route: str,
        prices: PriceQueries,
        parameters: Mapping[Mode, PathParameters],
        added: RawHeaders,
        period: _RequestedPeriod,
        respond: SummaryResponse,
    ) -> None:
        self.route = route
        self._prices = prices
        self._parameters = parameters
        self._added = added
        self._period = period
        self._respond = respond
        self._candles: list[Candle | None] | None = None
        self._server_headers: RawHeaders = []
        self._message: bytes | None = None

    def message(self, mode: Mode, server_headers: RawHeaders) -> bytes | None:
        parameters = self._parameters[mode]
        now = milliseconds(self._prices.clock())
        candles = self._prices.candles_in_memory(parameters.series, self._period.length, now)
        # Lists are compared by identity: another one, of another time or mode, is another list.
        if candles is not self._candles or server_headers is not self._server_headers:
            self._message = None if candles is None else self._encoded(parameters, candles, now, server_headers)
            self._candles, self._server_headers = candles, server_headers
        return self._message

    def _encoded(
        self, parameters: PathParameters, candles: list[Candle | None], now: int, server_headers: RawHeaders
    ) -> bytes | None:
        since = now - self._period.length
        try:
            summary = summary_of(parameters.series, candles, since, now, complete=True)
            response = self._respond(parameters, self._period.text, summary)
        except Problem:
            return None
        return message_of(response, server_headers, self._added)
