"""A simulated venue on a real socket: what it streams is what it answers by REST."""

import asyncio
from collections.abc import Callable

import httpx
import msgspec
import pytest
from websockets.asyncio.client import connect

from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.simulated.simulated_venue import MarketSource, SimulatedVenue
from marketflow.feeds.simulated.trade_book import TradeBook
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Acknowledged, Trade
from marketflow.model import MINUTE_MS, minute_start

SYMBOLS = ("BTCUSDT", "ETHUSDT")

_IDS: dict[str, tuple[str, Callable[[bytes], list[int]]]] = {
    "binance": ("/api/v3/trades?symbol={}&limit=1000", lambda body: [row["id"] for row in msgspec.json.decode(body)]),
    "coinbase": ("/products/{}/trades", lambda body: [row["trade_id"] for row in msgspec.json.decode(body)]),
    "kraken": (
        "/0/public/Trades?pair=XBTUSDT",
        lambda body: [row[6] for row in msgspec.json.decode(body)["result"]["XBTUSDT"]],
    ),
    "okx": (
        "/api/v5/market/trades?instId={}&limit=500",
        lambda body: [int(row["tradeId"]) for row in msgspec.json.decode(body)["data"]],
    ),
    "bybit": (
        "/v5/market/recent-trade?category=spot&symbol={}",
        lambda body: [int(row["execId"]) for row in msgspec.json.decode(body)["result"]["list"]],
    ),
}


async def received(venue: str, port: int, enough: int) -> list[Trade]:
    """The trades of BTCUSDT that a client gets after subscribing, until there are enough of them."""
    symbol = DIALECTS[venue].native("BTCUSDT")
    trades: list[Trade] = []
    async with connect(f"ws://127.0.0.1:{port}", compression=None) as client:
        for frame in VENUES[venue].subscribe([symbol]):
            await client.send(frame)
        while len(trades) < enough:
            events = VENUES[venue].decode(await client.recv(decode=False))
            trades += [event for event in events if isinstance(event, Trade)]
    return trades


@pytest.mark.parametrize("venue", VENUES)
def test_streamed_trades_are_those_of_rest(venue: str) -> None:
    async def run() -> None:
        simulated = SimulatedVenue(venue, MarketSource(DIALECTS[venue], SYMBOLS, 100.0, 7))
        server = await simulated.start("127.0.0.1", 0)
        port = next(iter(server.sockets)).getsockname()[1]
        try:
            trades = await received(venue, port, 20)
            ids = sorted({(trade.id or 0) - number for trade in trades for number in range(trade.count)})
            assert ids == [*range(ids[0], ids[-1] + 1)]
            path, read = _IDS[venue]
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                answer = await client.get(path.format(DIALECTS[venue].native("BTCUSDT")))
            assert answer.status_code == 200
            assert set(ids[-10:]) <= set(read(answer.content))
        finally:
            await simulated.stop()

    asyncio.run(run())


class SilentMarket(MarketSource):
    """A market that trades nothing by itself after its start."""

    async def run(self, venue: SimulatedVenue) -> None:
        """Publish nothing."""


@pytest.mark.parametrize(
    ("venue", "repeated"), [("coinbase", True), ("okx", True), ("binance", False), ("kraken", False)]
)
def test_last_trade_is_repeated_where_the_venue_does_so(venue: str, repeated: bool) -> None:
    """No trade comes between: the next one is published once the subscription is acknowledged."""
    symbol = DIALECTS[venue].native("BTCUSDT")

    async def first_trade(simulated: SimulatedVenue, port: int, following: Trade) -> Trade:
        events: list[object] = []
        async with connect(f"ws://127.0.0.1:{port}", compression=None) as client:

            async def until(wanted: type[object]) -> None:
                while not any(isinstance(event, wanted) for event in events):
                    events.extend(VENUES[venue].decode(await client.recv(decode=False)))

            for frame in VENUES[venue].subscribe([symbol]):
                await client.send(frame)
            await until(Acknowledged)
            simulated.publish([following])
            await until(Trade)
        return next(event for event in events if isinstance(event, Trade))

    async def run() -> None:
        simulated = SimulatedVenue(venue, SilentMarket(DIALECTS[venue], SYMBOLS, 100.0, 7))
        server = await simulated.start("127.0.0.1", 0)
        port = next(iter(server.sockets)).getsockname()[1]
        try:
            book = simulated.book.of(symbol)
            assert book is not None
            assert book.newest is not None
            newest = book.newest.id or 0
            first = await first_trade(simulated, port, msgspec.structs.replace(book.newest, id=newest + 1))
            assert first.id == (newest if repeated else newest + 1)
        finally:
            await simulated.stop()

    asyncio.run(run())


