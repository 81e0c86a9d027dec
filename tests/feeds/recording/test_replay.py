"""A recorded hour replayed at high speed gives the same candles; at the recorded speed its times are now."""

import asyncio
import random
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from marketflow.clock import system_clock
from marketflow.errors import StartError
from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.feeds.backfill.venue_candles import candles_between
from marketflow.feeds.decoder import Decoder
from marketflow.feeds.recording import replay
from marketflow.feeds.recording.playback import Playback
from marketflow.feeds.recording.record_files import Header, NoRecord, RecordFile, line_of
from marketflow.feeds.recording.replay import RecordedLines, RecordedTrades
from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.simulated.simulated_venue import SimulatedVenue
from marketflow.feeds.simulator import LineExchange
from marketflow.feeds.tcp import TcpFeed
from marketflow.feeds.venues.limits import AttemptBudget
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.venue import Side, Trade, compact
from marketflow.feeds.venues.websocket_feed import VenueFeed
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, merge, rounded
from tests.support.servers import free_port, wait_until

SYMBOLS = ("BTCUSDT", "ETHUSDT")

RECORDED = 1_790_667_453_786
"""2026-09-29T07:37:33.786Z"""

HOUR_MS = 3_600_000

FAST = 1e6

DAY_MS = 86_400_000


class Values(NamedTuple):
    """What must not change of a candle."""

    open: float
    high: float
    low: float
    close: float
    volume: float
    ticks: int


def trades_of_an_hour(venue: str, count: int = 4_000) -> list[Trade]:
    """Trades of an hour of both symbols, in quick bursts and with a quiet time."""
    chance = random.Random(7)
    times = sorted(RECORDED + int(HOUR_MS * chance.random() ** 1.5) for _ in range(count))
    numbers = dict.fromkeys(SYMBOLS, DIALECTS[venue].ids_above + 1000) if venue else dict.fromkeys(SYMBOLS, 1000)
    trades = []
    for at in times:
        symbol = chance.choice(SYMBOLS)
        numbers[symbol] += 1
        name = DIALECTS[venue].native(symbol) if venue else symbol
        price, quantity = round(chance.uniform(2_900, 3_100), 2), round(chance.uniform(1e-5, 2), 5)
        side: Side = "buy" if chance.random() < 0.5 else "sell"
        trades.append(Trade(name, price, quantity, at, numbers[symbol], side))
    return trades


def record(folder: Path, venue: str, trades: Sequence[Trade]) -> list[Path]:
    """Two files of an hour as a feed has received it: with answers, heartbeats, doubles and garbage between."""
    half = len(trades) // 2
    paths = []
    for part in (trades[half:], trades[:half]):  # given in any order
        began = part[0].at * 1_000_000
        file = RecordFile(folder, Header(exchange=venue or "exchange1", venue=venue, place="there", began=began))
        lines = [line_of(began, b"\x00 garbage \xff"), line_of(began, b'{"unknown":1}')]
        if venue in ("coinbase", "kraken"):
            lines.append(line_of(began, DIALECTS[venue].beat(part[0].symbol, 5).encode()))
        for trade in part:
            received = trade.at * 1_000_000 + 30_000_000
            frame = DIALECTS[venue].trade(trade) if venue else _line(trade)
            lines += [line_of(received, frame.encode())] * (2 if venue and trade.id and trade.id % 50 == 0 else 1)
        file.write(lines)
        file.close()
        paths.append(file.path)
    return paths


def _line(trade: Trade) -> str:
    line = {"symbol": trade.symbol, "price": trade.price, "timestamp": trade.at, "quantity": trade.quantity}
    return compact(line | {"side": trade.side})


def expected(trades: Sequence[Trade]) -> dict[tuple[str, int], Values]:
    """By symbol and minute, counted from the first."""
    candles: dict[tuple[str, int], Values] = {}
    for trade in trades:
        key = "".join(each for each in trade.symbol if each.isalnum()), _minutes(trade.at, RECORDED)
        was = candles.get(key, Values(trade.price, trade.price, trade.price, trade.price, 0.0, 0))
        high, low = max(was.high, trade.price), min(was.low, trade.price)
        candles[key] = Values(was.open, high, low, trade.price, was.volume + trade.quantity, was.ticks + 1)
    return {key: values._replace(volume=rounded(values.volume)) for key, values in candles.items()}


def _minutes(at: int, since: int) -> int:
    return at // MINUTE_MS - since // MINUTE_MS


class Received:
    """What a feed makes of a replay."""

    def __init__(self) -> None:
        self.candles: dict[tuple[str, int], Candle] = {}
        self.ticks = 0

    def add(self, batch: Candles) -> None:
        for slot, candle in batch.items():
            key = slot.series.symbol, slot.start // MINUTE_MS
            self.candles[key] = merge(self.candles[key], candle) if key in self.candles else candle
            self.ticks += candle.ticks

    def values(self) -> dict[tuple[str, int], Values]:
        first = min(minute for _, minute in self.candles)
        return {
            (symbol, minute - first): Values(
                *(each.open, each.high, each.low, each.close, rounded(each.amounts.volume) if each.amounts else -1.0),
                each.ticks,
            )
            for (symbol, minute), each in self.candles.items()
        }


