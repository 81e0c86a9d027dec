"""Applying events to the client's copy of the state."""

from datetime import UTC, datetime, timedelta

import pytest

from marketflow.api.rendering import rfc3339
from marketflow.api.streaming.events import ChangedMode, ChangedPrices, Heartbeat, Snapshot, StreamPrice
from marketflow.cli.watch.client_state import ClientState
from marketflow.cli.watch.stream_events import Connected, Lost, decode
from marketflow.health import Health
from marketflow.model import FeedState, Mode

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
HEALTH = Health("ok", Mode.TEST, 1.0, "ok", "ok", {"a": FeedState.GENERATED})


class Clock:
    """A clock that the test moves on, and sets back."""

    def __init__(self) -> None:
        self.now = NOON
        self.step = timedelta()

    def __call__(self) -> datetime:
        return self.now + self.step

    def monotonic(self) -> float:
        return (self.now - NOON).total_seconds()


def price(value: float, seconds: float = 0.0, symbol: str = "BTCUSDT", exchange: str = "a") -> StreamPrice:
    return StreamPrice(symbol, exchange, value, timestamp(seconds))


def timestamp(seconds: float) -> str:
    """Return a time after noon."""
    return rfc3339(int((NOON + timedelta(seconds=seconds)).timestamp() * 1000))


def snapshot(*prices: StreamPrice, mode: Mode = Mode.TEST) -> Snapshot:
    return Snapshot(mode, ["BTCUSDT", "ETHUSDT"], ["a", "b"], list(prices), HEALTH)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(clock: Clock) -> ClientState:
    return ClientState(clock, clock.monotonic)


def test_only_changed_prices_are_returned(state: ClientState) -> None:
    assert state.apply(snapshot(price(1.5))) == [price(1.5)]
    assert state.apply(snapshot(price(1.5))) == []
    assert state.apply(ChangedPrices([price(1.5)])) == []
    assert state.apply(ChangedPrices([price(1.5, 1), price(2.5, 1, exchange="b")])) == [
        price(1.5, 1),
        price(2.5, 1, exchange="b"),
    ]


def test_price_keeps_the_direction_of_its_last_change(state: ClientState, clock: Clock) -> None:
    state.apply(snapshot(price(1.5)))
    assert state.prices["BTCUSDT", "a"].direction == 0
    for number, (value, direction, since) in enumerate([(2.5, 1, 0), (2.5, 1, 1), (2.25, -1, 0)]):
        clock.now += timedelta(seconds=1)
        state.apply(ChangedPrices([price(value, number + 1)]))
        shown = state.prices["BTCUSDT", "a"]
        assert (shown.price, shown.direction, state.since_change(shown)) == (value, direction, timedelta(seconds=since))


def test_mode_switch_clears_prices_and_decimals(state: ClientState) -> None:
    state.apply(snapshot(price(1.125)))
    state.apply(ChangedMode(Mode.LIVE, Mode.TEST))
    assert (state.mode, state.prices, state.decimals) == ("live", {}, {})
    state.apply(snapshot(price(1.5), mode=Mode.LIVE))
    assert state.prices["BTCUSDT", "a"].direction == 0


def test_snapshot_of_another_mode_clears_prices(state: ClientState) -> None:
    state.apply(snapshot(price(1.125)))
    assert state.apply(snapshot(price(1.5, symbol="ETHUSDT"), mode=Mode.LIVE)) == [price(1.5, symbol="ETHUSDT")]
    assert state.prices.keys() == {("ETHUSDT", "a")}


def test_snapshot_removes_series_that_it_lacks(state: ClientState) -> None:
    state.apply(snapshot(price(1.5), price(2.5, exchange="b")))
    state.apply(snapshot(price(2.0, 1)))
    assert state.prices.keys() == {("BTCUSDT", "a")}
    assert state.prices["BTCUSDT", "a"].direction == 1


def test_ages_follow_the_clock_of_the_server(state: ClientState, clock: Clock) -> None:
    state.apply(snapshot(price(1.5, 3600)))
    shown = state.prices["BTCUSDT", "a"]
    assert state.age(shown) == timedelta()  # never negative
    state.apply(Heartbeat(timestamp(3607)))
    assert state.age(shown) == timedelta(seconds=7)
    clock.now += timedelta(seconds=2)
    assert state.age(shown) == timedelta(seconds=9)


def test_symbol_keeps_its_largest_number_of_decimals(state: ClientState) -> None:
    for value, decimals in [
        (67432.0, 0),
        (67432.1, 1),
        (67432.14, 2),
        (67432.1, 2),
        (1e-7, 7),
        (1e-300, 10),
        (1e30, 10),
    ]:
        state.apply(ChangedPrices([price(value)]))
        assert state.decimals["BTCUSDT"] == decimals


def test_lost_connection_keeps_prices_and_counts_down(state: ClientState, clock: Clock) -> None:
    state.apply(Connected())
    state.apply(snapshot(price(1.5)))
    state.apply(Lost("it rains", 4.0))
    clock.now += timedelta(seconds=1)
    assert (state.connected, state.until_reconnect()) == (False, 3.0)
    clock.now += timedelta(seconds=10)
    assert state.until_reconnect() == 0.0
    assert state.prices
    state.apply(Lost("it rains", 4.0))
    clock.step -= timedelta(hours=1)
    assert state.until_reconnect() == 4.0
    state.apply(Connected())
    assert (state.connected, state.lost) == (True, None)


def test_decode_ignores_unknown_fields_and_events() -> None:
    assert decode("mode", '{"mode":"live","previous":"test","new":[1]}') == ChangedMode(Mode.LIVE, Mode.TEST)
    assert decode("weather", "{") is None
    assert decode("end", '{"reason":"shutdown"}') is None
