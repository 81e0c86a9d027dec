from datetime import UTC, datetime, timedelta

import pytest

from marketflow.cli.watch.market import Market
from marketflow.cli.watch.messages import (
    ChangedMode,
    ChangedPrices,
    Connected,
    Health,
    Heartbeat,
    Lost,
    Price,
    Snapshot,
    decode,
)

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HEALTH = Health("test", "ok", "ok", {"a": "generated"})


class Clock:
    """A clock that goes as told."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        return self.now


def price(value: float, seconds: float = 0.0, symbol: str = "BTCUSDT", exchange: str = "a") -> Price:
    return Price(symbol, exchange, value, NOON + timedelta(seconds=seconds))


def snapshot(*prices: Price, mode: str = "test") -> Snapshot:
    return Snapshot(mode, ["BTCUSDT", "ETHUSDT"], ["a", "b"], list(prices), HEALTH)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def market(clock: Clock) -> Market:
    return Market(clock)


def test_a_price_is_news_once(market: Market) -> None:
    assert market.take(snapshot(price(1.5))) == [price(1.5)]
    assert market.take(snapshot(price(1.5))) == []
    assert market.take(ChangedPrices([price(1.5)])) == []
    assert market.take(ChangedPrices([price(1.5, 1), price(2.5, 1, exchange="b")])) == [
        price(1.5, 1),
        price(2.5, 1, exchange="b"),
    ]


def test_a_change_has_a_direction_that_lasts_until_the_next_one(market: Market, clock: Clock) -> None:
    market.take(snapshot(price(1.5)))
    assert market.quotes["BTCUSDT", "a"].direction == 0
    for number, (value, direction, since) in enumerate([(2.5, 1, 0), (2.5, 1, 1), (2.25, -1, 0)]):
        clock.now += timedelta(seconds=1)
        market.take(ChangedPrices([price(value, number + 1)]))
        quote = market.quotes["BTCUSDT", "a"]
        assert (quote.price, quote.direction, market.since(quote)) == (value, direction, timedelta(seconds=since))


def test_another_mode_begins_with_nothing(market: Market) -> None:
    market.take(snapshot(price(1.125)))
    market.take(ChangedMode("live"))
    assert (market.mode, market.quotes, market.decimals) == ("live", {}, {})
    market.take(snapshot(price(1.5), mode="live"))
    assert market.quotes["BTCUSDT", "a"].direction == 0


def test_a_snapshot_of_another_mode_than_before_the_loss_begins_with_nothing(market: Market) -> None:
    market.take(snapshot(price(1.125)))
    assert market.take(snapshot(price(1.5, symbol="ETHUSDT"), mode="live")) == [price(1.5, symbol="ETHUSDT")]
    assert market.quotes.keys() == {("ETHUSDT", "a")}


def test_a_snapshot_replaces_what_was_known(market: Market) -> None:
    market.take(snapshot(price(1.5), price(2.5, exchange="b")))
    market.take(snapshot(price(2.0, 1)))
    assert market.quotes.keys() == {("BTCUSDT", "a")}
    assert market.quotes["BTCUSDT", "a"].direction == 1


def test_ages_are_by_the_clock_of_the_server(market: Market, clock: Clock) -> None:
    market.take(snapshot(price(1.5, 3600)))
    quote = market.quotes["BTCUSDT", "a"]
    assert market.age(quote) == timedelta()  # never negative
    market.take(Heartbeat(NOON + timedelta(seconds=3607)))
    assert market.age(quote) == timedelta(seconds=7)
    clock.now += timedelta(seconds=2)
    assert market.age(quote) == timedelta(seconds=9)


def test_a_symbol_keeps_the_most_decimals_that_it_has_had(market: Market) -> None:
    for value, decimals in [
        (67432.0, 0),
        (67432.1, 1),
        (67432.14, 2),
        (67432.1, 2),
        (1e-7, 7),
        (1e-300, 10),
        (1e30, 10),
    ]:
        market.take(ChangedPrices([price(value)]))
        assert market.decimals["BTCUSDT"] == decimals


def test_a_loss_tells_when_it_is_tried_again_and_keeps_the_prices(market: Market, clock: Clock) -> None:
    market.take(Connected())
    market.take(snapshot(price(1.5)))
    market.take(Lost("it rains", 4.0))
    clock.now += timedelta(seconds=1)
    assert (market.connected, market.until_next_try()) == (False, 3.0)
    clock.now += timedelta(seconds=10)
    assert market.until_next_try() == 0.0
    assert market.quotes
    market.take(Connected())
    assert (market.connected, market.lost) == (True, None)


def test_events_may_have_fields_and_names_of_later_versions() -> None:
    assert decode("mode", '{"mode":"live","previous":"test","new":[1]}') == ChangedMode("live")
    assert decode("weather", "{") is None
    assert decode("end", '{"reason":"shutdown"}') is None
