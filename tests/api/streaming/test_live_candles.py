"""Candles in the stream: running, closed once, corrected; equal to what /candles answers at the same moment."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketflow.api.problems import UnknownExchange, UnknownSymbol
from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candle_parameters import InvalidInterval
from marketflow.api.queries.known_holes import KnownHoles
from marketflow.api.queries.prices import PriceQueries
from marketflow.api.streaming.broadcaster import Broadcaster
from marketflow.api.streaming.candle_stream import live_candles
from marketflow.api.streaming.candle_stream.candle_series import (
    MOST_CANDLE_SERIES,
    CandleSeries,
    TooManySeries,
    candle_series_of,
)
from marketflow.api.streaming.subscriber import Subscriber
from marketflow.api.streaming.subscription import Subscription
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import (
    MINUTE_MS,
    REFERENCE,
    Candle,
    Hole,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge,
    merge_into,
    minute_start,
    slice_start,
)
from tests.api.streaming.test_broadcaster import Events, everything_else_ended, received
from tests.api.world import EXCHANGES, NOW, SYMBOLS, World, client_of, series

A, B, C = (series(exchange) for exchange in EXCHANGES)
MINUTE = minute_start(NOW)
CLOSED_AFTER_MS = 5_500
KEYS = ("symbol", "exchange", "interval")

Key = tuple[str, str | None, str, str]
"""Symbol, exchange, interval, opening time."""


class Setup:
    """A world whose clock a test moves, with a broadcaster, and what a client knows of the candles."""

    def __init__(self) -> None:
        self.world = world = World()
        self.prices = PriceQueries(world.cache, world.archive, lambda: world.now * NANOSECONDS_PER_MS)
        self.broadcaster = Broadcaster(
            EXCHANGES, SYMBOLS, world.mode, self.prices, world.health, world.announcements, 3,
            holes=KnownHoles(world, lambda: world.now / 1000),
        )  # fmt: skip
        self.sequence = 0
        self.known: dict[Key, dict[str, Any]] = {}
        self.closed: list[tuple[Key, int, int]] = []
        """Version and ticks of each closed candle that came; both rise with corrections."""

    def chosen(self, intervals: str = "1m", exchanges: str = "exchange1", symbols: str = "BTCUSDT") -> Subscription:
        names = self.world.context().names
        return self.broadcaster.subscription(
            frozenset(), candle_series_of(names, exchanges.split(), symbols.split(), intervals.split())
        )

    def tick(self, price: float, age_ms: int = 0, one: Series = A, announced: bool = True) -> None:
        """Store a tick as the pipeline does, and announce what it changes."""
        self.sequence += 1
        world, at = self.world, self.world.now - age_ms
        newest = Tick(price, at, self.sequence)
        piece = {Slot(one, slice_start(at)): candle_of(newest)}
        merge_into(world.cache.slices, piece)
        known = world.cache.newest_ticks.get(one)
        is_newest = known is None or newest.order > known.order
        if is_newest:
            world.cache.newest_ticks[one] = newest
        if announced and is_newest:
            world.announcements.announce((one, newest))
        if announced:
            world.announcements.announce_slots(dict.fromkeys(piece))

    def archive(self, minute: int, one: Series = A) -> None:
        """Close a minute: a row of the archive, and a minute of the cache."""
        parts = [
            candle for slot, candle in self.world.cache.slices.items()
            if slot.series == one and minute_start(slot.start) == minute
        ]  # fmt: skip
        if parts:
            whole = parts[0]
            for part in parts[1:]:
                whole = merge(whole, part)
            self.put_minute(minute, whole, one)

    def put_minute(self, minute: int, candle: Candle, one: Series = A, in_archive: bool = True) -> None:
        slot = Slot(one, minute)
        self.world.cache.minutes[slot] = candle
        if in_archive:
            self.world.archive.minutes[slot] = candle
        self.world.announcements.announce_slots({slot: candle})

    def note(self, events: Events) -> list[dict[str, Any]]:
        """Take events as a client does; return their candles."""
        found = []
        for name, data in events:
            for each in data.get("candles", ()):
                key = (each["symbol"], each["exchange"], each["interval"], each["time"])
                self.known[key] = each
                found.append(each)
                if each["closed"] and name == "candles":
                    self.closed.append((key, each["version"], each["ticks"]))
        return found

    async def next(self, subscriber: Subscriber) -> list[dict[str, Any]]:
        while True:
            if found := self.note(await received(subscriber)):
                return found

    async def until(self, subscriber: Subscriber, condition: Callable[[list[dict[str, Any]]], object]) -> None:
        async with asyncio.timeout(5):
            while not condition(await self.next(subscriber)):
                pass

    async def answered(self, interval: str, exchange: str | None, symbol: str = "BTCUSDT") -> list[dict[str, Any]]:
        """What /candles answers now."""
        path = "/".join(["/candles", *([exchange] if exchange else []), symbol])
        async with client_of(self.world.context()) as client:
            response = await client.get(path, params={"interval": interval, "limit": 4})
        candles: list[dict[str, Any]] = response.json()["candles"]
        return candles


def run(test: Callable[[Setup], Awaitable[None]]) -> None:
    async def running() -> None:
        await test(Setup())
        await everything_else_ended()

    asyncio.run(running())


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test need not wait for."""
    monkeypatch.setattr(live_candles, "PASS_SECONDS", 0.01)
    monkeypatch.setattr(live_candles, "CORRECTION_SECONDS", 0.01)


