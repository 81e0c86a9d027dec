"""/stream/prices: prices as they change, as server-sent events."""

from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

from sse_starlette import EventSourceResponse
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import UNTIMED, RequestMetrics
from marketflow.api.openapi.operation import Content, Operation, Parameter, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests, UnknownExchange, UnknownSymbol
from marketflow.api.rendering import ALWAYS
from marketflow.api.streaming.hub import Hub
from marketflow.api.streaming.selection import Selection, named

if TYPE_CHECKING:
    import anyio

STREAMING = "marketflow.api.streaming"
"""The extension of a server that is told, by calling `begin`, that an answer does not end by itself."""

RETRY = b"retry: 1000\n\n"
"""How long (ms) a browser waits before it connects again."""

SEND_SECONDS = 60.0
"""After so long without taking anything a client is given up, under a server that does not see to that itself."""

GRACE_SECONDS = 2.0
"""How long the end of a stream may take once the server is to end."""

_STREAM = Tag("stream", "Prices as they change.")

_DESCRIPTION = """\
The answer goes on for as long as the client likes. A client that is slow misses prices that newer ones have replaced,
and nothing else; one that takes nothing for half a minute is cut off. Whoever connects again with the id of the last
event as `Last-Event-ID`, as browsers do, is told what has changed since, if it is the same process that answers; else
it begins with a `snapshot`.

`/ws` is a WebSocket with the same parameters and the same events as messages `{"event","id","data"}`. Its client may
send `{"op":"subscribe","symbols":[...],"exchanges":[...]}` and `{"op":"unsubscribe",...}`, where a list that is missing
or empty means all of that kind. The answer is `{"event":"subscribed","data":{"symbols","exchanges","series"}}` and a
`snapshot`, or `{"event":"error","data":{"code","detail"}}`, which changes nothing. Pages of other sites are refused.
"""

_ANSWER = """\
Events with `id`, `event` and, on one line, `data` as JSON:

- `snapshot`: `{"mode","symbols","exchanges","prices":[{"symbol","exchange","price","timestamp"}],"health"}`. First of
  all, and again when the mode has changed; it replaces what was told before. `health` is as in `GET /health`.
- `prices`: `{"prices":[...]}`, the newest price of every series that has changed since the last event.
- `mode`: `{"mode","previous"}`: another mode runs; a `snapshot` follows.
- `health`: as in `GET /health`, when anything but the uptime has changed.
- `heartbeat`: `{"timestamp"}`, the time of the server, every 5 s.
- `end`: `{"reason":"shutdown"}`: the server ends, and the answer with it.
"""


_QUERY = (
    Parameter("symbols", "Of which symbols, separated by commas; of all where none is named.", {"type": "string"}),
    Parameter("exchanges", "On which exchanges, separated by commas; on all where none is named.", {"type": "string"}),
)


PARAMETERS = tuple(parameter.name for parameter in _QUERY)
"""Names of the parameters of a stream."""


def stream_operations(times: RequestMetrics) -> list[Operation]:
    """The operation of this module."""

    async def stream(request: Request) -> Response:
        context = context_of(request)
        hub = context.hub
        selection = selected(context, request.query_params)
        release = hub.reserve(context.clients.of(request.scope))
        if request.method == "GET":
            request.scope[UNTIMED] = True
            if (streaming := request.scope.get("extensions", {}).get(STREAMING)) is not None:
                streaming["begin"]()
        batches = _batches(hub, selection, request.headers.get("last-event-id", ""), times)
        return _Stream(
            release,
            batches,
            headers=ALWAYS,
            ping=0,  # heartbeats are ours
            send_timeout=SEND_SECONDS,
            shutdown_event=cast("anyio.Event", _Told(hub)),
            shutdown_grace_period=GRACE_SECONDS,
        )

    return [
        Operation(
            id="streamPrices",
            path="/stream/prices",
            endpoint=stream,
            tag=_STREAM,
            summary="Prices as they change, as server-sent events",
            description=_DESCRIPTION,
            answer=Content(("text/event-stream",), _ANSWER, {"type": "string"}, ("X-Accel-Buffering",)),
            query=_QUERY,
            problems=(UnknownExchange, UnknownSymbol, ServiceUnavailable, TooManyRequests),
        )
    ]


def selected(context: Context, query: QueryParams) -> Selection:
    """What a query asks to be told of.

    Raises:
        UnknownExchange: it names one that there is not.
        UnknownSymbol: it names one that there is not.
    """
    return context.hub.selection(named(context.names, _listed(query, "exchanges"), _listed(query, "symbols")))


def _listed(query: QueryParams, name: str) -> Iterator[str]:
    """The names in a parameter, which may be repeated and hold several, separated by commas."""
    for value in query.getlist(name):
        yield from (each.strip() for each in value.split(",") if each.strip())


async def _batches(hub: Hub, selection: Selection, last_id: str, times: RequestMetrics) -> AsyncIterator[bytes]:
    with times.streams.client("sse") as sent, hub.client(selection, last_id) as client:
        yield RETRY
        while True:
            batch = await client.next()
            yield batch.server_sent
            sent(len(batch.messages))
            if batch.is_last:
                return


class _Stream(EventSourceResponse):
    """An answer whose place is free again once it has ended, also where it did not get to its first event."""

    def __init__(self, release: Callable[[], None], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()


class _Told:
    """What the response sets once a server that did not tell us is to end."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def set(self) -> None:
        self._hub.end()
