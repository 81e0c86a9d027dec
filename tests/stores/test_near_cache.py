"""A near cache answers as Redis does, at any moment, and asks it only when it has to."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge,
    merge_into,
    minute_start,
)
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.ports import RecentCandles
from marketflow.stores.redis import near_cache as near_caches
from marketflow.stores.redis.connection import connection_keywords as redis_keywords
from marketflow.stores.redis.near_cache import PING_SECONDS, SILENT_PINGS, NearCache
from marketflow.stores.redis.reader import RedisReader
from marketflow.stores.redis.writer import RedisWriter
from tests.support.market import BTC, ETH, MINUTE
from tests.support.servers import HOST, RedisServer, wait_until

T = TypeVar("T")
NOW = MINUTE + 30_000
LATER = MINUTE + 3 * MINUTE_MS
SERIES = [BTC, ETH]


def keywords(server: RedisServer) -> dict[str, Any]:
    return redis_keywords(HOST, server.port, server.password, 0)


def clock() -> int:
    return NOW * 1_000_000


class CountingReader(RedisReader):
    """Counts how often Redis is asked, and does something meanwhile."""

    asked = 0
    meanwhile: Callable[[], None] | None = None

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        self.asked += 1
        found = await super().newest(series)
        await self._go_on()
        return found

    async def everything(self, series: Series) -> RecentCandles:
        self.asked += 1
        found = await super().everything(series)
        await self._go_on()
        return found

    async def _go_on(self) -> None:
        if self.meanwhile is not None:
            await asyncio.to_thread(self.meanwhile)


class World:
    """A near cache with its writer."""

    def __init__(self, server: RedisServer, cache: RedisWriter, reader: CountingReader, near_cache: NearCache) -> None:
        self.server = server
        self.cache = cache
        self.reader = reader
        self.near_cache = near_cache

    async def until(self, condition: Callable[[], Awaitable[bool]], seconds: float = 5.0) -> None:
        async with asyncio.timeout(seconds):
            while not await condition():  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.002)

    async def is_live(self) -> None:
        async def live() -> bool:
            await self.near_cache.newest([])  # keeps the subscription
            return self.near_cache.live

        await self.until(live)

    async def is_up_to_date(self) -> None:
        """Wait until all announcements so far have arrived, by a tick of a series of its own."""
        tick = Tick(1.0, NOW, time.time_ns())
        mark = Series(Mode.TEST, "exchange1", "MARK")
        await self.near_cache.newest([mark])
        await asyncio.to_thread(self.cache.put_newest, {mark: tick})

        async def marked() -> bool:
            return await self.near_cache.newest([mark]) == [tick]

        await self.until(marked)


def run(server: RedisServer, test: Callable[[World], Awaitable[T]]) -> T:
    """Run a test with a live near cache."""

    async def answer() -> T:
        with closing(RedisWriter.connect(keywords(server), SERIES, clock, 300)) as cache:
            cache.recover()
            reader = CountingReader.connect(keywords(server), clock, 10_000)
            assert isinstance(reader, CountingReader)
            near_cache = NearCache(reader, keywords(server), clock)
            listening = asyncio.create_task(near_cache.listen())
            world = World(server, cache, reader, near_cache)
            try:
                await world.is_live()
                return await test(world)
            finally:
                listening.cancel()
                with suppress(asyncio.CancelledError):
                    await listening
                await near_cache.close()
                await reader.close()

    return asyncio.run(answer())


def test_writes_to_another_redis_database_are_not_received(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        mine, foreign = Tick(1.0, NOW, 1), Tick(2.0, NOW + 1, 2)
        await asyncio.to_thread(world.cache.put_newest, {BTC: mine})
        assert await world.near_cache.newest([BTC]) == [mine]
        with closing(RedisWriter.connect(keywords(redis_db) | {"db": 1}, SERIES, clock, 300)) as other:
            other.recover()
            other.put_newest({BTC: foreign})
        await world.is_up_to_date()
        assert await world.near_cache.newest([BTC]) == [mine]

    run(redis_db, test)


def slot(series: Series, tick: Tick) -> Slot:
    return Slot(series, tick.at - tick.at % SLICE_MS)


@pytest.fixture
def own_redis(server_folder: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, which it may break."""
    with RedisServer(server_folder / "redis") as server:
        yield server


