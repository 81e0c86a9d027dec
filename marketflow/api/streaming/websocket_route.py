"""GET /ws: the events of /stream/prices and /stream/candles as WebSocket messages, with a subscription that the client
may change.
"""

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from http import HTTPStatus
from operator import attrgetter
from typing import Any, ClassVar, Literal

import msgspec
from msgspec import UNSET
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from marketflow.api.alerting.event_answer import event_answer
from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import refuse_unknown_parameters
from marketflow.api.problems import Problem, UnknownParameter, answer_to, too_many_requests
from marketflow.api.routes.charting.candle_objects import Interval
from marketflow.api.streaming.broadcaster import HEARTBEAT_SECONDS
from marketflow.api.streaming.candle_stream.candle_series import candle_series_of, refuse_too_many
from marketflow.api.streaming.events import Rejected, Subscribed
from marketflow.api.streaming.sse_route import (
    PARAMETERS,
    output_of,
    requested_candles,
    requested_pause,
    requested_prices,
)
from marketflow.api.streaming.subscriber import CountSent, Subscriber
from marketflow.api.streaming.subscription import Subscription, series_of
from marketflow.errors import QuotaExceeded
from marketflow.model import REFERENCE
from marketflow.tasks import cancel

PATH = "/ws"

_FRAMES = attrgetter("frames")

GOING_AWAY = 1001
POLICY_VIOLATION = 1008

MESSAGES_PER_SECOND = 10.0
MESSAGE_BURST = 20
"""Rate limit of messages from a client (token bucket); a client that exceeds it is disconnected."""


class UpgradeRequired(Problem):
    """This path serves WebSockets only."""

    status = HTTPStatus.UPGRADE_REQUIRED
    code = "upgrade_required"
    headers: ClassVar[Mapping[str, str]] = {"Upgrade": "websocket", "Connection": "Upgrade"}


class Command(msgspec.Struct, frozen=True):
    """A message from the client: about prices, or about candles if it has intervals."""

    op: Literal["subscribe", "unsubscribe"]
    symbols: list[str] | None = None
    exchanges: list[str] | None = None
    intervals: list[Interval] | None = None


def websocket_routes(metrics: RequestMetrics) -> list[Route | WebSocketRoute]:
    """Return the WebSocket route, and a route that answers plain HTTP requests with 426."""

    async def serve(websocket: WebSocket) -> None:
        context = context_of(websocket)
        try:
            refuse_unknown_parameters(websocket.scope["query_string"], (*PARAMETERS, "alerts"))
            requested = requested_candles if "intervals" in websocket.query_params else requested_prices
            subscription = requested(context, websocket.query_params)
            pause_seconds = requested_pause(websocket.query_params)
            has_alerts = _wants_alerts(websocket.query_params)
            release = context.broadcaster.reserve(context.clients.of(websocket.scope))
        except QuotaExceeded as error:
            await websocket.send_denial_response(too_many_requests(error.seconds))
            return
        except Problem as problem:
            await websocket.send_denial_response(answer_to(problem))
            return
        try:
            with (
                metrics.registered.streams.client("websocket") as sent,
                context.broadcaster.subscribe(subscription, "", pause_seconds) as subscriber,
            ):
                await websocket.accept()
                await _Connection(websocket, context, subscriber, sent, has_alerts).run()
        except WebSocketDisconnect:
            pass
        finally:
            release()

    return [WebSocketRoute(PATH, serve), Route(PATH, _upgrade, include_in_schema=False)]


def _wants_alerts(query: QueryParams) -> bool:
    """Return whether events of alerts are requested.

    Raises:
        UnknownParameter: the value is not one of those that there are.
    """
    value = query.get("alerts", "false")
    if value not in ("true", "false"):
        raise UnknownParameter("`alerts` is `true` or `false`.")
    return value == "true"


async def _upgrade(_: Request) -> Response:
    return answer_to(UpgradeRequired("Connect to this path with a WebSocket."))