def brief(candles: list[dict[str, Any]]) -> list[tuple[str, float, bool]]:
    return [(each["time"][14:19], each["close"], each["closed"]) for each in candles]


def test_snapshot_has_running_and_last_closed_candle() -> None:
    async def test(setup: Setup) -> None:
        for age_ms, price in ((200_000, 8.0), (90_000, 9.0), (500, 10.0)):
            setup.world.trade(price, age_ms)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            [(name, snapshot)] = await received(subscriber)
            assert name == "snapshot"
            assert brief(snapshot["candles"]) == [("59:00", 9.0, True), ("00:00", 10.0, False)]
            assert (snapshot["symbols"], snapshot["exchanges"]) == (["BTCUSDT"], ["exchange1"])
            assert snapshot["prices"] == []
            answered = await setup.answered("1m", "exchange1")
            assert [{k: v for k, v in each.items() if k not in KEYS} for each in snapshot["candles"]] == answered[-2:]

    run(test)


def test_running_candle_follows_each_tick() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with setup.broadcaster.subscribe(setup.chosen("1m 1h")) as subscriber:
            await received(subscriber)
            setup.tick(12.0)
            candles = await setup.next(subscriber)
            assert [(each["interval"], each["high"], each["ticks"]) for each in candles] == [
                ("1m", 12.0, 2),
                ("1h", 12.0, 2),
            ]

    run(test)


def test_slow_client_receives_only_the_newest_version() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 30_000)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await received(subscriber)
            for number in range(50):
                setup.tick(11.0 + number, 1_000 - number)
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.1)
            [candle] = await setup.next(subscriber)
            assert (candle["close"], candle["ticks"]) == (60.0, 51)

    run(test)


def test_candle_is_closed_once_when_no_tick_can_change_it() -> None:
    async def test(setup: Setup) -> None:
        setup.tick(10.0, 500, announced=False)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await received(subscriber)
            setup.world.now = MINUTE + MINUTE_MS + 100
            setup.tick(11.0)
            await setup.until(subscriber, lambda found: brief(found) == [("01:00", 11.0, False)])
            setup.world.now = MINUTE + MINUTE_MS + CLOSED_AFTER_MS - 1
            setup.tick(9.0, CLOSED_AFTER_MS + 4)  # late, and accepted
            await setup.until(subscriber, lambda found: brief(found) == [("00:00", 9.0, False)])
            setup.archive(MINUTE)
            setup.world.now += 1
            await setup.until(subscriber, lambda found: brief(found) == [("00:00", 9.0, True)])
            setup.archive(MINUTE)  # written again
            for _ in range(3):
                setup.tick(12.0)
                await setup.next(subscriber)
            assert [key[3][14:19] for key, *_ in setup.closed] == ["00:00"]

    run(test)


