"""GET /stream/prices and /stream/candles: the stream as server-sent events."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from http import HTTPStatus
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import UNTIMED, RequestMetrics
from marketflow.api.openapi.operation import Content, Endpoint, Operation, Parameter, Tag
from marketflow.api.problems import Problem, ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candle_parameters import DEFAULT_INTERVAL, InvalidInterval
from marketflow.api.rendering import ALWAYS
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.api.streaming.candle_stream.candle_series import (
    MOST_CANDLE_SERIES,
    TooManySeries,
    candle_series_of,
)
from marketflow.api.streaming.subscriber import Output, Subscriber
from marketflow.api.streaming.subscription import Subscription, series_of
from marketflow.text import words

if TYPE_CHECKING:
    import anyio

STREAMING = "marketflow.api.streaming"
"""ASGI extension of the server: calling its `begin` marks a response that streams without end, and returns what takes
its framed bytes: chunks or frames, once the headers are sent."""

RETRY = b"retry: 1000\n\n"
"""Reconnection time of browsers (1000 ms)."""

SEND_SECONDS = 60.0
"""Limit of one write, for servers that do not abort stalled connections themselves."""

SHUTDOWN_GRACE_SECONDS = 2.0
"""Time that a stream has to send its last event on shutdown."""

_STREAM = Tag("stream", "Prices and candles as they change.")

_DESCRIPTION = """\
The response streams until the client disconnects. A slow client receives only the newest price of each series; a
client that reads nothing for 30 s is disconnected. A client that reconnects with the id of the last event as
`Last-Event-ID`, as browsers do, receives the changes since then if the same process answers, else a `snapshot`.

`/ws` is a WebSocket with the same parameters and the same events as messages `{"event","id","data"}`. The client may
send `{"op":"subscribe","symbols":[...],"exchanges":[...]}` and `{"op":"unsubscribe",...}`; a missing or empty list
stands for all. With `intervals` it is about candles, see `/stream/candles`. The reply is
`{"event":"subscribed","data":{"symbols","exchanges","series","candles"}}` and a `snapshot`, or
`{"event":"error","data":{"code","detail"}}`, which changes nothing. Pages of other origins are refused.
"""

_EVENTS = """\
Events with `id`, `event` and, on one line, `data` as JSON:

- `snapshot`: `{"mode","symbols","exchanges","prices":[{"symbol","exchange","price","timestamp"}],"health"}`. The first
  event, and again after a switch of the mode; it replaces all earlier events. `health` is as in `GET /health`, without
  `shards`.
- `prices`: `{"prices":[...]}`, the newest price of every series that has changed since the last event.
  Those of `reference` also have `exchanges`, how many count. They change without a tick when one price turns stale.
- `mode`: `{"mode","previous"}`: the mode was switched; a `snapshot` follows.
- `health`: as in `GET /health`, without `shards`, when anything but the uptime has changed.
- `heartbeat`: `{"timestamp"}`, the time of the server, every 5 s.
- `end`: `{"reason":"shutdown"}`: the server shuts down, and the stream ends.
"""


MOST_RATE = 100
"""Highest `max_rate`; without one, events come as fast as they can be sent."""


class InvalidRate(Problem):
    """The rate is not a whole number from 1 to 100."""

    status = HTTPStatus.BAD_REQUEST
    code = "invalid_rate"


_MAX_RATE = Parameter(
    "max_rate",
    "Updates a second at most: an update then has the newest value of each series that has changed since the last one. "
    "A page that is looked at needs 5. As many as there are by default.",
    {"type": "integer", "minimum": 1, "maximum": MOST_RATE},
    (1, 5),
)

_QUERY = (
    Parameter("symbols", "Symbols, separated by commas or spaces; all by default.", {"type": "string"}),
    Parameter(
        "exchanges",
        "Exchanges, separated by commas or spaces; all by default. `reference` is their median, only on request.",
        {"type": "string"},
    ),
    _MAX_RATE,
)

_CANDLES_DESCRIPTION = """\
A client joins without a gap: the `snapshot` has the last closed candle and all since, `GET /candles` those before. Then
each candle is sent whenever it has changed, up to ten times a second, and in its last version once, with `closed` true:
no tick that would be accepted can change it any more. A closed candle is sent again only when it was corrected (trades
that were missing were fetched, say), with a higher `version`, or more ticks where a minute had none; so are the longer
ones that it is part of. Each replaces the one with the same `symbol`, `exchange`, `interval` and `time`.

A slow client receives only the newest version of each candle; for the rest this stream is as `/stream/prices`. One that
resumes with `Last-Event-ID` receives all candles that have changed since, or a `snapshot`.

On `/ws` the same candles come with `intervals` as parameter, or
`{"op":"subscribe","intervals":[...],"symbols":[...],"exchanges":[...]}`, also beside prices.
"""

_CANDLES_EVENTS = """\
Events with `id`, `event` and, on one line, `data` as JSON: those of `/stream/prices`, but `candles` for `prices`:

- `snapshot`: `{"mode","symbols","exchanges","prices","health","candles"}`. The first event, and again after a switch of
  the mode; `prices` is empty.
- `candles`: `{"candles":[...]}`, every candle that has changed since the last event, the oldest first. Each has the
  fields of those of `/candles`, and `symbol`, `exchange` (null over all) and `interval`.
