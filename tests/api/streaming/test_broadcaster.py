"""Batches that subscribers receive: conflation, mode switches, unreliable announcements, resumption."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import Any

import msgspec
import pytest

from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming import broadcaster as broadcaster_module
from marketflow.api.streaming.broadcaster import DELIVERIES_AT_ONCE, Broadcaster
from marketflow.api.streaming.events import Subscribed
from marketflow.api.streaming.subscriber import Subscriber
from marketflow.api.streaming.subscription import Subscription, series_of
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import FeedState, Mode, Series, Tick
from marketflow.runtime.local_announcements import LocalAnnouncements
from tests.api.world import EXCHANGES, NOW, SYMBOLS, World, series

EVERYTHING = frozenset((exchange, symbol) for exchange in EXCHANGES for symbol in SYMBOLS)
BTC = series()
ETH = series("Exchange2", "ETHUSDT")


def tick(price: float, age_ms: int = 0) -> Tick:
    return Tick(price, NOW - age_ms, (NOW - age_ms) * NANOSECONDS_PER_MS)


class Setup:
    """A world with a broadcaster."""

    def __init__(self) -> None:
        self.world = World()
        prices = PriceQueries(self.world.cache, self.world.archive, lambda: NOW * NANOSECONDS_PER_MS)
        self.broadcaster = Broadcaster(
            EXCHANGES, SYMBOLS, self.world.mode, prices, self.world.health, self.world.announcements, 3
        )

    @property
    def everything(self) -> Subscription:
        return self.broadcaster.subscription(EVERYTHING)

    def announce(self, price: float, one: Series = BTC, age_ms: int = 0) -> None:
        self.world.announcements.announce((one, tick(price, age_ms)))


Events = list[tuple[str, Any]]


async def received(subscriber: Subscriber, but: tuple[str, ...] = ("heartbeat",)) -> Events:
    """Return the next events except those with the names in `but`, decoded."""
    while True:
        async with asyncio.timeout(5):
            batch = await subscriber.next()
        if events := [(each.event, msgspec.json.decode(each.data)) for each in batch.messages if each.event not in but]:
            return events


def run(test: Callable[[Setup], Awaitable[None]]) -> None:
    async def running() -> None:
        await test(Setup())
        await everything_else_ended()

    asyncio.run(running())


async def everything_else_ended() -> None:
    async with asyncio.timeout(5):
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)


def prices(events: Events) -> dict[tuple[str, str], float]:
    return {(each["exchange"], each["symbol"]): each["price"] for _, data in events for each in data.get("prices", ())}


def test_only_subscriber_that_returns_at_once_receives_changes() -> None:
    """As a page that is reloaded: its next stream begins before the tasks of the last one have ended."""

    async def test(setup: Setup) -> None:
        world = setup.world
        announcements = LocalAnnouncements(asyncio.get_running_loop(), world.announcements)
        prices_of = PriceQueries(world.cache, world.archive, lambda: NOW * NANOSECONDS_PER_MS)
        broadcaster = Broadcaster(EXCHANGES, SYMBOLS, world.mode, prices_of, world.health, announcements)
        everything = broadcaster.subscription(EVERYTHING)
        world.trade(10.0, 500)
        for price in (11.0, 12.0, 13.0):
            with broadcaster.subscribe(everything) as subscriber:
                await received(subscriber)
                announcements.publish({BTC: tick(price, 100 - int(price))})
                assert prices(await received(subscriber)) == {("exchange1", "BTCUSDT"): price}

    run(test)


def test_paced_subscriber_receives_the_newest_after_its_pause() -> None:
    async def test(setup: Setup) -> None:
        loop = asyncio.get_running_loop()
        setup.world.trade(10.0, 500)
        with (
            setup.broadcaster.subscribe(setup.everything, pause_seconds=0.1) as paced,
            setup.broadcaster.subscribe(setup.everything) as other,
        ):
            await received(paced)
            await received(other)
            arrived = []
            for price in (11.0, 12.0, 13.0, 14.0):
                setup.announce(price, age_ms=100 - int(price))
                await received(other)
            for price in (14.0, 15.0):
                assert prices(await received(paced)) == {("exchange1", "BTCUSDT"): price}
                arrived.append(loop.time())
                setup.announce(price + 1, age_ms=99 - int(price))
            assert arrived[1] - arrived[0] > 0.05

    run(test)


def test_subscribers_of_one_pace_share_their_batches() -> None:
    async def test(setup: Setup) -> None:
        with ExitStack() as stack:
            subscribed = (setup.broadcaster.subscribe(setup.everything, pause_seconds=0.1) for _ in range(3))
            subscribers = [stack.enter_context(each) for each in subscribed]
            for each in subscribers:
                await received(each)
                setup.announce(11.0)
            batches = await asyncio.gather(*(each.next() for each in subscribers))
            assert len({id(each) for batch in batches for each in batch.messages if each.event == "prices"}) == 1

    run(test)


def test_reply_does_not_wait_for_the_pause() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything, pause_seconds=60.0) as paced:
            await received(paced)
            setup.announce(11.0)
            replied = asyncio.create_task(paced.reply(Subscribed([], [], [])))
            assert [name for name, _ in await received(paced)] == ["subscribed", "prices"]
            await replied

    run(test)


def test_subscriber_receives_a_snapshot_then_changes() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        setup.world.trade(20.0, 400, ETH)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            [(name, snapshot)] = await received(subscriber)
            assert name == "snapshot"
            assert snapshot["mode"] == "test"
            assert snapshot["symbols"] == list(SYMBOLS)
            assert snapshot["exchanges"] == list(EXCHANGES)
            assert snapshot["health"]["exchanges"] == {"exchange1": "generated"}
            assert prices([(name, snapshot)]) == {("exchange1", "BTCUSDT"): 10.0, ("Exchange2", "ETHUSDT"): 20.0}
            setup.announce(11.0)
            assert await received(subscriber) == [
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


def test_slow_subscriber_receives_only_the_newest_prices() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            for number in range(1000):
                setup.announce(100.0 + number, age_ms=1000 - number - 600)
                await asyncio.sleep(0)
            setup.announce(5.0, ETH)
            events = await received(subscriber)
            assert [name for name, _ in events] == ["prices"]
            assert prices(events) == {("exchange1", "BTCUSDT"): 1099.0, ("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_prices_are_ordered_by_event_time_and_arrival() -> None:
    async def test(setup: Setup) -> None:
        btc, eth = Series(Mode.TEST, "exchange1", "BTCUSDT"), Series(Mode.TEST, "Exchange2", "BTCUSDT")
        at = NOW - 100

        def announce(*ticks: tuple[Series, int]) -> None:
            setup.world.announcements.announce(*((one, Tick(float(order), at, order)) for one, order in ticks))

        setup.world.cache.newest_ticks |= {btc: Tick(2.0, at, 2), eth: Tick(1.0, at, 1)}
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            [(_, snapshot)] = await received(subscriber)
            assert [each["price"] for each in snapshot["prices"]] == [1.0, 2.0]
            announce((btc, 4), (eth, 3))
            [(_, changed)] = await received(subscriber)
            assert [each["price"] for each in changed["prices"]] == [3.0, 4.0]

    run(test)


def test_older_tick_never_replaces_a_newer_one() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            setup.announce(9.0, age_ms=600)
            setup.announce(5.0, ETH)
            assert prices(await received(subscriber)) == {("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_subscriber_receives_only_subscribed_series() -> None:
    async def test(setup: Setup) -> None:
        subscription = setup.broadcaster.subscription(
            series_of(setup.world.context().names, ["EXCHANGE2"], ["ethusdt"])
        )
        with setup.broadcaster.subscribe(subscription) as subscriber:
            [(_, snapshot)] = await received(subscriber)
            assert (snapshot["symbols"], snapshot["exchanges"]) == (["ETHUSDT"], ["Exchange2"])
            setup.announce(10.0)
            setup.announce(5.0, ETH)
            assert prices(await received(subscriber)) == {("Exchange2", "ETHUSDT"): 5.0}

    run(test)


def test_equal_subscriptions_share_the_same_batch() -> None:
    async def test(setup: Setup) -> None:
        with (
            setup.broadcaster.subscribe(setup.everything) as one,
            setup.broadcaster.subscribe(setup.everything) as other,
        ):
            for _ in range(2):
                first, second = await asyncio.gather(one.next(), other.next())
                assert first is second
                setup.announce(10.0)

    run(test)


def test_mode_switch_separates_prices_of_both_modes() -> None:
    async def test(setup: Setup) -> None:
        live = BTC._replace(mode=Mode.LIVE)
        setup.world.trade(10.0, 500)
        setup.world.trade(70.0, 100_000, live)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            setup.world.mode.current = Mode.LIVE
            setup.announce(11.0)
            setup.announce(71.0, live, age_ms=200_000)  # older than what the cache has
            events = await received(subscriber)
            while len(events) < 3:
                events += await received(subscriber, ("heartbeat", "health"))
                setup.announce(12.0)
                setup.announce(73.0, live)
            assert [name for name, _ in events] == ["mode", "snapshot", "prices"]
            assert events[0][1] == {"mode": "live", "previous": "test"}
            assert events[1][1]["mode"] == events[1][1]["health"]["mode"] == "live"
            assert prices(events[1:2]) == {("exchange1", "BTCUSDT"): 70.0}
            assert prices(events[2:]) == {("exchange1", "BTCUSDT"): 73.0}

    run(test)


def test_health_is_sent_when_more_than_the_uptime_changed() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            setup.world.feed = FeedState.STALE
            [(name, health)] = await received(subscriber)
            assert name == "health"
            assert health["exchanges"] == {"exchange1": "stale"}
            setup.announce(10.0)
            assert [name for name, _ in await received(subscriber)] == ["prices"]

    run(test)


@pytest.mark.parametrize("outage", ["subscription", "redis"])
def test_cache_is_polled_while_announcements_are_unreliable(outage: str) -> None:
    async def test(setup: Setup) -> None:
        if outage == "redis":
            setup.world.redis = "down"
        else:
            setup.world.announcements.live = False
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            for price in (10.0, 11.0):
                setup.world.trade(price, int(400 - price))
                assert prices(await received(subscriber)) == {("exchange1", "BTCUSDT"): price}

    run(test)


def test_ticks_missed_between_two_connections_are_read() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            setup.announce(9.0, age_ms=500)
            await received(subscriber)
            setup.world.trade(10.0, 100)
            setup.world.announcements.times_live += 1
            assert prices(await received(subscriber)) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)


def test_prices_of_the_archive_follow_the_snapshot() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500_000)
        setup.world.cache.away = True
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            events = await received(subscriber)
            if not prices(events):
                events += await received(subscriber)
            assert events[0][0] == "snapshot"
            assert prices(events) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)


def test_snapshot_is_empty_while_both_stores_are_down() -> None:
    async def test(setup: Setup) -> None:
        setup.world.cache.away = setup.world.archive.away = True
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            [(name, snapshot)] = await received(subscriber)
            assert (name, snapshot["prices"]) == ("snapshot", [])

    run(test)


# Resumption


async def last_id(subscriber: Subscriber) -> str:
    async with asyncio.timeout(5):
        return (await subscriber.next()).messages[-1].id


def test_resumed_subscriber_receives_changes_since_its_id() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        setup.world.trade(20.0, 500, ETH)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            seen = await last_id(subscriber)
        setup.world.trade(21.0, 100, ETH)  # while there is no subscriber
        with setup.broadcaster.subscribe(setup.everything, seen) as subscriber:
            events = await received(subscriber)
            assert [name for name, _ in events] == ["prices"]
            assert prices(events) == {("Exchange2", "ETHUSDT"): 21.0}

    run(test)


def test_resumed_subscriber_without_changes_gets_a_heartbeat() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as other:
            seen = await last_id(other)
            with setup.broadcaster.subscribe(setup.everything, seen) as subscriber:
                assert [name for name, _ in await received(subscriber, ())] == ["heartbeat"]

    run(test)


def test_resumed_subscriber_receives_a_missed_mode_switch() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            seen = await last_id(subscriber)
        setup.world.mode.current = Mode.LIVE
        with setup.broadcaster.subscribe(setup.everything, seen) as subscriber:
            events = await received(subscriber)
            if len(events) < 2:
                events += await received(subscriber)
            assert [name for name, _ in events] == ["mode", "snapshot"]

    run(test)


@pytest.mark.parametrize("change", ["", "x", "another run", "the future", "another mode", "another subscription"])
def test_unknown_event_id_is_answered_with_a_snapshot(change: str) -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            run_id, mode, epoch, version, digest = (await last_id(subscriber)).split("-")
        changed = {
            "another run": f"{'0' * 12}-{mode}-{epoch}-{version}-{digest}",
            "the future": f"{run_id}-{mode}-{epoch}-{int(version) + 1000}-{digest}",
            "another mode": f"{run_id}-none-{epoch}-{version}-{digest}",
            "another subscription": f"{run_id}-{mode}-{epoch}-{version}-0",
        }
        with setup.broadcaster.subscribe(setup.everything, changed.get(change, change)) as subscriber:
            assert [name for name, _ in await received(subscriber)] == ["snapshot"]

    run(test)


# Start and end


def test_heartbeats_are_sent_without_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster_module, "HEARTBEAT_SECONDS", 0.2)

    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            for _ in range(3):
                assert await received(subscriber, ()) == [("heartbeat", {"timestamp": "2025-11-21T02:00:30.500Z"})]

    run(test)


def test_end_is_sent_to_present_and_later_subscribers() -> None:
    async def test(setup: Setup) -> None:
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            setup.broadcaster.end()
            assert await received(subscriber) == [("end", {"reason": "shutdown"})]
            with setup.broadcaster.subscribe(setup.everything) as late:
                batch = await late.next()
                assert batch.is_last

    run(test)


def test_broadcaster_is_idle_without_subscribers() -> None:
    async def test(setup: Setup) -> None:
        asked = 0

        def ask() -> None:
            nonlocal asked
            asked += 1

        setup.world.cache.on_ask = ask
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            await received(subscriber)
            assert setup.world.announcements.takers
        await everything_else_ended()
        assert not setup.world.announcements.takers
        assert asked == 1

    run(test)


def test_unexpected_error_is_logged_and_the_stream_resumes(log: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcaster_module, "RESTART_SECONDS", 0.01)

    async def test(setup: Setup) -> None:
        failures = iter([ZeroDivisionError()])

        def fail() -> None:
            for failure in failures:
                raise failure

        setup.world.cache.on_ask = fail
        setup.world.trade(10.0, 100)
        with setup.broadcaster.subscribe(setup.everything) as subscriber:
            assert prices(await received(subscriber)) == {("exchange1", "BTCUSDT"): 10.0}

    run(test)
    assert any("the stream failed, which is a bug" in line and "ZeroDivisionError" in line for line in log)


class MemoryOutput:
    """An output that keeps what is written."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] | None = None
        self.is_writable = True
        self.is_closed = False
        self.written: list[bytes] = []
        self.has_more = asyncio.Event()

    def sink(self) -> "MemoryOutput | None":
        if self.is_closed:
            raise ConnectionAbortedError
        return self if self.is_writable else None

    def is_closing(self) -> bool:
        return self.is_closed

    def write(self, data: bytes) -> None:
        assert self.is_writable
        assert not self.is_closed
        self.written.append(data)
        self.has_more.set()

    async def next(self) -> bytes:
        async with asyncio.timeout(5):
            while not self.written:
                self.has_more.clear()
                await self.has_more.wait()
        return self.written.pop(0)

    def set_writable(self, is_writable: bool) -> None:
        self.is_writable = is_writable
        assert self.on_change is not None
        self.on_change()