def test_unknown_symbol_is_refused_as_the_venue_does() -> None:
    refusals = {
        venue: [
            VENUES[venue].decode(frame.encode())[0]
            for request in VENUES[venue].subscribe([dialect.native("NOPEUSDT")])
            for frame in dialect.respond(msgspec.json.decode(request), {dialect.native("BTCUSDT")}).frames
        ]
        for venue, dialect in DIALECTS.items()
    }
    assert {venue: type(events[0]).__name__ for venue, events in refusals.items()} == {
        "binance": "Acknowledged",
        **dict.fromkeys(("coinbase", "kraken", "okx", "bybit"), "Refused"),
    }
    named = {venue: getattr(events[0], "symbol", None) for venue, events in refusals.items()}
    assert named == {
        "binance": None,
        "coinbase": "NOPE-USDT",
        "kraken": "NOPE/USDT",
        "okx": "NOPE-USDT",
        "bybit": "NOPEUSDT",
    }


@pytest.mark.parametrize("venue", DIALECTS)
def test_first_minute_has_older_trades(venue: str) -> None:
    source = MarketSource(DIALECTS[venue], SYMBOLS, 20.0, 7)
    book = source.book()
    for listed in source.listed:
        trades = book.of(listed.native)
        assert trades is not None
        oldest = trades.since_id(0, 1)[0].at
        began = minute_start(oldest)
        assert oldest - began < 1000
        minutes = trades.minutes(began - MINUTE_MS, began + 5 * MINUTE_MS)
        assert [minute.start - began for minute in minutes] == [number * MINUTE_MS for number in range(-1, 5)]
        assert sum(minute.count for minute in minutes[1:]) == pytest.approx(5 * 60 * 20 / 2, rel=0.05)
        assert abs(minutes[0].close / minutes[1].open - 1) < 0.01


def test_kraken_snapshot_holds_the_newest_trades() -> None:
    dialect = DIALECTS["kraken"]
    book = TradeBook(["BTC/USDT"])
    for number in range(1, 61):
        book.add(Trade("BTC/USDT", 1.5, 0.1, 1_790_667_453_786, number, "buy"))
    trades = book.of("BTC/USDT")
    assert trades is not None
    asked = {"method": "subscribe", "params": {"channel": "trade", "symbol": ["BTC/USDT"], "snapshot": True}}
    (frame,) = dialect.after_answer(trades, asked)
    events = VENUES["kraken"].decode(frame.encode())
    assert [event.id for event in events if isinstance(event, Trade)] == [*range(11, 61)]
    assert dialect.after_answer(trades, {"params": {"snapshot": False}}) == []


def test_okx_reports_an_order_once_with_its_count() -> None:
    trades = [Trade("BTC-USDT", 1.5, 0.1, 5, number, "buy") for number in (1, 2, 3)]
    frames = DIALECTS["okx"].trades([*trades, Trade("BTC-USDT", 1.6, 0.1, 5, 4, "buy")])
    first, second = (VENUES["okx"].decode(frame.encode())[0] for frame in frames)
    assert first == Trade("BTC-USDT", 1.5, 0.3, 5, 3, "buy", 3)
    assert second == Trade("BTC-USDT", 1.6, 0.1, 5, 4, "buy")
