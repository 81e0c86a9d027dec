"""`marketflow exchange --venue`: the generator behind a venue's own protocol, WebSocket and REST on one port."""

import asyncio
import random
import signal
from collections.abc import Sequence
from http import HTTPStatus

import msgspec
from loguru import logger
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from marketflow.clock import milliseconds, system_clock
from marketflow.errors import StartError
from marketflow.feeds.generator import Market
from marketflow.feeds.simulated.dialects import DIALECTS, parsed
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Side, Trade
from marketflow.tasks import cancel

HEARTBEAT_SECONDS = 1.0


def run(venue: str, host: str, port: int, symbols: Sequence[str], rate: float, seed: int | None) -> int:
    """Serve a venue's protocol until SIGINT or SIGTERM.

    Args:
        venue: its name.
        host: address to listen on.
        port: port to listen on; 0 takes any free one and logs which.
        symbols: ours, of which all are traded.
        rate: trades a second over all symbols.
        seed: None for another walk each time.

    Raises:
        StartError: the port cannot be bound.
    """
    return asyncio.run(_until_signal(SimulatedVenue(venue, symbols, rate, seed), host, port))


async def _until_signal(simulated: "SimulatedVenue", host: str, port: int) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    try:
        server = await simulated.start(host, port)
    except OSError as error:
        raise StartError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    place = next(iter(server.sockets)).getsockname()[:2]
    logger.bind(exchange=simulated.name).info("simulated venue listens on ws://{}:{}, REST on the same port", *place)
    await stopped.wait()
    await simulated.stop()
    return 0


class SimulatedVenue:
    """A market behind a venue's protocol; every subscriber of a symbol gets the same trades.

    Args:
        venue: its name.
        symbols, rate, seed: of the market.
    """

    def __init__(self, venue: str, symbols: Sequence[str], rate: float, seed: int | None) -> None:
        self.name = venue
        self._dialect = DIALECTS[venue]
        self._path = VENUES[venue].instruments_path.partition("?")[0]
        self._symbols = symbols
        self._market = Market(symbols, rate, seed)
        self._random = random.Random(seed)  # noqa: S311 - quantities are no secrets
        self._subscribers: dict[str, set[ServerConnection]] = {self._dialect.native(each): set() for each in symbols}
        self._newest = dict.fromkeys(self._subscribers, 0)
        self._tasks: list[asyncio.Task[None]] = []
        self._server: Server | None = None

    async def start(self, host: str, port: int) -> Server:
        """Listen, and begin to trade."""
        self._server = await serve(self._welcome, host, port, process_request=self._rest, compression=None)
        self._tasks = [asyncio.create_task(self._trade()), asyncio.create_task(self._beat())]
        return self._server

    async def stop(self) -> None:
        """Close all connections."""
        for task in self._tasks:
            await cancel(task)
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    def _rest(self, connection: ServerConnection, request: Request) -> Response | None:
        if "upgrade" in request.headers.get("Connection", "").lower():
            return None
        if request.path.partition("?")[0] != self._path:
            return connection.respond(HTTPStatus.NOT_FOUND, "no such path\n")
        body = msgspec.json.encode(self._dialect.instruments(self._symbols))
        headers = Headers({"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"})
        return Response(HTTPStatus.OK, "OK", headers, body)

    async def _welcome(self, connection: ServerConnection) -> None:
        try:
            if greeting := self._dialect.greeting():
                await connection.send(greeting)
            async for text in connection:
                await self._answer(connection, text if isinstance(text, str) else text.decode(errors="replace"))
        except ConnectionClosed:
            pass
        finally:
            for subscribers in self._subscribers.values():
                subscribers.discard(connection)

    async def _answer(self, connection: ServerConnection, text: str) -> None:
        message = parsed(text)
        if symbols := [each for each in self._dialect.requested(message) if each in self._subscribers]:
            for frame in self._dialect.acknowledgements(symbols, message):
                await connection.send(frame)
            for symbol in symbols:
                self._subscribers[symbol].add(connection)
        elif (pong := self._dialect.pong(text)) is not None:
            await connection.send(pong)

    async def _trade(self) -> None:
        while True:
            for line in self._market.due(milliseconds(system_clock())):
                symbol = self._dialect.native(line.symbol)
                self._newest[symbol] += 1
                quantity = round(self._random.expovariate(10), 6) + 0.000001
                side: Side = "buy" if self._random.random() < 0.5 else "sell"
                at = line.timestamp or milliseconds(system_clock())
                trade = Trade(symbol, line.price, quantity, at, self._newest[symbol], side)
                broadcast(self._subscribers[symbol], self._dialect.trade(trade))
            await asyncio.sleep(self._market.pause_seconds)

    async def _beat(self) -> None:
        while self._dialect.heartbeat:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            for symbol, subscribers in self._subscribers.items():
                broadcast(subscribers, self._dialect.beat(symbol, self._newest[symbol]))