async def without_heartbeat(output: MemoryOutput) -> bytes:
    while b"heartbeat" in (data := await output.next()) and b"prices" not in data:
        pass
    return data


Writing = tuple[MemoryOutput, Subscriber, "asyncio.Task[None]"]


@contextmanager
def writing(
    setup: Setup, number: int, counted: list[int], make: type[MemoryOutput] = MemoryOutput
) -> Iterator[list[Writing]]:
    """Yield this number of subscribers to everything, to whose outputs the broadcaster writes."""
    with ExitStack() as stack:
        found: list[Writing] = []
        for _ in range(number):
            output, subscriber = make(), stack.enter_context(setup.broadcaster.subscribe(setup.everything))
            write = subscriber.write_all(output, attrgetter("chunk"), counted.append)
            found.append((output, subscriber, asyncio.create_task(write)))
        yield found
        for _, _, task in found:
            task.cancel()


def test_outputs_at_one_position_share_the_same_bytes() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        counted: list[int] = []
        with writing(setup, DELIVERIES_AT_ONCE, counted) as subscribers:
            snapshots = [await output.next() for output, _, _ in subscribers]
            assert all(snapshot is snapshots[0] for snapshot in snapshots)
            setup.announce(11.0)
            chunks = [await without_heartbeat(output) for output, _, _ in subscribers]
            assert b'"price":11.0' in chunks[0]
            assert all(chunk is chunks[0] for chunk in chunks)
            assert min(counted) >= DELIVERIES_AT_ONCE, "counted for all at once"

    run(test)