@pytest.mark.parametrize("interval", ["1m", "1h", "1M"])
def test_corrected_minute_is_sent_again_with_its_version(interval: str) -> None:
    async def test(setup: Setup) -> None:
        setup.world.now = MINUTE + 2 * MINUTE_MS
        setup.tick(10.0, 2 * MINUTE_MS - 1, announced=False)
        setup.tick(11.0, 0, announced=False)
        setup.archive(MINUTE)
        with setup.broadcaster.subscribe(setup.chosen(interval)) as subscriber:
            await setup.next(subscriber)
            corrected = msgspec.structs.replace(
                setup.world.cache.minutes[Slot(A, MINUTE)], version=2, ticks=5, high=20.0
            )
            setup.put_minute(MINUTE, corrected)
            [candle] = await setup.next(subscriber)
            assert (candle["version"], candle["high"], candle["closed"]) == (2, 20.0, interval == "1m")

    run(test)


def test_minute_that_is_open_again_is_streamed_on() -> None:
    """The clock is set back by a minute and a half."""

    async def test(setup: Setup) -> None:
        setup.world.now = MINUTE + 2 * MINUTE_MS
        setup.tick(10.0, 2 * MINUTE_MS - 1, announced=False)
        setup.archive(MINUTE)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await setup.next(subscriber)
            setup.world.now = MINUTE + 30_000
            for price in (11.0, 12.0):
                setup.world.now += 1_000
                setup.tick(price)
                assert brief(await setup.next(subscriber)) == [("00:00", price, False)]

    run(test)


def test_clock_step_back_counts_no_minute_twice_without_the_archive() -> None:
    """Minutes that were read as rows are among those of the cache again."""

    async def test(setup: Setup) -> None:
        for minute in range(MINUTE - 8 * MINUTE_MS, MINUTE, MINUTE_MS):
            setup.tick(10.0, NOW - minute - 5, announced=False)
            setup.archive(minute)
        setup.tick(11.0, announced=False)
        with setup.broadcaster.subscribe(setup.chosen("1d")) as subscriber:
            [*_, candle] = await setup.next(subscriber)
            assert candle["ticks"] == 9
            setup.world.archive.away = True
            setup.world.now -= MINUTE_MS
            for ticks in range(10, 15):
                setup.tick(100.0 + ticks)
                [*_, candle] = await setup.next(subscriber)
                while candle["high"] < 100.0 + ticks:
                    [*_, candle] = await setup.next(subscriber)
                assert candle["ticks"] == ticks
                await asyncio.sleep(0.15)  # in which the rows are read

    run(test)


def test_corrected_old_minute_is_sent_once_the_archive_has_it() -> None:
    async def test(setup: Setup) -> None:
        old = MINUTE - 60 * MINUTE_MS
        tick = candle_of(Tick(10.0, old + 5, 1))
        for minute in range(old, MINUTE, MINUTE_MS):
            at = minute + 5
            setup.world.archive.minutes[Slot(A, minute)] = candle_of(Tick(10.0, at, 1))
        setup.tick(11.0, announced=False)
        with setup.broadcaster.subscribe(setup.chosen("1m 1h 1d")) as subscriber:
            await setup.next(subscriber)
            corrected = msgspec.structs.replace(tick, version=2, ticks=9, low=1.0)
            setup.put_minute(old, corrected, in_archive=False)
            await asyncio.sleep(0.2)
            setup.put_minute(old, corrected)
            seen: dict[str, tuple[int, float, bool]] = {}

            def note(found: list[dict[str, Any]]) -> bool:
                for each in found:
                    assert each["version"] == 2, each
                    seen[each["interval"]] = each["version"], each["low"], each["closed"]
                return len(seen) == 3

            await setup.until(subscriber, note)
            assert seen == {"1m": (2, 1.0, True), "1h": (2, 1.0, True), "1d": (2, 1.0, False)}

    run(test)