"""

_CANDLES_QUERY = (
    _QUERY[0],
    Parameter(
        "exchanges",
        "Exchanges, separated by commas or spaces; `reference` is the median over all. Without any, candles are those "
        "of all exchanges merged, as in `/candles/{symbol}`.",
        {"type": "string"},
    ),
    Parameter(
        "intervals",
        f"Lengths of candles, separated by commas or spaces: {', '.join(INTERVALS)}; `{DEFAULT_INTERVAL}` by default. "
        f"Symbols by exchanges by intervals may be {MOST_CANDLE_SERIES}.",
        {"type": "string"},
        (DEFAULT_INTERVAL, "1m,1h"),
    ),
    _MAX_RATE,
)

PARAMETERS = tuple(parameter.name for parameter in _CANDLES_QUERY)
"""Names of the query parameters of /ws."""

_CHUNK = attrgetter("chunk")

Requested = Callable[[Context, QueryParams], Subscription]


def stream_operations(metrics: RequestMetrics) -> list[Operation]:
    """Return the operations of this module."""
    return [
        Operation(
            id="streamPrices",
            path="/stream/prices",
            endpoint=_endpoint(requested_prices, metrics),
            tag=_STREAM,
            summary="Prices as they change, as server-sent events",
            description=_DESCRIPTION,
            answer=Content(("text/event-stream",), _EVENTS, {"type": "string"}, ("X-Accel-Buffering",)),
            query=_QUERY,
            problems=(InvalidRate, UnknownExchange, UnknownSymbol, ServiceUnavailable, TooManyRequests),
        ),
        Operation(
            id="streamCandles",
            path="/stream/candles",
            endpoint=_endpoint(requested_candles, metrics),
            tag=_STREAM,
            summary="Candles as they change, as server-sent events",
            description=_CANDLES_DESCRIPTION,
            answer=Content(("text/event-stream",), _CANDLES_EVENTS, {"type": "string"}, ("X-Accel-Buffering",)),
            query=_CANDLES_QUERY,
            problems=(
                InvalidInterval,
                InvalidRate,
                TooManySeries,
                UnknownExchange,
                UnknownSymbol,
                ServiceUnavailable,
                TooManyRequests,
            ),
        ),
    ]


def _endpoint(requested: Requested, metrics: RequestMetrics) -> Endpoint:
    """Return an endpoint that streams what a query requests."""

    async def stream(request: Request) -> Response:
        from marketflow.api.streaming.sse_response import SseResponse  # with the first stream, see there

        context = context_of(request)
        broadcaster = context.broadcaster
        subscription = requested(context, request.query_params)
        pause_seconds = requested_pause(request.query_params)
        release = broadcaster.reserve(context.clients.of(request.scope))
        output = None
        if request.method == "GET":
            request.scope[UNTIMED] = True
            output = output_of(request.scope)
        subscribed = broadcaster.subscribe(subscription, request.headers.get("last-event-id", ""), pause_seconds)
        batches = _batches(subscribed, metrics, output)
        return SseResponse(
            release,
            batches,
            headers=ALWAYS,
            ping=0,  # the stream has its own heartbeats
            send_timeout=SEND_SECONDS,
            shutdown_event=cast("anyio.Event", _ShutdownEvent(broadcaster)),
            shutdown_grace_period=SHUTDOWN_GRACE_SECONDS,
        )

    return stream


def requested_prices(context: Context, query: QueryParams) -> Subscription:
    """Return the subscription to prices that the query parameters name.

    Raises:
        UnknownExchange: an exchange is not configured.
        UnknownSymbol: a symbol is not configured.
    """
    return context.broadcaster.subscription(
        series_of(context.names, _listed(query, "exchanges"), _listed(query, "symbols"))
    )


def requested_candles(context: Context, query: QueryParams) -> Subscription:
    """Return the subscription to candles that the query parameters name.

    Raises:
        UnknownExchange, UnknownSymbol: it is not configured.
        InvalidInterval: an interval is not one of those listed.
        TooManySeries: they are more than one subscription may have.
    """
    names = (_listed(query, name) for name in ("exchanges", "symbols", "intervals"))
    return context.broadcaster.subscription(frozenset(), candle_series_of(context.names, *names))


def requested_pause(query: QueryParams) -> float:
    """Return the least time between two updates that `max_rate` asks for, in seconds; 0 without one.

    Raises:
        InvalidRate: it is not a whole number of updates a second, or too many.
    """
    text = query.get("max_rate")
    if text is None:
        return 0.0
    if text.isascii() and text.isdecimal() and len(text) <= len(str(MOST_RATE)) and 1 <= int(text) <= MOST_RATE:
        return 1 / int(text)
    raise InvalidRate(f"`max_rate` is a whole number from 1 to {MOST_RATE}.")


def _listed(query: QueryParams, name: str) -> Iterator[str]:
    """Return the names in a query parameter, which may be repeated, each a list with commas or spaces."""
    return chain.from_iterable(map(words, query.getlist(name)))


def output_of(scope: Scope) -> Output | None:
    """Mark the response as a stream, and return its output; None if the server offers none."""
    streaming = scope.get("extensions", {}).get(STREAMING)
    return None if streaming is None else streaming["begin"]()


async def _batches(
    subscribed: AbstractContextManager[Subscriber], metrics: RequestMetrics, output: Output | None
) -> AsyncIterator[bytes]:
    with metrics.registered.streams.client("sse") as sent, subscribed as subscriber:
        yield RETRY
        if output is not None:
            await subscriber.write_all(output, _CHUNK, sent)
            return
        while True:
            batch = await subscriber.next()
            yield batch.server_sent
            sent(len(batch.messages))
            if batch.is_last:
                return


class _ShutdownEvent:
    """Set by sse-starlette when the server shuts down without the lifespan having ended the streams."""

    def __init__(self, broadcaster: Broadcaster) -> None:
        self._broadcaster = broadcaster

    def set(self) -> None:
        self._broadcaster.end()