class CostlyOutput(MemoryOutput):
    """An output to which each write takes CPU time."""

    def write(self, data: bytes) -> None:
        super().write(data)
        end = time.thread_time() + 0.0001
        while time.thread_time() < end:
            pass


def test_passes_to_many_outputs_take_a_limited_share_of_a_core() -> None:
    """With ticks all the time: what one process needs besides fits into half a core."""

    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with writing(setup, DELIVERIES_AT_ONCE, [], CostlyOutput) as subscribers:
            for output, _, _ in subscribers:
                await output.next()
            began, cpu_began, passes = time.monotonic(), time.thread_time(), 0
            while (elapsed := time.monotonic() - began) < 1:
                setup.announce(11.0, age_ms=400 - passes)
                await subscribers[-1][0].next()
                passes += 1
            assert (time.thread_time() - cpu_began) / elapsed < 0.4

    run(test)


def test_full_output_receives_the_newest_price_once_drained() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with writing(setup, 2, []) as [(slow, _, _), (fast, _, _)]:
            await slow.next()
            await fast.next()
            slow.set_writable(False)
            for price in (11.0, 12.0, 13.0):
                setup.announce(price, age_ms=100 - int(price))
                assert b'"price":%.1f' % price in await without_heartbeat(fast)
            assert not slow.written
            slow.set_writable(True)
            chunk = await without_heartbeat(slow)
            assert b'"price":13.0' in chunk
            assert b'"price":1' not in chunk.replace(b'"price":13.0', b"")

    run(test)