def test_verification_alone_sends_no_closed_candle_again() -> None:
    async def test(setup: Setup) -> None:
        setup.world.now = MINUTE + 2 * MINUTE_MS
        setup.tick(10.0, 2 * MINUTE_MS - 1, announced=False)
        setup.tick(11.0, announced=False)
        setup.archive(MINUTE)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await setup.next(subscriber)
            setup.put_minute(MINUTE, msgspec.structs.replace(setup.world.cache.minutes[Slot(A, MINUTE)], verified=True))
            setup.tick(12.0)
            assert brief(await setup.next(subscriber)) == [("02:00", 12.0, False)]

    run(test)


def test_resumed_client_receives_the_candles_it_missed() -> None:
    async def test(setup: Setup) -> None:
        setup.tick(10.0, 500, announced=False)
        subscription = setup.chosen()
        with setup.broadcaster.subscribe(subscription) as other:
            await received(other)
            with setup.broadcaster.subscribe(subscription) as subscriber:
                async with asyncio.timeout(5):
                    seen = (await subscriber.next()).messages[-1].id
            for number in range(1, 4):  # three candles come and go
                setup.world.now = MINUTE + number * MINUTE_MS + 10_000
                setup.tick(10.0 + number)
                await setup.until(other, lambda found: found[-1]["closed"] is False and found[0]["closed"])
            with setup.broadcaster.subscribe(subscription, seen) as subscriber:
                events = await received(subscriber)
                assert [name for name, _ in events] == ["candles"]
                assert brief(events[0][1]["candles"]) == [
                    ("00:00", 10.0, True), ("01:00", 11.0, True), ("02:00", 12.0, True), ("03:00", 13.0, False)
                ]  # fmt: skip

    run(test)


def test_client_that_resumes_alone_receives_a_snapshot() -> None:
    """Nobody has followed these candles meanwhile, so what it missed is not known."""

    async def test(setup: Setup) -> None:
        setup.tick(10.0, 500, announced=False)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            async with asyncio.timeout(5):
                seen = (await subscriber.next()).messages[-1].id
        with setup.broadcaster.subscribe(setup.chosen(), seen) as subscriber:
            assert [name for name, _ in await received(subscriber)] == ["snapshot"]

    run(test)


def test_mode_switch_begins_with_candles_of_the_other_mode() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        setup.world.trade(70.0, 500, A._replace(mode=Mode.LIVE))
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await received(subscriber)
            setup.world.mode.current = Mode.LIVE
            events: Events = []
            while not any(name == "snapshot" for name, _ in events):
                events += await received(subscriber, ("heartbeat", "health"))
            assert [name for name, _ in events] == ["mode", "snapshot"]
            assert [each["close"] for each in events[-1][1]["candles"]] == [70.0]

    run(test)


def test_candles_are_made_from_memory_while_announcements_are_unreliable() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            await received(subscriber)
            setup.world.redis = "down"
            setup.world.announcements.live = False
            for price in (11.0, 12.0):
                setup.tick(price, 0, announced=False)
                setup.world.now += 1
                assert (await setup.next(subscriber))[-1]["close"] == price

    run(test)


