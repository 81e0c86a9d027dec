"""A batch of frames of Binance, decoded at once, is the same as its frames one by one."""

import random
import time

import pytest

from marketflow.feeds.decoder import Decoder
from marketflow.feeds.simulated.dialects import DIALECTS
from marketflow.feeds.venues.registry import VENUES
from marketflow.feeds.venues.trade_ids import TradeIds
from marketflow.feeds.venues.venue import Side, Trade
from marketflow.feeds.venues.websocket.data_silence import DataSilence
from marketflow.feeds.venues.websocket.subscriptions import Subscriptions
from marketflow.feeds.venues.websocket.trade_reader import TradeReader
from marketflow.model import Candles, Mode, merge_into

NOW_MS = 1_790_000_000_000
SYMBOLS = ("BTCUSDT", "ETHUSDT")


class Reading:
    """A reader, and what it made of its messages."""

    def __init__(self) -> None:
        self.decoder = Decoder(Mode.LIVE, "binance", SYMBOLS, lambda: NOW_MS * 1_000_000, 60_000, lambda *_: None)
        self.ids = TradeIds()
        self.candles: Candles = {}
        binance = VENUES["binance"]
        none = Subscriptions(binance, SYMBOLS, lambda: 0.0, lambda symbol, text: None, lambda symbol: None)
        silence = DataSilence(15.0, time.monotonic)
        names = {symbol: symbol for symbol in SYMBOLS}
        self._reader = TradeReader("binance", binance, self.decoder, self.ids, silence, self._take, names, none)

    def read(self, *batches: list[bytes]) -> "Reading":
        for batch in batches:
            self._reader.read(batch)
        return self

    def _take(self, candles: Candles) -> None:
        merge_into(self.candles, candles)

    def seen(self) -> object:
        """What must not depend on batches: all but the order of receipt."""
        candles = {
            slot: (each.open, each.high, each.low, each.close, each.ticks, each.total, each.amounts, each.last_at)
            for slot, each in self.candles.items()
        }
        return candles, dict(self.decoder.rejected), self.ids.doubles, self.decoder.ticks


def frame(number: int, symbol: str = "BTCUSDT", price: float = 100.0, at: int = NOW_MS, quantity: float = 0.5) -> bytes:
    side: Side = "buy" if number % 3 else "sell"
    return DIALECTS["binance"].trade(Trade(symbol, price, quantity, at, number, side)).encode()


def test_batch_has_the_trades_of_its_frames() -> None:
    frames = [frame(number, SYMBOLS[number % 2], 100.0 + number) for number in range(20)]
    columns = VENUES["binance"].trades(frames)
    assert columns is not None
    batched = [line for symbol, each in columns.items() for line in each.lines(symbol)]
    single = [event for each in frames for event in VENUES["binance"].decode(each)]
    assert sorted(
        (line.symbol, line.id, line.price, line.quantity, line.timestamp, line.side) for line in batched
    ) == sorted(
        (each.symbol, each.id, each.price, each.quantity, each.at, each.side)
        for each in single
        if isinstance(each, Trade)
    )


@pytest.mark.parametrize("seed", range(20))
def test_candles_do_not_depend_on_the_batches(seed: int) -> None:
    rng = random.Random(seed)
    numbers = [*range(1, 60)]
    if seed % 2:  # doubles, and trades that overtake others
        numbers += rng.choices(numbers, k=10)
        rng.shuffle(numbers)
    frames = [
        frame(number, SYMBOLS[number % 2], 100.0 + number % 7, NOW_MS + number * 10, 0.25 * (1 + number % 4))
        for number in numbers
    ]
    if seed % 4 == 1:
        frames[5:5] = [b"{", b'{"result":null,"id":1}', frame(1, "XRPUSDT"), frame(70, quantity=0.0)]
    assert Reading().read(frames).seen() == Reading().read(*([each] for each in frames)).seen()


@pytest.mark.parametrize("value", ["NaN", "nan", "Infinity", "-1", "0", "1e400", "", "x", None])
@pytest.mark.parametrize("field", ["p", "q"])
def test_number_that_is_none_costs_its_trade_alone(field: str, value: str | None) -> None:
    text = f'"{value}"' if value is not None else "null"
    bad = frame(2).replace(
        b'"%s":"%s"' % (field.encode(), b"100.00000000" if field == "p" else b"0.50000000"),
        f'"{field}":{text}'.encode(),
    )
    assert bad != frame(2)
    reading = Reading().read([frame(1), bad, frame(3)])
    assert reading.decoder.ticks == 2
    assert sum(reading.decoder.rejected.values()) == 1


@pytest.mark.parametrize("at", [0, -1, NOW_MS // 1000, NOW_MS * 1000, NOW_MS * 1_000_000, 4_102_444_800_000])
def test_time_of_another_unit_costs_its_trade_alone(at: int) -> None:
    reading = Reading().read([frame(1), frame(2, at=at), frame(3)])
    assert reading.decoder.ticks == 2
    assert sum(reading.decoder.rejected.values()) == 1


def test_digits_of_small_prices_and_large_quantities_stay() -> None:
    reading = Reading().read(
        [frame(1, price=0.00000638, quantity=12345678.12345678), frame(2, price=0.000005123, quantity=1e9)]
    )
    (candle,) = reading.candles.values()
    assert (candle.open, candle.close) == (0.00000638, 0.000005123)
    assert candle.amounts is not None
    assert candle.amounts.volume == 1012345678.12345678