class _Connection:
    """One WebSocket connection: a task that receives commands, one that sends events, and one for those of alerts."""

    def __init__(
        self, websocket: WebSocket, context: Context, subscriber: Subscriber, sent: CountSent, has_alerts: bool
    ) -> None:
        self._websocket = websocket
        self._context = context
        self._subscriber = subscriber
        self._sent = sent
        self._has_alerts = has_alerts
        self._replying = asyncio.Lock()

    async def run(self) -> None:
        """Run until the client disconnects or the server shuts down."""
        tasks = [asyncio.create_task(work()) for work in (self._send_events, self._receive_commands)]
        alerts = [asyncio.create_task(self._send_alerts())] if self._has_alerts else []
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(*tasks, *alerts)
            ended = [task for task in tasks if task.done() and not task.cancelled()]
            errors = [error for task in ended if (error := task.exception()) is not None]
        # Both may have ended at the same moment: no close of a client that has disconnected, and no second close.
        for error in errors:
            if not isinstance(error, WebSocketDisconnect):
                raise error
        codes = [None] if errors else [task.result() for task in ended]
        if codes[0] is not None and None not in codes:
            await self._websocket.close(codes[0])

    async def _send_events(self) -> int:
        if (output := output_of(self._websocket.scope)) is not None:
            await self._subscriber.write_all(output, _FRAMES, self._sent)
            return GOING_AWAY
        while True:
            batch = await self._subscriber.next()
            for text in batch.texts:
                await self._websocket.send_text(text)
            self._sent(len(batch.messages))
            if batch.is_last:
                return GOING_AWAY

    async def _receive_commands(self) -> int | None:
        bucket = _TokenBucket()
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return None
            if not bucket.take():
                return POLICY_VIOLATION
            await self._reply(self._execute(message))

    async def _send_alerts(self) -> None:
        async with aclosing(self._context.alerts.events.follow(None, HEARTBEAT_SECONDS)) as batches:
            async for batch in batches:
                for event in batch:
                    await self._reply(event_answer(event))

    async def _reply(self, event: msgspec.Struct) -> None:
        async with self._replying:
            await self._subscriber.reply(event)

    def _execute(self, message: Mapping[str, Any]) -> msgspec.Struct:
        """Change the subscription as the command says, and return the reply."""
        try:
            subscription = self._changed(_decode(message.get("text") or message.get("bytes") or b""))
        except msgspec.MsgspecError as error:
            return Rejected("malformed_message", f"The message is malformed: {error}.")
        except Problem as problem:
            return Rejected(problem.code, str(problem))
        self._context.broadcaster.resubscribe(self._subscriber, subscription)
        return Subscribed(
            list(subscription.symbols),
            list(subscription.exchanges),
            list(subscription.pairs),
            list(subscription.candle_series) if subscription.candles else UNSET,
        )

    def _changed(self, command: Command) -> Subscription:
        """Return the subscription as a command changes it.

        Raises:
            Problem: it names what does not exist, or too much.
        """
        names = self._context.broadcaster.names
        exchanges, symbols = command.exchanges or (), command.symbols or ()
        chosen, candles = self._subscriber.subscription.chosen, self._subscriber.subscription.candles
        begins = command.op == "subscribe"
        if command.intervals is not None:
            series = candle_series_of(names, exchanges, symbols, command.intervals)
            candles = candles | series if begins else candles - series
            refuse_too_many(candles)
        elif begins:
            chosen = chosen | series_of(names, exchanges, symbols)
        else:
            chosen = chosen - series_of(names, exchanges or (*names.exchanges, REFERENCE), symbols)
        return self._context.broadcaster.subscription(chosen, candles)


class _TokenBucket:
    """Rate limit of the messages of one client."""

    def __init__(self) -> None:
        self._tokens = float(MESSAGE_BURST)
        self._refilled_at = time.monotonic()

    def take(self) -> bool:
        """Take a token, and return whether there was one."""
        now = time.monotonic()
        self._tokens = min(float(MESSAGE_BURST), self._tokens + (now - self._refilled_at) * MESSAGES_PER_SECOND)
        self._refilled_at = now
        self._tokens -= 1
        return self._tokens >= 0


_decode = msgspec.json.Decoder(Command).decode
