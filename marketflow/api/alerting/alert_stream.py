"""GET /stream/alerts: events of alerts as server-sent events."""

from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import Response

from marketflow.api.context import context_of
from marketflow.api.middleware.request_metrics import UNTIMED, RequestMetrics
from marketflow.api.openapi.operation import Content, Operation, Tag
from marketflow.api.problems import ServiceUnavailable, TooManyRequests
from marketflow.api.rendering import ALWAYS
from marketflow.api.streaming.broadcaster import HEARTBEAT_SECONDS
from marketflow.api.streaming.sse_route import RETRY, SEND_SECONDS, STREAMING
from marketflow.stores.ports import NumberedEvent

_DESCRIPTION = """\
Events are sent when they are stored in PostgreSQL, in the order of their numbers. A client that reconnects with the id
of the last event as `Last-Event-ID`, as browsers do, receives all later ones, from whichever process answers; any
client may begin after a number of its own this way. Without it, a stream begins with the next event.
"""

_EVENTS = """\
Events with `id`, `event` and, on one line, `data` as JSON:

- `alert`: an event as in `GET /events/alerts`; the id is its number.
- `heartbeat`: `{}`, every 5 s without an event.
- `end`: `{"reason":"shutdown"}`: the server shuts down, and the stream ends.
"""


def alert_stream_operations(metrics: RequestMetrics) -> list[Operation]:
    """Return the operation of this module."""

    async def stream(request: Request) -> Response:
        from marketflow.api.streaming.sse_response import SseResponse  # with the first stream, see there

        context = context_of(request)
        release = context.broadcaster.reserve(context.clients.of(request.scope))
        if request.method == "GET":
            request.scope[UNTIMED] = True
            if (streaming := request.scope.get("extensions", {}).get(STREAMING)) is not None:
                streaming["begin"]()
        last_id = request.headers.get("last-event-id", "")
        after = int(last_id) if last_id.isascii() and last_id.isdecimal() and len(last_id) < 19 else None
        chunks = _chunks(context.alerts.events.follow(after, HEARTBEAT_SECONDS), metrics)
        return SseResponse(release, chunks, headers=ALWAYS, ping=0, send_timeout=SEND_SECONDS)

    return [
        Operation(
            id="streamAlerts",
            path="/stream/alerts",
            endpoint=stream,
            tag=Tag("stream", "Prices as they change."),
            summary="Events of alerts as they are stored, as server-sent events",
            description=_DESCRIPTION,
            answer=Content(("text/event-stream",), _EVENTS, {"type": "string"}, ("X-Accel-Buffering",)),
            problems=(ServiceUnavailable, TooManyRequests),
        )
    ]


async def _chunks(batches: AsyncIterator[list[NumberedEvent]], metrics: RequestMetrics) -> AsyncIterator[bytes]:
    with metrics.registered.streams.client("sse") as sent:
        yield RETRY
        async for events in batches:
            yield b"".join(map(_encoded, events)) or b"event: heartbeat\ndata: {}\n\n"
            sent(len(events))
        yield b'event: end\ndata: {"reason":"shutdown"}\n\n'


def _encoded(event: NumberedEvent) -> bytes:
    return f"id: {event.number}\nevent: alert\ndata: {event.event}\n\n".encode()
