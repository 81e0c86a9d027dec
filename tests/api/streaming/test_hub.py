"""What clients of a hub are told, whatever changes and however slow they are."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming import hub as hubs
from marketflow.api.streaming.hub import Hub
from marketflow.api.streaming.selection import Selection, named
from marketflow.api.streaming.subscriber import Client
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import FeedState, Mode, Series, Tick
from tests.api.world import EXCHANGES, NOW, SYMBOLS, World, series

EVERYTHING = frozenset((exchange, symbol) for exchange in EXCHANGES for symbol in SYMBOLS)
BTC = series()
ETH = series("Exchange2", "ETHUSDT")


def tick(price: float, age_ms: int = 0) -> Tick:
    return Tick(price, NOW - age_ms, (NOW - age_ms) * NANOSECONDS_PER_MS)


class Market:
    """A world with a hub."""

    def __init__(self) -> None:
        self.world = World()
        prices = PriceQueries(self.world.cache, self.world.archive, lambda: NOW * NANOSECONDS_PER_MS)
        self.hub = Hub(EXCHANGES, SYMBOLS, self.world.mode, prices, self.world.health, self.world.announcements, 3)

    @property
    def everything(self) -> Selection:
        return self.hub.selection(EVERYTHING)

    def announce(self, price: float, one: Series = BTC, age_ms: int = 0) -> None:
        self.world.announcements.announce((one, tick(price, age_ms)))


Told = list[tuple[str, Any]]


async def told(client: Client, but: tuple[str, ...] = ("heartbeat",)) -> Told:
    """The next events that are not of some kind, as they are sent."""
    while True:
        async with asyncio.timeout(5):
            batch = await client.next()
        if events := [(each.event, msgspec.json.decode(each.data)) for each in batch.messages if each.event not in but]:
            return events


def run(test: Callable[[Market], Awaitable[None]]) -> None:
    async def running() -> None:
        await test(Market())
        await everything_else_ended()

    asyncio.run(running())


async def everything_else_ended() -> None:
    async with asyncio.timeout(5):
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)


def prices(events: Told) -> dict[tuple[str, str], float]:
    return {(each["exchange"], each["symbol"]): each["price"] for _, data in events for each in data.get("prices", ())}


def test_a_client_begins_with_a_snapshot_and_goes_on_with_what_changes() -> None:
    async def test(market: Market) -> None:
        market.world.trade(10.0, 500)
        market.world.trade(20.0, 400, ETH)
        with market.hub.client(market.everything) as client:
            [(name, snapshot)] = await told(client)
            assert name == "snapshot"
            assert snapshot["mode"] == "test"
            assert snapshot["symbols"] == list(SYMBOLS)
            assert snapshot["exchanges"] == list(EXCHANGES)
            assert snapshot["health"]["exchanges"] == {"exchange1": "generated"}
            assert prices([(name, snapshot)]) == {("exchange1", "BTCUSDT"): 10.0, ("Exchange2", "ETHUSDT"): 20.0}
            market.announce(11.0)
            assert await told(client) == [
                (
                    "prices",
                    {
                        "prices": [
                            {
                                "symbol": "BTCUSDT",
                                "exchange": "exchange1",
                                "price": 11.0,
                                "timestamp": "2025-11-21T02:00:30.500Z",
                            }
                        ]
                    },
                )
            ]

    run(test)


def test_of_what_a_client_could_not_take_only_the_newest_is_told() -> None:
    async def test(market: Market) -> None:
        market.world.trade(10.0, 500)
        with market.hub.client(market.everything) as client:
            await told(client)
            for number in range(1000):
                market.announce(100.0 + number, age_ms=1000 - number - 600)
                await asyncio.sleep(0)
            market.announce(5.0, ETH)
            events = await told(client)
            assert [name for name, _ in events] == ["prices"]
            assert prices(events) == {("exchange1", "BTCUSDT"): 1099.0, ("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_prices_come_in_the_order_of_time_and_arrival_the_newest_last() -> None:
    async def test(market: Market) -> None:
        btc, eth = Series(Mode.TEST, "exchange1", "BTCUSDT"), Series(Mode.TEST, "Exchange2", "BTCUSDT")
        at = NOW - 100

        def announce(*ticks: tuple[Series, int]) -> None:
            market.world.announcements.announce(*((one, Tick(float(order), at, order)) for one, order in ticks))

        market.world.cache.newest_ticks |= {btc: Tick(2.0, at, 2), eth: Tick(1.0, at, 1)}
        with market.hub.client(market.everything) as client:
            [(_, snapshot)] = await told(client)
            assert [each["price"] for each in snapshot["prices"]] == [1.0, 2.0]
            announce((btc, 4), (eth, 3))
            [(_, changed)] = await told(client)
            assert [each["price"] for each in changed["prices"]] == [3.0, 4.0]

    run(test)


def test_an_older_tick_never_takes_the_place_of_a_newer_one() -> None:
    async def test(market: Market) -> None:
        market.world.trade(10.0, 500)
        with market.hub.client(market.everything) as client:
            await told(client)
            market.announce(9.0, age_ms=600)
            market.announce(5.0, ETH)
            assert prices(await told(client)) == {("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_only_what_was_selected_is_told() -> None:
    async def test(market: Market) -> None:
        selection = market.hub.selection(named(market.world.context().names, ["EXCHANGE2"], ["ethusdt"]))
        with market.hub.client(selection) as client:
            [(_, snapshot)] = await told(client)
            assert (snapshot["symbols"], snapshot["exchanges"]) == (["ETHUSDT"], ["Exchange2"])
            market.announce(10.0)
            market.announce(5.0, ETH)
            assert prices(await told(client)) == {("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_clients_that_want_the_same_are_given_the_same_bytes() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as one, market.hub.client(market.everything) as other:
            for _ in range(2):
                first, second = await asyncio.gather(one.next(), other.next())
                assert first is second
                market.announce(10.0)

    run(test)


def test_a_switch_is_told_before_anything_of_the_new_mode_and_nothing_of_the_old_one_follows() -> None:
    async def test(market: Market) -> None:
        live = BTC._replace(mode=Mode.LIVE)
        market.world.trade(10.0, 500)
        market.world.trade(70.0, 100_000, live)
        with market.hub.client(market.everything) as client:
            await told(client)
            market.world.mode.current = Mode.LIVE
            market.announce(11.0)
            market.announce(71.0, live, age_ms=200_000)  # older than what the cache has
            events = await told(client)
            while len(events) < 3:
                events += await told(client, ("heartbeat", "health"))
                market.announce(12.0)
                market.announce(73.0, live)
            assert [name for name, _ in events] == ["mode", "snapshot", "prices"]
            assert events[0][1] == {"mode": "live", "previous": "test"}
            assert events[1][1]["mode"] == events[1][1]["health"]["mode"] == "live"
            assert prices(events[1:2]) == {("exchange1", "BTCUSDT"): 70.0}
            assert prices(events[2:]) == {("exchange1", "BTCUSDT"): 73.0}

    run(test)


def test_health_is_told_when_anything_but_the_uptime_has_changed() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            await told(client)
            market.world.feed = FeedState.STALE
            [(name, health)] = await told(client)
            assert name == "health"
            assert health["exchanges"] == {"exchange1": "stale"}
            market.announce(10.0)
            assert [name for name, _ in await told(client)] == ["prices"]

    run(test)


@pytest.mark.parametrize("away", ["subscription", "redis"])
def test_while_announcements_cannot_be_relied_on_the_cache_is_asked(away: str) -> None:
    async def test(market: Market) -> None:
        if away == "redis":
            market.world.redis = "down"
        else:
            market.world.announcements.live = False
        with market.hub.client(market.everything) as client:
            await told(client)
            for price in (10.0, 11.0):
                market.world.trade(price, int(400 - price))
                assert prices(await told(client)) == {("exchange1", "BTCUSDT"): price}

    run(test)


def test_what_was_missed_between_two_subscriptions_is_read() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            await told(client)
            market.announce(9.0, age_ms=500)
            await told(client)
            market.world.trade(10.0, 100)
            market.world.announcements.times_live += 1
            assert prices(await told(client)) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)


def test_what_only_the_archive_has_is_told_after_the_snapshot() -> None:
    async def test(market: Market) -> None:
        market.world.trade(10.0, 500_000)
        market.world.cache.away = True
        with market.hub.client(market.everything) as client:
            events = await told(client)
            if not prices(events):
                events += await told(client)
            assert events[0][0] == "snapshot"
            assert prices(events) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)


def test_a_hub_without_any_store_begins_with_an_empty_snapshot() -> None:
    async def test(market: Market) -> None:
        market.world.cache.away = market.world.archive.away = True
        with market.hub.client(market.everything) as client:
            [(name, snapshot)] = await told(client)
            assert (name, snapshot["prices"]) == ("snapshot", [])

    run(test)


# Going on


async def last_id(client: Client) -> str:
    async with asyncio.timeout(5):
        return (await client.next()).messages[-1].id


def test_whoever_comes_back_is_told_what_has_changed_since() -> None:
    async def test(market: Market) -> None:
        market.world.trade(10.0, 500)
        market.world.trade(20.0, 500, ETH)
        with market.hub.client(market.everything) as client:
            seen = await last_id(client)
        market.world.trade(21.0, 100, ETH)  # while nobody looks
        with market.hub.client(market.everything, seen) as client:
            events = await told(client)
            assert [name for name, _ in events] == ["prices"]
            assert prices(events) == {("Exchange2", "ETHUSDT"): 21.0}

    run(test)


def test_whoever_comes_back_and_has_missed_nothing_has_a_heartbeat_at_once() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as other:
            seen = await last_id(other)
            with market.hub.client(market.everything, seen) as client:
                assert [name for name, _ in await told(client, ())] == ["heartbeat"]

    run(test)


def test_whoever_comes_back_after_a_switch_is_told_of_it() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            seen = await last_id(client)
        market.world.mode.current = Mode.LIVE
        with market.hub.client(market.everything, seen) as client:
            events = await told(client)
            if len(events) < 2:
                events += await told(client)
            assert [name for name, _ in events] == ["mode", "snapshot"]

    run(test)


@pytest.mark.parametrize("change", ["", "x", "another run", "the future", "another mode", "another selection"])
def test_an_id_that_says_nothing_here_is_answered_with_a_snapshot(change: str) -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            run_id, mode, epoch, version, digest = (await last_id(client)).split("-")
        changed = {
            "another run": f"{'0' * 12}-{mode}-{epoch}-{version}-{digest}",
            "the future": f"{run_id}-{mode}-{epoch}-{int(version) + 1000}-{digest}",
            "another mode": f"{run_id}-none-{epoch}-{version}-{digest}",
            "another selection": f"{run_id}-{mode}-{epoch}-{version}-0",
        }
        with market.hub.client(market.everything, changed.get(change, change)) as client:
            assert [name for name, _ in await told(client)] == ["snapshot"]

    run(test)


# Beginning and end


def test_heartbeats_come_whether_or_not_anything_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "HEARTBEAT_SECONDS", 0.2)

    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            await told(client)
            for _ in range(3):
                assert await told(client, ()) == [("heartbeat", {"timestamp": "2025-11-21T02:00:30.500Z"})]

    run(test)


def test_the_end_is_told_to_all_and_to_those_who_come_then() -> None:
    async def test(market: Market) -> None:
        with market.hub.client(market.everything) as client:
            await told(client)
            market.hub.end()
            assert await told(client) == [("end", {"reason": "shutdown"})]
            with market.hub.client(market.everything) as late:
                batch = await late.next()
                assert batch.is_last

    run(test)


def test_nothing_is_done_while_nobody_looks() -> None:
    async def test(market: Market) -> None:
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1

        market.world.cache.on_ask = ask
        with market.hub.client(market.everything) as client:
            await told(client)
            assert market.world.announcements.takers
        await everything_else_ended()
        assert not market.world.announcements.takers
        assert asked == 1

    run(test)


def test_a_bug_is_logged_and_the_stream_goes_on(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "RESTART_SECONDS", 0.01)

    async def test(market: Market) -> None:
        failures = iter([ZeroDivisionError()])

        def fail() -> None:
            for failure in failures:
                raise failure

        market.world.cache.on_ask = fail
        market.world.trade(10.0, 100)
        with market.hub.client(market.everything) as client:
            assert prices(await told(client)) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)
    assert any("the stream failed, which is a bug" in line and "ZeroDivisionError" in line for line in log)