def test_writing_ends_after_the_last_event() -> None:
    async def test(setup: Setup) -> None:
        with writing(setup, 1, []) as [(output, _, task)]:
            await output.next()
            setup.broadcaster.end()
            async with asyncio.timeout(5):
                await task
            assert b"event: end" in output.written[-1]
            assert output.on_change is None

    run(test)


def test_closed_output_ends_its_subscriber_at_once() -> None:
    async def test(setup: Setup) -> None:
        with writing(setup, 1, []) as [(output, _, task)]:
            await output.next()
            output.is_closed = True
            assert output.on_change is not None
            output.on_change()
            async with asyncio.timeout(1):
                await task

    run(test)


def test_reply_to_a_closed_output_ends_its_subscriber() -> None:
    """The connection whose task awaits the reply would otherwise stay for as long as it lasts."""

    async def test(setup: Setup) -> None:
        with writing(setup, 1, []) as [(output, subscriber, task)]:
            await output.next()
            output.is_closed = True
            async with asyncio.timeout(5):
                await subscriber.reply(Subscribed([], [], []))
                await task
            assert not output.written

    run(test)


def test_reply_is_written_before_the_snapshot_that_follows() -> None:
    async def test(setup: Setup) -> None:
        with writing(setup, 1, []) as [(output, subscriber, _)]:
            await output.next()
            subscriber.subscribe(setup.broadcaster.subscription(frozenset({("exchange1", "BTCUSDT")})))
            await subscriber.reply(Subscribed(["BTCUSDT"], ["exchange1"], [("exchange1", "BTCUSDT")]))
            chunk = await output.next()
            assert chunk.index(b"event: subscribed") < chunk.index(b"event: snapshot")

    run(test)
