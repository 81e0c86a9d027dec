"""`marketflow exchange --venue`: a venue's own protocol, WebSocket and REST on one port.

What is traded comes from a source: the generator (`MarketSource`), or a recording.
"""

import asyncio
import signal
from collections.abc import Sequence
from typing import Protocol

from loguru import logger
from websockets.asyncio.server import Server, ServerConnection, broadcast, serve
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

from marketflow.clock import milliseconds, system_clock
from marketflow.errors import StartError
from marketflow.feeds.simulated.dialects import DIALECTS, Dialect, parsed
from marketflow.feeds.simulated.listings import Listed
from marketflow.feeds.simulated.rest_registry import RESTS
from marketflow.feeds.simulated.simulated_market import MarketTrades, PriceHistory
from marketflow.feeds.simulated.trade_book import KEPT_MINUTES, TradeBook, minute_of
from marketflow.feeds.venues.venue import Trade
from marketflow.model import MINUTE_MS
from marketflow.tasks import cancel

HEARTBEAT_SECONDS = 1.0

MAX_UNSENT_BYTES = 4 << 20
"""A subscriber that does not read is cut off when so much is buffered for it, as venues do."""

MINUTES_BEFORE = 5
MOST_TRADES_BEFORE = 100_000
"""There are trades of the minutes before the start, as at every venue, up to this number."""

BACKLOG_BYTES = 1 << 20
DRAIN_SECONDS = 10.0


class TradeSource(Protocol):
    """Where the trades of a simulated venue come from."""

    @property
    def listed(self) -> Sequence[Listed]:
        """What is traded."""
        ...

    def book(self) -> TradeBook:
        """What is known before the first trade."""
        ...

    async def run(self, venue: "SimulatedVenue") -> None:
        """Publish trades on the venue when they are due."""
        ...

    def now(self) -> int:
        """The venue's clock, in Unix ns."""
        ...


class MarketSource:
    """The generator's trades, after a day of candles.

    Args:
        dialect: the venue's names.
        symbols: ours, of which all are traded.
        rate: trades a second over all symbols.
        seed: None for another walk each time.
    """

    def __init__(self, dialect: Dialect, symbols: Sequence[str], rate: float, seed: int | None) -> None:
        self.listed = [dialect.listed(symbol) for symbol in symbols]
        now = milliseconds(system_clock())
        minutes = min(MINUTES_BEFORE, int(MOST_TRADES_BEFORE / (60 * rate)))
        before_ms = minutes * MINUTE_MS + now % MINUTE_MS if minutes else 0
        self._trades = MarketTrades(self.listed, rate, seed, now, before_ms, dialect.ids_above)
        traded_from = minute_of(now) - minutes * MINUTE_MS
        self._began = minute_of(now) - KEPT_MINUTES * MINUTE_MS
        per_minute = 60 * rate / len(symbols)
        self._history = PriceHistory(self.listed, seed, traded_from, traded_from - self._began, per_minute)

    def book(self) -> TradeBook:
        """The candles of the day before, and the trades of the last minutes."""
        book = TradeBook((each.native for each in self.listed), self._history.minute, self._began)
        for trade in self._trades.earlier:
            book.add(trade)
        return book

    def now(self) -> int:
        """The clock of this machine."""
        return system_clock()

    async def run(self, venue: "SimulatedVenue") -> None:
        """Trade for ever."""
        while True:
            by_symbol: dict[str, list[Trade]] = {}
            for trade in self._trades.due(milliseconds(self.now())):
                by_symbol.setdefault(trade.symbol, []).append(trade)
            for trades in by_symbol.values():
                venue.publish(trades)
            await asyncio.sleep(self._trades.pause_seconds)


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
    return run_source(venue, host, port, MarketSource(DIALECTS[venue], symbols, rate, seed))


def run_source(venue: str, host: str, port: int, source: TradeSource) -> int:
    """Serve the trades of a source by a venue's protocol until SIGINT or SIGTERM.

    Raises:
        StartError: the port cannot be bound.
    """
    return asyncio.run(_until_signal(SimulatedVenue(venue, source), host, port))


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
    """A source of trades behind a venue's protocol; every subscriber of a symbol gets the same frames.

    Args:
        venue: its name.
        source: of the trades.
    """

    def __init__(self, venue: str, source: TradeSource) -> None:
        self.name = venue
        self._dialect = DIALECTS[venue]
        self._source = source
        self.book = source.book()
        self._rest_side = RESTS[venue](source.listed, self.book, source.now)
        self._subscribers: dict[str, set[ServerConnection]] = {each.native: set() for each in source.listed}
        self._subscribed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._server: Server | None = None

    async def start(self, host: str, port: int) -> Server:
        """Listen, and begin to trade."""
        self._server = await serve(self._welcome, host, port, process_request=self._rest, compression=None)
        self._tasks = [asyncio.create_task(self._source.run(self)), asyncio.create_task(self._beat())]
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
        return self._rest_side.answer(request.path).as_response()

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
        if (pong := self._dialect.pong(text)) is not None:
            await connection.send(pong)
            return
        message = parsed(text)
        symbols, frames = self._dialect.respond(message, self._subscribers)
        books = [book for symbol in symbols if (book := self.book.of(symbol)) is not None]
        before = [frame for book in books for frame in self._dialect.before_answer(book, message)]
        after = [frame for book in books for frame in self._dialect.after_answer(book, message)]
        for symbol in symbols:
            self._subscribers[symbol].add(connection)
            self._subscribed.set()
        for frame in before + frames + after:
            broadcast({connection}, frame)  # at once, so that no trade comes between

    def publish(self, trades: Sequence[Trade], frames: Sequence[str | bytes] | None = None) -> None:
        """Keep trades of one symbol, ascending by id, and send their frames, which are made if they are not given.

        Frames without trades go to all subscribers.
        """
        for trade in trades:
            self.book.add(trade)
        subscribers = self._subscribers[trades[0].symbol] if trades else self._all_subscribers()
        if subscribers:
            for frame in self._dialect.trades(trades) if frames is None else frames:
                broadcast(subscribers, frame)
            for slow in [each for each in subscribers if _unsent(each) > MAX_UNSENT_BYTES]:
                slow.transport.abort()

    async def first_subscription(self) -> None:
        """Wait until a client has subscribed to something."""
        await self._subscribed.wait()

    async def drained(self) -> None:
        """Wait until the subscribers have read most of what was sent; not for long."""
        until = asyncio.get_running_loop().time() + DRAIN_SECONDS
        while any(_unsent(each) > BACKLOG_BYTES for each in self._all_subscribers()):
            if asyncio.get_running_loop().time() > until:
                return
            await asyncio.sleep(0.005)

    def _all_subscribers(self) -> set[ServerConnection]:
        return set().union(*self._subscribers.values())

    async def _beat(self) -> None:
        while self._dialect.heartbeat:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            for symbol, subscribers in self._subscribers.items():
                book = self.book.of(symbol)
                newest = book.newest.id if book and book.newest else None
                broadcast(subscribers, self._dialect.beat(symbol, newest or 0))


def _unsent(connection: ServerConnection) -> int:
    return connection.transport.get_write_buffer_size()
