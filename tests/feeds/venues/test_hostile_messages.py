"""What venues have sent elsewhere that is no trade of now: numbers, times, names and messages of every kind."""

import itertools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest
from reactivex.scheduler import ImmediateScheduler

from marketflow.clock import system_clock
from marketflow.feeds.decoder import TradeLine
from marketflow.feeds.factory import FeedFactory
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import Candle, Candles, Mode, minute_start
from marketflow.settings import ExchangeSettings, Settings
from tests.support.servers import wait_until
from tests.support.venue_server import VenueServer

SYMBOLS = ("BTCUSDT", "ETHUSDT")


class Connected:
    """A feed as the settings make it, on a scripted server."""

    def __init__(self, server: VenueServer, venue: str) -> None:
        self.server = server
        exchange = ExchangeSettings(name=venue, venue=venue, url=server.url, rest_url=server.rest_url)  # type: ignore[arg-type]
        settings = Settings(symbols=SYMBOLS, exchanges=(exchange,))
        (feed,) = FeedFactory(system_clock, ImmediateScheduler()).feeds(settings)[Mode.LIVE]
        assert isinstance(feed, VenueFeed)
        self.feed = feed
        self.batches: list[Candles] = []
        self.errors: list[Exception] = []

    @property
    def candles(self) -> list[Candle]:
        return [candle for batch in self.batches for candle in batch.values()]

    @property
    def ticks(self) -> int:
        return sum(candle.ticks for candle in self.candles)

    def send(self, *frames: str | bytes, ticks: int) -> None:
        """Send frames, and wait until this number of trades has counted in all."""
        self.server.send(*frames)
        wait_until(lambda: self.ticks >= ticks)
        assert self.ticks == ticks


@contextmanager
def connected(venue: str, clock_ahead_ms: int = 0) -> Iterator[Connected]:
    with VenueServer(venue, SYMBOLS) as server:
        made = Connected(server, venue)
        with made.feed.batches().subscribe(made.batches.append, made.errors.append):
            wait_until(server.has_subscriber)
            yield made
            assert not made.errors
            assert server.handshakes == 1


def frame(server: VenueServer, number: int, price: str = '"7123.25"', **more: int | float) -> str:
    """The frame of a trade, with a price as it is written."""
    text = server.dialect.trade(server.make(number, price=7_123.25, **more))  # type: ignore[arg-type]
    return with_price(text, "7123.25", price)


def with_price(text: str, old: str, new: str) -> str:
    """A frame in which another price is written, a string or a number."""
    found, count = re.subn(rf'"?{re.escape(old)}0*"?', lambda match: new, text)
    assert count == 1
    return found


GOOD = {
    '"9.669E-05"': 9.669e-05,
    '"6.37E-8"': 6.37e-8,
    "1.8E-4": 1.8e-4,
    '"1e-8"': 1e-8,
    "1E+3": 1000.0,
    '"0.00000001"': 1e-8,
    "0.00000638": 0.00000638,
}

BAD = ['"-0"', '"NaN"', '"Infinity"', "NaN", "1e400", '""', "null", "0", "[]", "true", '"1,5"']


@pytest.mark.parametrize("venue", VENUES)
def test_numbers_of_every_spelling_are_exact_or_rejected(venue: str) -> None:
    with connected(venue) as made:
        number = itertools.count(1)
        for count, (text, value) in enumerate(GOOD.items(), 1):
            made.send(frame(made.server, next(number), text), ticks=count)
            assert made.candles[-1].close == value
        made.server.send(*(frame(made.server, next(number), text) for text in BAD))
        made.send(frame(made.server, next(number)), ticks=len(GOOD) + 1)
        assert made.feed.decoder.rejected.total() == len(BAD)
        assert {*made.feed.decoder.rejected} <= {"malformed", "bad_price"}


@pytest.mark.parametrize("venue", ["kraken", "okx", "bybit"])
def test_bad_trade_of_an_array_costs_no_other(venue: str) -> None:
    with connected(venue) as made:
        rows = [made.server.make(number, price=7_123.25 + number) for number in range(1, 6)]
        frames = made.server.dialect.trades(rows)
        if venue == "okx":
            parts = [each.partition('"data":[') for each in frames]
            frames = [parts[0][0] + '"data":[' + ",".join(each[2][:-2] for each in parts) + "]}"]
        (text,) = frames
        made.send(with_price(text, "7126.25", "null"), ticks=4)
        assert made.feed.decoder.rejected == {"malformed": 1}


