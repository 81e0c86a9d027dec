"""/ws: the same events as /stream/prices as messages of a WebSocket, to a client that may change what it is told of."""

import asyncio
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from marketflow.api.context import Context, context_of
from marketflow.api.middleware.request_metrics import RequestMetrics
from marketflow.api.openapi.operation import refuse_unknown_parameters
from marketflow.api.problems import Problem, answer_to, too_many_requests
from marketflow.api.streaming.events import Refused, Subscribed
from marketflow.api.streaming.selection import named
from marketflow.api.streaming.sse import PARAMETERS, selected
from marketflow.api.streaming.stream_counters import Sent
from marketflow.api.streaming.subscriber import Client
from marketflow.errors import QuotaExceeded
from marketflow.tasks import cancel

PATH = "/ws"

GOING_AWAY = 1001
POLICY_VIOLATION = 1008

MESSAGES_A_SECOND = 10.0
MESSAGES_AT_ONCE = 20
"""How many messages a client may send; whoever sends more is cut off."""


class UpgradeRequired(Problem):
    """This path is for WebSockets only."""

    status = HTTPStatus.UPGRADE_REQUIRED
    code = "upgrade_required"
    headers: ClassVar[Mapping[str, str]] = {"Upgrade": "websocket", "Connection": "Upgrade"}


class Order(msgspec.Struct, frozen=True):
    """What a client may send."""

    op: Literal["subscribe", "unsubscribe"]
    symbols: list[str] | None = None
    exchanges: list[str] | None = None


def websocket_routes(times: RequestMetrics) -> list[Route | WebSocketRoute]:
    """The WebSocket, and what is said to those who ask for it as if it were a page."""

    async def talk(websocket: WebSocket) -> None:
        context = context_of(websocket)
        try:
            refuse_unknown_parameters(websocket.scope["query_string"], PARAMETERS)
            selection = selected(context, websocket.query_params)
            release = context.hub.reserve(context.clients.of(websocket.scope))
        except QuotaExceeded as error:
            await websocket.send_denial_response(too_many_requests(error.seconds))
            return
        except Problem as problem:
            await websocket.send_denial_response(answer_to(problem))
            return
        try:
            with times.streams.client("websocket") as sent, context.hub.client(selection) as client:
                await websocket.accept()
                await _Conversation(websocket, context, client, sent).run()
        except WebSocketDisconnect:
            pass
        finally:
            release()

    return [WebSocketRoute(PATH, talk), Route(PATH, _upgrade, include_in_schema=False)]


async def _upgrade(_: Request) -> Response:
    return answer_to(UpgradeRequired("Connect to this path with a WebSocket."))


class _Conversation:
    """One connection: two tasks, one that listens and one that tells."""

    def __init__(self, websocket: WebSocket, context: Context, client: Client, sent: Sent) -> None:
        self._websocket = websocket
        self._context = context
        self._client = client
        self._sent = sent

    async def run(self) -> None:
        """Until the client has gone or the server ends."""
        telling = asyncio.create_task(self._tell())
        listening = asyncio.create_task(self._listen())
        try:
            done, _ = await asyncio.wait({telling, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel(telling, listening)
        for task in done:
            if (code := task.result()) is not None:
                await self._websocket.close(code)

    async def _tell(self) -> int:
        while True:
            batch = await self._client.next()
            for text in batch.texts:
                await self._websocket.send_text(text)
            self._sent(len(batch.messages))
            if batch.is_last:
                return GOING_AWAY

    async def _listen(self) -> int | None:
        allowance = _Allowance()
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                return None
            if not allowance.take():
                return POLICY_VIOLATION
            await self._client.tell(self._answer(message))

    def _answer(self, message: Mapping[str, Any]) -> msgspec.Struct:
        """Do what is asked for, and say what came of it."""
        try:
            asked = _decode(message.get("text") or message.get("bytes") or b"")
            pairs = named(self._context.names, asked.exchanges or (), asked.symbols or ())
        except msgspec.MsgspecError as error:
            return Refused("malformed_message", f"This cannot be understood: {error}.")
        except Problem as problem:
            return Refused(problem.code, str(problem))
        chosen = self._client.selection.chosen
        chosen = chosen | pairs if asked.op == "subscribe" else chosen - pairs
        selection = self._context.hub.selection(chosen)
        self._client.select(selection)
        return Subscribed(list(selection.symbols), list(selection.exchanges), list(selection.pairs))


class _Allowance:
    """How many messages a client may send at this moment."""

    def __init__(self) -> None:
        self._left = float(MESSAGES_AT_ONCE)
        self._at = time.monotonic()

    def take(self) -> bool:
        """Whether one more may come."""
        now = time.monotonic()
        self._left = min(float(MESSAGES_AT_ONCE), self._left + (now - self._at) * MESSAGES_A_SECOND)
        self._at = now
        self._left -= 1
        return self._left >= 0


_decode = msgspec.json.Decoder(Order).decode