@contextmanager
def on_a_thread(server: SimulatedVenue | LineExchange) -> Iterator[str]:
    """Run a server on a loop of its own; yields its address."""
    loop, port = asyncio.new_event_loop(), free_port()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(call: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(call, loop).result(10)

    run(server.start("127.0.0.1", port))
    try:
        yield f"127.0.0.1:{port}"
    finally:
        run(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def replayed(playback: Playback) -> AbstractContextManager[str]:
    """Serve a record as its venue."""
    return on_a_thread(SimulatedVenue(playback.venue, RecordedTrades(playback, settle_seconds=0.2)))


def venue_feed(venue: str, address: str, skew_ms: int = DAY_MS) -> VenueFeed:
    decoder = Decoder(Mode.LIVE, venue, SYMBOLS, system_clock, skew_ms, lambda *_: None)
    rest = RestClient(VENUES[venue], f"http://{address}")
    budget = AttemptBudget(10, 60.0, time.monotonic)
    return VenueFeed(venue, VENUES[venue], SYMBOLS, {}, decoder, 60.0, budget, f"ws://{address}", rest)


@pytest.mark.long
@pytest.mark.parametrize("venue", VENUES)
def test_recorded_hour_gives_the_same_candles(venue: str, tmp_path: Path) -> None:
    trades = trades_of_an_hour(venue)
    playback = Playback(record(tmp_path, venue, trades), FAST)
    received = Received()
    with replayed(playback) as address:
        feed = venue_feed(venue, address)
        with feed.batches().subscribe(received.add, lambda error: None):
            wait_until(lambda: received.ticks == len(trades), 20.0)
        assert received.values() == expected(trades)
        assert feed.doubles > 0
        assert feed.decoder.rejected["malformed"] >= 2
        moved = min(minute for _, minute in received.candles) * MINUTE_MS
        minute_of_rest = moved + 5 * MINUTE_MS
        client = RestClient(VENUES[venue], f"http://{address}", clock=playback.now)
        (symbol,) = [each for each in client.instruments() if each.base == "BTC"]
        name = symbol.rest_symbol or symbol.symbol
        candles = candles_between(client, name, minute_of_rest, minute_of_rest + MINUTE_MS, client.now_ms)
        values, own = candles[minute_of_rest].values, expected(trades)["BTCUSDT", 5]
        assert (values.close, rounded(values.volume or 0.0)) == (own.close, own.volume)
        client.close()


def test_recorded_lines_give_the_same_candles(tmp_path: Path) -> None:
    trades = trades_of_an_hour("")
    playback = Playback(record(tmp_path, "", trades), FAST)
    received = Received()
    decoder = Decoder(Mode.LIVE, "exchange1", SYMBOLS, system_clock, DAY_MS, lambda *_: None)
    with on_a_thread(LineExchange("exchange1", RecordedLines(playback, settle_seconds=0.2).run)) as address:
        feed = TcpFeed("exchange1", "127.0.0.1", int(address.partition(":")[2]), decoder, 60.0)
        with feed.batches().subscribe(received.add, lambda error: None):
            wait_until(lambda: received.ticks == len(trades), 20.0)
    assert received.values() == expected(trades)


@pytest.mark.long
def test_replay_at_the_recorded_speed_is_now(tmp_path: Path) -> None:
    """The recorded second of the minute is the present one, so trades are dated now and nothing is dropped."""
    begin = (system_clock() // 1_000_000 + 3_000) % MINUTE_MS + RECORDED // MINUTE_MS * MINUTE_MS
    dialect = DIALECTS["binance"]
    trades = [
        Trade("BTCUSDT" if number % 2 else "ETHUSDT", 3000.0, 0.5, begin + number * 100, number, "buy")
        for number in range(20)
    ]
    file = RecordFile(tmp_path, Header(exchange="binance", venue="binance", place="", began=begin * 1_000_000))
    file.write([line_of(trade.at * 1_000_000, dialect.trade(trade).encode()) for trade in trades])
    file.close()
    received = Received()
    with replayed(Playback([file.path], 1.0)) as address:
        feed = venue_feed("binance", address, skew_ms=1_000)
        began = time.monotonic()
        with feed.batches().subscribe(received.add, lambda error: None):
            wait_until(lambda: received.ticks == len(trades), 80.0)  # a late start waits for the next minute
        assert time.monotonic() - began >= 1.9
        assert not feed.decoder.rejected


def test_playback_waits_for_the_second_of_the_minute(tmp_path: Path) -> None:
    (path, _) = record(tmp_path, "okx", trades_of_an_hour("okx", 10))
    first_at = Playback([path], 1.0).first_at
    now = first_at + 90_000_000_000 * 1000 + 20_000_000_000
    assert Playback([path], 1.0, lambda: now).pause_seconds == pytest.approx(40.0)
    assert Playback([path], 2.0, lambda: now).pause_seconds == 0
    late = first_at + 60_000_000_000 * 1000 + 100_000_000
    assert Playback([path], 1.0, lambda: late).pause_seconds == 0


def test_files_of_several_venues_are_refused(tmp_path: Path) -> None:
    paths = [record(tmp_path, venue, trades_of_an_hour(venue, 10))[0] for venue in ("okx", "kraken")]
    with pytest.raises(NoRecord, match="several venues: okx and kraken"):
        Playback(paths, 1.0)


def test_file_without_frames_is_refused(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, Header(exchange="okx", venue="okx", place="", began=1))
    file.close()
    with pytest.raises(NoRecord, match="there are no frames"):
        Playback([file.path], 1.0)


def test_unknown_venue_in_a_record_ends_the_start(tmp_path: Path) -> None:
    file = RecordFile(tmp_path, Header(exchange="a", venue="mtgox", place="", began=1))
    file.write([line_of(1, b"{}")])
    file.close()
    with pytest.raises(StartError, match="there is no venue 'mtgox'"):
        replay.serve([file.path], 1.0, "127.0.0.1", 0)