@pytest.mark.parametrize("venue", ["binance", "okx", "bybit"])
@pytest.mark.parametrize("unit", ["us", "ns", "s", "zero", "negative"])
def test_time_in_another_unit_is_an_error_of_the_feed(venue: str, unit: str, log: list[str]) -> None:
    with connected(venue) as made:
        now = time.time_ns() // 1_000_000
        at = {"us": now * 1_000, "ns": now * 1_000_000, "s": now // 1_000, "zero": 0, "negative": -now}[unit]
        made.server.send(*(frame(made.server, number, at=at) for number in range(1, 31)))
        made.send(frame(made.server, 31), ticks=1)
        assert made.feed.decoder.rejected == {"bad_time": 30}
        assert any("dropped as bad_time" in line and str(at) in line and venue in line for line in log)


@pytest.mark.parametrize("venue", VENUES)
def test_time_of_the_year_2100_is_no_trade(venue: str, log: list[str]) -> None:
    with connected(venue) as made:
        made.server.send(*(frame(made.server, number, at=4_102_444_800_000) for number in range(1, 11)))
        made.send(frame(made.server, 11), ticks=1)
        assert made.feed.decoder.rejected == {"ahead": 10}
        assert any("dropped as ahead" in line and venue in line for line in log)


def test_bad_messages_of_coinbase_cost_themselves_alone() -> None:
    with connected("coinbase") as made:
        match = frame(made.server, 1)
        without_time = match.partition(',"time"')[0] + "}"
        made.server.send(
            '{"type":"ticker","product_id":"HBAR-USD","price":"0"}',
            without_time,
            '{"type":"news","text":"hello"}',
            '{"type":"subscriptions","channels":[]}',
            "[]",
            "42",
            match[:40],
            b"\xff\xfe" + match.encode(),
            "x" * 2 * 2**20,
        )
        made.send(match, ticks=1)
        assert made.feed.decoder.rejected == {"malformed": 5, "unknown_message": 1, "too_long": 1}


@pytest.mark.parametrize("venue", ["kraken", "okx", "bybit"])
def test_array_without_trades_is_no_error(venue: str) -> None:
    with connected(venue) as made:
        text = frame(made.server, 1)
        head, _, _ = text.partition('"data":[')
        made.server.send(head + '"data":[]}')
        made.send(text, ticks=1)
        assert made.feed.decoder.rejected.total() == 0


def test_ticker_beside_matches_is_not_counted() -> None:
    ticker = (
        '{"type":"ticker","sequence":1,"product_id":"BTC-USDT","price":"7123.25","open_24h":"1","volume_24h":"2",'
        '"best_bid":"1","best_ask":"2","side":"buy","time":"2026-09-02T07:44:10.104422Z","trade_id":%d,"last_size":"5"}'
    )
    with connected("coinbase") as made:
        for number in range(1, 4):
            made.send(ticker % number, frame(made.server, number), ticker % number, ticker % (number + 1), ticks=number)
        assert sum(candle.amounts.volume for candle in made.candles if candle.amounts) == pytest.approx(3 * 0.25)
        assert made.feed.doubles == made.feed.decoder.rejected.total() == 0


@pytest.mark.parametrize("venue", ["kraken", "bybit"])
def test_array_with_the_newest_first_opens_with_the_lowest_id(venue: str) -> None:
    with connected(venue) as made:
        at = time.time_ns() // 1_000_000
        prices = {2: 20.0625, 1: 10.0625}  # which no time in the text looks like
        trades = [made.server.make(number, price=price, at=at) for number, price in prices.items()]
        (text,) = made.server.dialect.trades(trades)
        assert text.index("20.0625") < text.index("10.0625")
        made.send(text, ticks=2)
        (candle,) = made.candles
        assert (candle.open, candle.close) == (10.0625, 20.0625)


@pytest.mark.parametrize("ago_ms", [26_000, 3 * 3_600_000])
def test_old_first_trade_of_okx_is_never_dated_as_now(ago_ms: int) -> None:
    with connected("okx") as made:
        at = time.time_ns() // 1_000_000
        made.feed.ids.count_after(dict.fromkeys(SYMBOLS, minute_start(at) - 1))
        made.server.send(frame(made.server, 1, at=at - ago_ms), frame(made.server, 2, at=at - ago_ms + 1))
        wait_until(lambda: made.feed.doubles + made.feed.decoder.rejected.total() == 2)
        made.send(frame(made.server, 3), ticks=1)
        assert all(candle.first_at >= at for candle in made.candles)


@pytest.mark.long
def test_ids_and_unknown_messages_take_no_memory() -> None:
    """10,000,000 ids of 500 symbols with gaps and doubles, then 200 kinds of unknown messages."""
    ids = TradeIds(reports_missing=False)
    trades = [TradeLine("", 1.0, 1, 1.0, "buy", 0) for _ in range(1_000)]

    process = psutil.Process()
    first = 1
    for part in range(20):
        for number, trade in enumerate(trades, first):
            trade.id = number
        for symbol in range(500):
            ids.new_of(str(symbol), trades)
        first += {5: 1_010, 15: 990}.get(part, 1_000)  # a gap, then doubles
        if part == 9:
            before = process.memory_info().rss
    assert process.memory_info().rss - before < 8 * 2**20
    assert ids.doubles == 500 * 10
    with connected("kraken") as made:
        made.server.send(*(f'{{"channel":"kind{number}","data":[]}}' for number in range(200)))
        made.send(frame(made.server, 1), ticks=1)
        assert made.feed.decoder.rejected == {"unknown_message": 200}