@pytest.mark.parametrize("down", ["cache", "archive", "both"])
def test_snapshot_comes_while_a_store_is_unavailable(down: str) -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(9.0, 600_000)
        setup.world.trade(10.0, 500)
        setup.world.cache.away = down != "archive"
        setup.world.archive.away = down != "cache"
        with setup.broadcaster.subscribe(setup.chosen("1h")) as subscriber:
            [(name, snapshot)] = await received(subscriber)
            closes = [each["close"] for each in snapshot["candles"]]
            assert (name, closes) == ("snapshot", {"cache": [9.0], "archive": [9.0, 10.0], "both": []}[down])
            assert not any(each["closed"] for each in snapshot["candles"][1:])
            if down == "cache":
                setup.world.cache.away = False
                assert (await setup.next(subscriber))[-1]["close"] == 10.0

    run(test)


def test_hole_marks_the_running_candle_incomplete() -> None:
    async def test(setup: Setup) -> None:
        setup.tick(10.0, 500, announced=False)
        with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
            [candle] = await setup.next(subscriber)
            assert candle["complete"] is None
            setup.world.missing = [Hole(A, 1, 3, MINUTE + 1, MINUTE + 2, NOW, NOW)]
            setup.world.now += 3_000
            [candle] = await setup.next(subscriber)
            assert candle["complete"] is False

    run(test)


def test_candles_cost_nothing_without_subscribers() -> None:
    async def test(setup: Setup) -> None:
        asked: list[None] = []
        setup.world.cache.by_minute = lambda *_: asked.append(None)  # type: ignore[assignment, method-assign]
        with setup.broadcaster.subscribe(setup.broadcaster.subscription(frozenset([("exchange1", "BTCUSDT")]))):
            await asyncio.sleep(0.3)
            assert not setup.world.announcements.slot_takers
            for price in (1.0, 2.0):
                setup.tick(price)
            await asyncio.sleep(0.1)
        assert not asked
        assert not setup.world.archive.queries > 1  # that of newest prices

    run(test)


def test_end_of_the_last_subscription_ends_the_work() -> None:
    async def test(setup: Setup) -> None:
        setup.world.trade(10.0, 500)
        prices = setup.broadcaster.subscription(frozenset([("exchange1", "BTCUSDT")]))
        with setup.broadcaster.subscribe(prices):
            with setup.broadcaster.subscribe(setup.chosen()) as subscriber:
                await received(subscriber)
                assert setup.world.announcements.slot_takers
            await asyncio.sleep(0.2)
            assert not setup.world.announcements.slot_takers

    run(test)


def test_wrong_names_and_too_many_series_are_refused() -> None:
    names = World().context().names
    for wanted, error in (
        ((["nobody"], [], []), UnknownExchange),
        (([], ["NONE"], []), UnknownSymbol),
        (([], [], ["7m"]), InvalidInterval),
    ):
        with pytest.raises(error):
            candle_series_of(names, *wanted)
    assert candle_series_of(names, [], ["btcusdt"], []) == {CandleSeries(None, "BTCUSDT", "1m")}
    assert candle_series_of(names, ["REFERENCE"], ["btcusdt"], ["1M"]) == {CandleSeries(REFERENCE, "BTCUSDT", "1M")}
    many = type(names)(["e"], [f"S{number}" for number in range(MOST_CANDLE_SERIES // 10 + 1)])
    with pytest.raises(TooManySeries, match="510"):
        candle_series_of(many, [], [], [*INTERVALS])


@pytest.mark.parametrize(
    ("query", "code"),
    [("intervals=7m", "invalid_interval"), ("exchanges=x", "unknown_exchange"), ("symbols=x", "unknown_symbol")],
)
def test_wrong_query_of_the_stream_is_refused(query: str, code: str) -> None:
    response = World().ask(f"/stream/candles?{query}")
    assert response.json()["code"] == code


def test_candle_stream_answers_server_sent_events() -> None:
    world = World()
    world.trade(10.0, 500)
    response = world.ask("/stream/candles?symbols=BTCUSDT&intervals=1m,1h&exchanges=reference")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")


# Equal to GET /candles, whatever happens

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("tick"), st.sampled_from(EXCHANGES), st.integers(1, 50), st.integers(0, 4_000)),
        st.tuples(st.just("wait"), st.integers(1, 400_000)),
        st.tuples(st.just("correct"), st.sampled_from(EXCHANGES), st.integers(0, 30), st.integers(1, 90)),
    ),
    min_size=1,
    max_size=25,
)


