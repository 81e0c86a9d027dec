"""The reference price: the median over the exchanges, as a price and as candles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from marketflow.api.queries.reference import reference_candles
from marketflow.model import Amounts, Candle, Slot, Tick, candle_of, merge, minute_start
from marketflow.reference_price import FRESH_MS
from tests.api.world import EXCHANGES, NOW, World, series

PRICES = st.floats(min_value=1e-8, max_value=1e9)


@pytest.mark.parametrize(
    ("prices", "median"),
    [([10.0], 10.0), ([10.0, 90.0], 50.0), ([90.0, 10.0, 30.0], 30.0), ([0.1, 0.2], 0.15)],
)
def test_reference_price_is_median_of_exchanges(prices: list[float], median: float) -> None:
    world = World()
    for number, (exchange, price) in enumerate(zip(EXCHANGES, prices, strict=False)):
        world.trade(price, 1_000 + number, series(exchange))
    assert world.ask("/prices/reference/btcusdt").json() == {
        "symbol": "BTCUSDT",
        "price": median,
        "exchanges": len(prices),
        "timestamp": "2025-11-21T02:00:29.500Z",
    }


def test_stale_exchange_does_not_count_in_reference_price() -> None:
    world = World()
    world.trade(10.0, 100, series("exchange1"))
    world.trade(99.0, FRESH_MS + 1, series("Exchange2"))
    answer = world.ask("/prices/reference/BTCUSDT").json()
    assert (answer["price"], answer["exchanges"]) == (10.0, 1)


def test_reference_price_without_fresh_tick_is_no_data() -> None:
    world = World()
    world.trade(99.0, FRESH_MS + 1)
    answer = world.ask("/prices/reference/BTCUSDT")
    assert (answer.status_code, answer.json()["code"]) == (404, "no_data")


def test_reference_price_during_outage_is_503() -> None:
    world = World()
    world.cache.away = True
    assert world.ask("/prices/reference/BTCUSDT").status_code == 503


def test_candles_of_reference_are_medians_of_the_exchanges() -> None:
    world = World()
    for exchange, opening, closing in zip(EXCHANGES, (10.0, 90.0, 40.0), (20.0, 80.0, 70.0), strict=True):
        world.trade(opening, 100_000, series(exchange))
        world.trade(closing, 99_000, series(exchange))
    answer = world.ask("/candles/reference/btcusdt?limit=1&to=-1m").json()
    (candle,) = answer["candles"]
    assert (answer["symbol"], answer["exchange"], answer["interval"]) == ("BTCUSDT", "reference", "1m")
    assert [candle[name] for name in ("open", "high", "low", "close", "average", "ticks")] == [40, 70, 40, 70, 55, 6]
    assert world.ask("/candles/reference/BTCUSDT?limit=1&to=-1m&format=array").json()[0][1:5] == [
        "40.0",
        "70.0",
        "40.0",
        "70.0",
    ]


def test_reference_candle_has_vwap_of_all_trades() -> None:
    world = World()
    for exchange, price in zip(EXCHANGES, (10.0, 40.0, 100.0), strict=True):
        slot = Slot(series(exchange), minute_start(NOW - 120_000))
        candle = candle_of(Tick(price, slot.start, 0))
        amounts = Amounts(2.0, 2 * price, 1.0, price)
        world.cache.minutes[slot] = world.archive.minutes[slot] = structs.replace(candle, amounts=amounts)
    (candle,) = world.ask("/candles/reference/BTCUSDT?limit=1&to=-1m").json()["candles"]
    assert (candle["close"], candle["volume"], candle["vwap"]) == (40.0, 6.0, 50.0)


@given(st.lists(st.lists(PRICES, min_size=1, max_size=4), min_size=1, max_size=5))
def test_reference_candle_keeps_order_of_values(of_exchanges: list[list[float]]) -> None:
    candles = [_candle(prices) for prices in of_exchanges]
    (found,) = reference_candles({NOW: candle} for candle in candles).values()
    assert found.average is not None
    assert found.low <= min(found.open, found.close, found.average)
    assert found.high >= max(found.open, found.close, found.average)
    assert found.ticks == sum(map(len, of_exchanges))


def _candle(prices: list[float]) -> Candle:
    candle = candle_of(Tick(prices[0], NOW, 0))
    for number, price in enumerate(prices[1:], 1):
        candle = merge(candle, candle_of(Tick(price, NOW + number, number)))
    return candle
