"""Timestamps of a protocol that says milliseconds: another magnitude is an error of the feed, not a date."""

import pytest

from marketflow.feeds.decoder import Decoder, TradeLine
from marketflow.model import MINUTE_MS, Candle, Candles, Mode, minute_start
from tests.feeds.test_decoder import NOW, NOW_MS, Rejected

YEAR_2100_MS = 4_102_444_800_000


def decoder() -> Decoder:
    return Decoder(Mode.LIVE, "binance", ["BTCUSDT"], lambda: NOW, 5000, Rejected(), milliseconds_only=True)


@pytest.mark.parametrize(
    ("timestamp", "reason"),
    [
        (NOW_MS * 1000, "bad_time"),
        (NOW, "bad_time"),
        (NOW_MS // 1000, "bad_time"),
        (0, "bad_time"),
        (-NOW_MS, "bad_time"),
        (YEAR_2100_MS, "ahead"),
        (NOW_MS - 60_000, "stale"),
    ],
)
def test_time_of_another_magnitude_is_rejected_however_often(timestamp: int, reason: str) -> None:
    feed = decoder()
    for _ in range(100):
        assert feed.fold([TradeLine("BTCUSDT", 10.0, timestamp, 1.0, "buy")]) == {}
    assert feed.rejected == {reason: 100}
    assert feed.fold([TradeLine("BTCUSDT", 10.0, NOW_MS, 1.0, "buy")])


class SkewedMachine:
    """This machine's clock is ahead of the venue's, whose trades arrive after 50 ms."""

    def __init__(self, ahead_ms: int) -> None:
        self.now_ms = minute_start(NOW_MS) + MINUTE_MS - 10_000
        self.said: list[str] = []
        self.candles: Candles = {}
        self.decoder = Decoder(
            Mode.LIVE,
            "binance",
            ["BTCUSDT"],
            lambda: (self.now_ms + ahead_ms) * 1_000_000,
            5000,
            Rejected(),
            self.said.append,
            milliseconds_only=True,
        )

    def trade(self, at: int) -> Candle | None:
        """A trade at a time of the venue's clock, when that is reached; the candle in which it counts."""
        self.now_ms = max(self.now_ms, at + 50)
        candles = self.decoder.fold([TradeLine("BTCUSDT", 10.0, at, 1.0, "buy")])
        assert all(minute_start(slot.start) == minute_start(at) for slot in candles)
        return next(iter(candles.values()), None)

    def trade_for(self, seconds: float, from_ms: int) -> None:
        """Ten trades a second."""
        for number in range(round(10 * seconds)):
            self.trade(from_ms + number * 100)


@pytest.mark.parametrize("ahead_ms", [40_000, -40_000])
def test_clock_40_s_off_leaves_trades_in_their_minutes(ahead_ms: int) -> None:
    machine = SkewedMachine(ahead_ms)
    end = minute_start(machine.now_ms) + MINUTE_MS
    machine.trade_for(5, machine.now_ms)
    assert machine.decoder.rejected.total() < 30  # until the clock is known to be off; they are fetched
    last, first = machine.trade(end - 1), machine.trade(end)
    assert last is not None
    assert first is not None
    assert (last.last_at, first.first_at) == (end - 1, end)
    assert machine.decoder.timestamps_replaced == 0
    side = "behind" if ahead_ms > 0 else "ahead of"
    assert machine.said == [f"the clock of the exchange is 40.0 s {side} this machine's, its ticks are dated by it"]


@pytest.mark.parametrize("ahead_ms", [5_000, -3_000, -5_000, -8_000])
def test_clock_5_s_off_keeps_the_times_of_trades(ahead_ms: int) -> None:
    machine = SkewedMachine(ahead_ms)
    machine.trade_for(5, machine.now_ms)
    counted = machine.decoder.ticks
    machine.trade_for(3, machine.now_ms)
    assert machine.decoder.ticks == counted + 30
    at = machine.now_ms + 100
    candle = machine.trade(at)
    assert candle is not None
    assert candle.last_at == at
    assert machine.decoder.timestamps_replaced == 0