def test_newest_ticks_are_updated_without_another_read(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        assert await world.near_cache.newest(SERIES) == [None, None]
        for sequence in range(5):
            tick = Tick(100.0 + sequence, NOW, sequence)
            await asyncio.to_thread(world.cache.put_newest, {BTC: tick})
            await world.is_up_to_date()
            asked = world.reader.asked
            assert await world.near_cache.newest(SERIES) == [tick, None]
            assert world.reader.asked == asked

    run(redis_db, test)


@pytest.mark.parametrize("near", [True, False])
def test_newer_tick_of_this_process_replaces_the_cached_one_in_periods(redis_db: RedisServer, near: bool) -> None:
    """The cached one may be of a killed run, whose slice is lost; it does not count beside the newer one."""
    cached, newer = Tick(1.0, NOW - 300, 1), Tick(2.0, NOW - 100, 2)

    async def test(world: World) -> None:
        await asyncio.to_thread(world.cache.put_newest, {BTC: cached, ETH: newer})
        await asyncio.to_thread(world.cache.put_slices, {slot(ETH, newer): candle_of(newer)})
        cache = world.near_cache if near else world.reader
        world.reader.newest_in_process = lambda _: {BTC: newer, ETH: cached}
        assert await cache.newest(SERIES) == [newer, newer]
        for _ in range(2):  # by reading Redis, and by what was read
            assert await cache.summary(SERIES, NOW - 1000, NOW) == [candle_of(newer)] * 2
            assert await cache.by_minute(SERIES, MINUTE, NOW) == [{MINUTE: candle_of(newer)}] * 2
        assert cache.newest_in_memory(SERIES) == ([newer, newer] if near else None)

    run(redis_db, test)


TICKS = st.lists(
    st.builds(Tick, st.integers(1, 5).map(float), st.integers(NOW - 3 * MINUTE_MS, NOW + 2_000), st.integers(1, 99)),
    max_size=12,
)


@given(
    st.lists(st.tuples(st.sampled_from(SERIES), TICKS), max_size=4),
    st.lists(st.integers(1, RECENT_MS), min_size=1, max_size=4),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mirror_answers_as_redis_does(
    redis_db: RedisServer, batches: list[tuple[Series, list[Tick]]], periods: list[int]
) -> None:
    async def test(world: World) -> None:
        slices: dict[Slot, Candle] = {}
        minutes: dict[Slot, Candle] = {}
        for series, ticks in batches:
            for tick in ticks:
                merge_into(slices, {slot(series, tick): candle_of(tick)})
                merge_into(minutes, {Slot(series, minute_start(tick.at)): candle_of(tick)})
            await asyncio.to_thread(world.cache.put_slices, slices)
            await asyncio.to_thread(world.cache.put_minutes, minutes)
            if ticks:
                await asyncio.to_thread(world.cache.put_newest, {series: ticks[-1]})
            await world.is_up_to_date()
            for since in [NOW - period for period in periods]:
                expected = await world.reader.summary(SERIES, since, LATER)
                assert await world.near_cache.summary(SERIES, since, LATER) == expected
                assert world.near_cache.summary_in_memory(SERIES, since, LATER) == expected
                assert world.near_cache.newest_in_memory(SERIES) == await world.reader.newest(SERIES)
                by_minute = await world.reader.by_minute(SERIES, minute_start(since), LATER)
                assert await world.near_cache.by_minute(SERIES, minute_start(since), LATER) == by_minute

    with redis_db.client() as client:
        client.flushdb()
    run(redis_db, test)


def test_minutes_are_answered_without_another_read(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        ticks = [Tick(1.0, MINUTE - 1, 1), Tick(2.0, MINUTE, 2), Tick(3.0, NOW, 3)]
        for tick in ticks[:2]:
            await asyncio.to_thread(world.cache.put_slices, {slot(BTC, tick): candle_of(tick)})
        since = minute_start(NOW) - RECENT_MS
        await world.near_cache.by_minute(SERIES, since, LATER)
        await asyncio.to_thread(world.cache.put_newest, {BTC: ticks[2]})
        await world.is_up_to_date()
        asked = world.reader.asked
        running = merge(candle_of(ticks[1]), candle_of(ticks[2]))
        minutes = {MINUTE - MINUTE_MS: candle_of(ticks[0]), MINUTE: running}
        assert await world.near_cache.by_minute(SERIES, since, LATER) == [minutes, {}]
        assert await world.near_cache.by_minute(SERIES, MINUTE, LATER) == [{MINUTE: running}, {}]
        assert world.reader.asked == asked

    run(redis_db, test)


def test_writes_during_the_first_read_are_not_missed(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        first, second = Tick(1.0, NOW - 5_000, 1), Tick(2.0, NOW - 1_000, 2)
        await asyncio.to_thread(world.cache.put_slices, {slot(BTC, first): candle_of(first)})

        def write() -> None:
            world.reader.meanwhile = None
            world.cache.put_slices({slot(BTC, second): candle_of(second)})
            world.cache.put_newest({BTC: second})

        world.reader.meanwhile = write
        await world.near_cache.summary([BTC], NOW - 10_000, LATER)
        await world.is_up_to_date()
        whole = merge(candle_of(first), candle_of(second))
        assert await world.near_cache.summary([BTC], NOW - 10_000, LATER) == [whole]
        assert await world.near_cache.newest([BTC]) == [second]

    run(redis_db, test)


def test_many_requests_for_a_series_share_one_reading_of_it(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        await world.near_cache.newest([BTC])
        before = world.reader.asked
        requests = [asyncio.create_task(world.near_cache.summary([BTC], NOW - 1_000, LATER)) for _ in range(16)]
        await asyncio.sleep(0)
        requests[0].cancel()  # the one that started the read
        await asyncio.gather(*requests[1:])
        assert world.reader.asked == before + 1

    run(redis_db, test)


def test_memory_answers_once_everything_was_read(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        tick = Tick(1.0, NOW, 1)
        await asyncio.to_thread(world.cache.put_newest, {BTC: tick})
        cache = world.near_cache
        held: list[tuple[object, object]] = []

        def ask() -> None:
            held.append((cache.newest_in_memory(SERIES), cache.summary_in_memory(SERIES, NOW - 1_000, LATER)))

        ask()
        world.reader.meanwhile = ask
        await cache.newest([BTC])
        await cache.newest([ETH])
        await cache.summary([BTC], NOW - 1_000, LATER)
        await cache.summary([ETH], NOW - 1_000, LATER)
        world.reader.meanwhile = None
        assert held == [(None, None)] * 3 + [([tick, None], None)] * 2
        asked = world.reader.asked
        assert cache.newest_in_memory(SERIES) == [tick, None]
        assert cache.summary_in_memory(SERIES, NOW - 1_000, LATER) == [candle_of(tick), None]
        assert cache.summary_in_memory(SERIES, NOW - 2 * RECENT_MS, LATER) is None
        found = cache.summary_in_memory(SERIES, NOW - 1_000, LATER)
        assert found is cache.summary_in_memory(SERIES, NOW - 1_000, LATER)
        assert found is not cache.summary_in_memory(SERIES, NOW - 1_001, LATER)
        assert world.reader.asked == asked
        await asyncio.to_thread(world.cache.put_newest, {BTC: Tick(2.0, NOW, 2)})
        await world.is_up_to_date()
        assert found is not cache.summary_in_memory(SERIES, NOW - 1_000, LATER)

    run(redis_db, test)


def test_what_was_announced_while_the_connection_was_broken_is_read(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        tick = Tick(1.0, NOW, 0)
        whole = candle_of(tick)
        await world.near_cache.summary([BTC], NOW - 1_000, LATER)
        with world.server.client() as client:
            for number in range(1, 20):
                assert client.client_kill_filter(_type="pubsub") >= 0
                tick = Tick(float(number), NOW, number)
                whole = merge(whole, candle_of(tick))
                world.cache.put_newest({BTC: tick})
                world.cache.put_slices({slot(BTC, tick): whole})

                async def right(tick: Tick = tick, whole: Candle = whole) -> bool:
                    known = await world.near_cache.newest([BTC])
                    candle = await world.near_cache.summary([BTC], NOW - 1_000, LATER)
                    return known == [tick] and candle == [whole]

                await world.until(right)

    run(redis_db, test)


def test_a_server_that_falls_silent_is_not_believed_for_long(own_redis: RedisServer) -> None:
    async def test(world: World) -> None:
        await world.near_cache.summary([BTC], NOW - 1_000, LATER)
        assert world.near_cache.newest_in_memory([BTC]) == [None]
        assert world.near_cache.summary_in_memory([BTC], NOW - 1_000, LATER) == [None]
        world.server.pause()
        try:

            async def noticed() -> bool:
                return not world.near_cache.live

            await world.until(noticed, SILENT_PINGS * PING_SECONDS + 2)
            assert world.near_cache.newest_in_memory([BTC]) is None
            assert world.near_cache.summary_in_memory([BTC], NOW - 1_000, LATER) is None
            with pytest.raises(Unavailable):
                await world.near_cache.newest([BTC])
        finally:
            world.server.resume()
        await world.is_live()
        assert await world.near_cache.newest([BTC]) == [None]

    run(own_redis, test)


def test_subscription_ends_without_queries(redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_caches, "IDLE_SECONDS", 0.2)

    async def test(world: World) -> None:
        async def rests() -> bool:
            return not world.near_cache.live

        for number in range(2):
            tick = Tick(1.0 + number, NOW, number)
            await asyncio.to_thread(world.cache.put_newest, {BTC: tick})
            assert await world.near_cache.newest([BTC]) == [tick]
            await world.is_live()
            await world.until(rests)

    run(redis_db, test)


def test_listener_gets_all_newest_ticks_of_the_one_subscription(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near_caches, "IDLE_SECONDS", 0.2)

    async def test(world: World) -> None:
        taken: list[tuple[Series, Tick]] = []

        async def arrived(tick: Tick) -> None:
            await asyncio.to_thread(world.cache.put_newest, {ETH: tick})

            async def came() -> bool:
                return taken[-2:] == [(ETH, tick)] * 2

            await world.until(came)

        with world.near_cache.announcing(taken.extend), world.near_cache.announcing(taken.extend):
            for number in range(10):
                await arrived(Tick(1.0 + number, NOW, number))
                await asyncio.sleep(0.05)  # longer in all than a subscription without queries lasts
            with world.server.client() as client:
                assert len(client.client_list(_type="pubsub")) == 1
                assert client.client_kill_filter(_type="pubsub") == 1
            before = world.near_cache.times_live

            async def again() -> bool:
                return world.near_cache.live and world.near_cache.times_live == before + 1

            await world.until(again)
            await arrived(Tick(50.0, NOW, 50))

        async def rests() -> bool:
            return not world.near_cache.live

        await world.until(rests)

    run(redis_db, test)


def test_outage_reads_redis_and_a_new_server_is_copied(own_redis: RedisServer) -> None:
    async def test(world: World) -> None:
        await asyncio.to_thread(own_redis.kill)

        async def noticed() -> bool:
            return not world.near_cache.live

        await world.until(noticed)
        with pytest.raises(Unavailable):
            await world.near_cache.newest([BTC])
        await asyncio.to_thread(own_redis.start)
        await world.is_live()
        assert await world.near_cache.newest([BTC]) == [None]

    run(own_redis, test)


def test_failed_read_fails_all_waiting_requests_and_is_retried(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        def fail() -> None:
            raise Unavailable("unavailable for a moment")

        await world.near_cache.newest([BTC])
        world.reader.meanwhile = fail
        failed = await asyncio.gather(
            *(world.near_cache.summary([BTC], NOW - 1_000, LATER) for _ in range(3)), return_exceptions=True
        )
        assert [type(each) for each in failed] == [Unavailable] * 3
        world.reader.meanwhile = None
        assert await world.near_cache.summary([BTC], NOW - 1_000, LATER) == [None]

    run(redis_db, test)


def test_least_recently_queried_series_is_evicted(redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_caches, "MAX_SLICES", 15)

    async def test(world: World) -> None:
        for series in SERIES:
            ticks = [Tick(1.0, NOW - number * SLICE_MS, 1) for number in range(10)]
            await asyncio.to_thread(world.cache.put_slices, {slot(series, tick): candle_of(tick) for tick in ticks})

        async def reads(series: Series) -> int:
            before = world.reader.asked
            (candle,) = await world.near_cache.summary([series], NOW - 60_000, LATER)
            assert candle is not None
            assert candle.ticks == 10
            return world.reader.asked - before

        await world.near_cache.newest(SERIES)
        assert [await reads(series) for series in (BTC, BTC, ETH, ETH, BTC)] == [1, 0, 1, 0, 1]

    run(redis_db, test)


def test_message_of_another_version_drops_the_copy(redis_db: RedisServer) -> None:
    async def test(world: World) -> None:
        await world.near_cache.newest([BTC])
        with world.server.client() as client, suppress(redis.RedisError):
            client.publish("marketflow:{changes}:newest", b"?")

        async def noticed() -> bool:
            return not world.near_cache.live

        await world.until(noticed)
        await world.is_live()

    run(redis_db, test)


def test_window_read_across_a_lost_connection_is_not_kept(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table of the next subscription it would lack what was written until that one stood."""
    monkeypatch.setattr(near_caches, "RETRY_SECONDS", 0.5)
    slot = Slot(BTC, NOW - 500)

    async def test(world: World) -> None:
        def lose_connection() -> None:
            world.reader.meanwhile = None
            with redis_db.client() as client:
                client.client_kill_filter(_type="pubsub")
            wait_until(lambda: not world.near_cache.live)

        async def put(price: float, ticks: int) -> Candle:
            candle = Candle(
                price, price, price, price, price * ticks, ticks, slot.start, slot.start, slot.start, slot.start, 1, 2
            )
            await asyncio.to_thread(world.cache.put_slices, {slot: candle})
            return candle

        before = await put(100.0, 2)
        world.reader.meanwhile = lose_connection
        assert await world.near_cache.summary([BTC], NOW - 1_000, LATER) == [before]
        assert not world.near_cache.live
        after = await put(999.0, 3)
        await world.is_live()
        assert await world.near_cache.summary([BTC], NOW - 1_000, LATER) == [after]

    run(redis_db, test)


def test_listener_gets_changed_slots_once_they_are_read(redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near_caches, "IDLE_SECONDS", 0.2)

    async def test(world: World) -> None:
        taken: dict[Slot, Candle | None] = {}
        read: list[object] = []
        near_cache = world.near_cache

        def take(slots: Sequence[tuple[Slot, Candle | None]]) -> None:
            taken.update(slots)
            read.append(near_cache.summary_in_memory([BTC], NOW - 1_000, LATER))

        tick = Tick(1.0, NOW, 1)
        minute = Slot(BTC, MINUTE - 5 * MINUTE_MS)
        with near_cache.announcing_slots(take):
            await near_cache.summary([BTC], NOW - 1_000, LATER)
            await asyncio.sleep(0.5)  # longer than a subscription without queries lasts
            await asyncio.to_thread(world.cache.put_slices, {slot(BTC, tick): candle_of(tick)})
            await asyncio.to_thread(world.cache.put_minutes, {minute: candle_of(tick._replace(at=minute.start))})

            async def came() -> bool:
                return len(taken) == 2

            await world.until(came)
        assert taken == {slot(BTC, tick): None, minute: candle_of(tick._replace(at=minute.start))}
        assert read[0] == [candle_of(tick)], "the cache was read before it had the slice"

    run(redis_db, test)
