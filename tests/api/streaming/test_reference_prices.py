"""Reference prices in the stream of prices: on request, with the number of exchanges that are fresh."""

import asyncio
from statistics import median
from typing import Any

import pytest

from marketflow.api.problems import UnknownExchange
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.api.streaming.subscription import Subscription, series_of
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import Mode, Series
from marketflow.reference_price import FRESH_MS
from tests.api.streaming.test_broadcaster import Events, Setup, last_id, received, run, tick
from tests.api.world import EXCHANGES, NOW, SYMBOLS, series

A, B, C = (series(exchange) for exchange in EXCHANGES)


class MovingSetup(Setup):
    """A setup whose clock a test moves."""

    def __init__(self) -> None:
        super().__init__()
        world = self.world
        self.prices = PriceQueries(world.cache, world.archive, lambda: world.now * NANOSECONDS_PER_MS)
        self.broadcaster = Broadcaster(
            EXCHANGES, SYMBOLS, world.mode, self.prices, world.health, world.announcements, 3
        )

    def chosen(self, exchanges: list[str], symbols: list[str] | None = None) -> Subscription:
        return self.broadcaster.subscription(series_of(self.world.context().names, exchanges, symbols or []))


def entries(events: Events) -> list[dict[str, Any]]:
    return [each for _, data in events for each in data.get("prices", ())]


def of_reference(events: Events) -> list[tuple[float, int]]:
    return [(each["price"], each["exchanges"]) for each in entries(events) if each["exchange"] == "reference"]


def test_reference_is_streamed_to_those_who_ask() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        for price, one in ((10.0, A), (11.0, B), (30.0, C)):
            setup.world.trade(price, 500, one)
        with setup.broadcaster.subscribe(setup.chosen(["Reference"], ["btcusdt"])) as subscriber:
            [(name, snapshot)] = await received(subscriber)
            assert (name, snapshot["exchanges"], snapshot["symbols"]) == ("snapshot", ["reference"], ["BTCUSDT"])
            assert snapshot["prices"] == [
                {
                    "symbol": "BTCUSDT",
                    "exchange": "reference",
                    "price": 11.0,
                    "timestamp": "2025-11-21T02:00:30.000Z",
                    "exchanges": 3,
                }
            ]
            setup.announce(12.0)
            assert of_reference(await received(subscriber)) == [(12.0, 3)]

    run(test)


def test_clients_that_do_not_ask_receive_no_reference() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        setup.world.trade(10.0, 500, A)
        with (
            setup.broadcaster.subscribe(setup.chosen(["reference"])),
            setup.broadcaster.subscribe(setup.chosen([])) as subscriber,
        ):
            events = await received(subscriber)
            setup.announce(12.0)
            events += await received(subscriber)
            assert [{*each} for each in entries(events)] == [{"symbol", "exchange", "price", "timestamp"}] * 2
            assert events[0][1]["exchanges"] == [*EXCHANGES]

    run(test)


def test_exchange_that_turns_stale_updates_reference_without_a_tick() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        for price, one, age_ms in ((10.0, A, 5_000), (20.0, B, 0), (40.0, C, 0)):
            setup.world.trade(price, age_ms, one)
        with setup.broadcaster.subscribe(setup.chosen(["reference"])) as subscriber:
            assert of_reference(await received(subscriber)) == [(20.0, 3)]
            setup.world.now += FRESH_MS - 4_999
            assert of_reference(await received(subscriber)) == [(30.0, 2)]
            setup.world.now += FRESH_MS
            assert of_reference(await received(subscriber)) == [(30.0, 0)]  # none is fresh

    run(test)


def test_streamed_reference_equals_the_query() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        known: dict[Series, float] = {}
        with setup.broadcaster.subscribe(setup.chosen(["reference", "exchange1"], ["BTCUSDT"])) as subscriber:
            await received(subscriber)
            for number, one in enumerate((A, B, C, B, A, A, C)):
                known[one] = 10.0 + number * 3.7 % 5
                newest = tick(known[one], 100 - number)
                setup.world.cache.newest_ticks[one] = newest
                setup.world.announcements.announce((one, newest))
                events = await received(subscriber)
                if of_reference(events):  # else the median is the same
                    last = of_reference(events)[-1]
                assert last[0] == pytest.approx(median(known.values()))
                asked = await setup.prices.reference((A, B, C))
                assert (asked.price, asked.exchanges) == last

    run(test)


def test_resumed_client_receives_the_reference_of_now() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        setup.world.trade(10.0, 500, A)
        subscription = setup.chosen(["reference"], ["BTCUSDT"])
        with setup.broadcaster.subscribe(subscription) as subscriber:
            seen = await last_id(subscriber)
        setup.world.trade(14.0, 100, B)
        with setup.broadcaster.subscribe(subscription, seen) as subscriber:
            events = await received(subscriber)
            assert [name for name, _ in events] == ["prices"]
            assert of_reference(events) == [(12.0, 2)]

    run(test)


def test_mode_switch_drops_references_of_the_other_mode() -> None:
    async def test(_: Setup) -> None:
        setup = MovingSetup()
        setup.world.trade(10.0, 500, A)
        setup.world.trade(70.0, 500, A._replace(mode=Mode.LIVE))
        with setup.broadcaster.subscribe(setup.chosen(["reference"])) as subscriber:
            await received(subscriber)
            setup.world.mode.current = Mode.LIVE
            events: Events = []
            async with asyncio.timeout(5):
                while not of_reference(events):
                    events = await received(subscriber)
            assert of_reference(events) == [(70.0, 1)]

    run(test)


def test_unknown_exchange_is_still_refused() -> None:
    setup = MovingSetup()
    with pytest.raises(UnknownExchange):
        setup.chosen(["references"])
    assert setup.world.now == NOW
