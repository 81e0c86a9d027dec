"""/stream/prices: prices as they change, as server-sent events."""

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, cast

from sse_starlette import EventSourceResponse
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.operation import Content, Operation, Parameter, Tag
from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.api.rendering import ALWAYS
from marketflow.streaming.hub import Hub
from marketflow.streaming.selection import Selection, named

if TYPE_CHECKING:
    import anyio

RETRY = b"retry: 1000\n\n"
"""How long (ms) a browser waits before it connects again."""

SEND_SECONDS = 60.0
"""After so long without taking anything a client is given up, under a server that does not see to that itself."""

GRACE_SECONDS = 2.0
"""How long the end of a stream may take once the server is to end."""

_STREAM = Tag("stream", "Prices as they change.")

_QUERY = (
    Parameter("symbols", "Of which symbols, separated by commas; of all where none is named.", {"type": "string"}),
    Parameter("exchanges", "On which exchanges, separated by commas; on all where none is named.", {"type": "string"}),
)


def stream_operations() -> list[Operation]:
    """The operation of this module."""
    return [
        Operation(
            id="streamPrices",
            path="/stream/prices",
            endpoint=_stream,
            tag=_STREAM,
            summary="Prices as they change, as server-sent events",
            answer=Content(("text/event-stream",), "Events, without an end.", {"type": "string"}),
            query=_QUERY,
            problems=(UnknownExchange, UnknownSymbol),
        )
    ]


async def _stream(request: Request) -> Response:
    context = context_of(request)
    hub = context.hub
    query = request.query_params
    selection = hub.selection(named(context, listed(query, "exchanges"), listed(query, "symbols")))
    batches = _batches(hub, selection, request.headers.get("last-event-id", ""))
    return EventSourceResponse(
        batches,
        headers=ALWAYS,
        ping=0,  # heartbeats are ours
        send_timeout=SEND_SECONDS,
        shutdown_event=cast("anyio.Event", _Told(hub)),
        shutdown_grace_period=GRACE_SECONDS,
    )


def listed(query: QueryParams, name: str) -> Iterator[str]:
    """The names in a parameter, which may be repeated and hold several, separated by commas."""
    for value in query.getlist(name):
        yield from (each.strip() for each in value.split(",") if each.strip())


async def _batches(hub: Hub, selection: Selection, last_id: str) -> AsyncIterator[bytes]:
    with hub.client(selection, last_id) as client:
        yield RETRY
        while True:
            batch = await client.next()
            yield batch.server_sent
            if batch.is_last:
                return


class _Told:
    """What the response sets once a server that did not tell us is to end."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def set(self) -> None:
        self._hub.end()