def close_minutes(setup: Setup) -> None:
    """Write the minutes that are due, as the pipeline does."""
    world = setup.world
    for one, minute in {(slot.series, minute_start(slot.start)) for slot in world.cache.slices}:
        held = world.archive.minutes.get(Slot(one, minute))
        ticks = sum(
            candle.ticks
            for slot, candle in world.cache.slices.items()
            if slot.series == one and minute_start(slot.start) == minute
        )
        if minute + MINUTE_MS + 2_000 <= world.now and (held is None or held.ticks < ticks):
            setup.archive(minute, one)


def apply(setup: Setup, step: tuple[Any, ...]) -> None:
    world = setup.world
    match step:
        case ("tick", exchange, price, age_ms):
            setup.tick(float(price), age_ms, series(exchange))
        case ("wait", milliseconds):
            world.now += milliseconds
            close_minutes(setup)
        case ("correct", exchange, added, minutes):
            one, minute = series(exchange), minute_start(world.now) - minutes * MINUTE_MS
            if minute + MINUTE_MS + CLOSED_AFTER_MS > world.now:
                return
            extra = candle_of(Tick(float(added + 1), minute + added, 0))
            held = world.archive.minutes.get(Slot(one, minute))
            more = extra if held is None else merge(held, extra)
            setup.put_minute(minute, msgspec.structs.replace(more, version=more.version + (held is not None)), one)


async def differences(setup: Setup, client: httpx.AsyncClient, chosen: Subscription) -> list[tuple[Any, Any]]:
    """What the client knows of the last candles, beside what is answered, where they differ."""
    found: list[tuple[Any, Any]] = []
    for exchange, symbol, interval in chosen.candles:
        path = "/".join(["/candles", *([exchange] if exchange else []), symbol])
        response = await client.get(path, params={"interval": interval, "limit": 5})
        answered: list[dict[str, Any]] = response.json()["candles"]
        for place, candle in enumerate(answered, 1):
            known = setup.known.get((symbol, exchange, interval, candle["time"]))
            if known is None and place < len(answered):
                continue  # older than the snapshot
            mine = {name: value for name, value in (known or {}).items() if name not in KEYS}
            if mine != candle:
                found.append((known, candle))
    return found


@pytest.mark.parametrize("seconds", [0.0, 0.05])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_last_streamed_candles_equal_the_answers(seconds: float, steps: list[tuple[Any, ...]]) -> None:
    """With a pause after each step, and without one.

    Args:
        seconds: pause after each step.
        steps: what happens.
    """

    async def test(setup: Setup) -> None:
        world = setup.world
        for minutes in (40_000, 20_000, 3_000, 200, 90, 30, 7, 3):
            at = world.now - minutes * MINUTE_MS
            slot = Slot(series(EXCHANGES[minutes % 3]), minute_start(at))
            world.cache.minutes[slot] = world.archive.minutes[slot] = candle_of(Tick(10.0 + minutes % 7, at, 0))
        chosen = setup.chosen(" ".join(INTERVALS), "exchange1 reference").candles
        merged = candle_series_of(world.context().names, [], ["BTCUSDT"], [*INTERVALS])
        subscription = setup.broadcaster.subscription(frozenset(), chosen | merged)
        async with client_of(world.context()) as client:
            with setup.broadcaster.subscribe(subscription) as subscriber:
                setup.note(await received(subscriber))
                for step in steps:
                    apply(setup, step)
                    await asyncio.sleep(seconds)
                deadline = time.monotonic() + 5
                while wrong := await differences(setup, client, subscription):
                    assert time.monotonic() < deadline, wrong
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.2):
                            setup.note(await received(subscriber))
                assert len(setup.closed) == len({*setup.closed}), "one version was closed twice"

    run(test)
