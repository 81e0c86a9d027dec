"""A change of `redis.buckets` on a real Redis Cluster: keys move to their new buckets, and nobody mixes two numbers."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TypeVar

import pytest
import redis

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candles, Series, Slot, Tick, candle_of, merge
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.buckets.bucketed_cache import BucketedCache
from marketflow.stores.redis.buckets.bucketed_writer import BucketedWriter
from marketflow.stores.redis.connection import cluster_keywords
from marketflow.tasks import cancel
from tests.stores.test_redis import NOW, SetClock
from tests.stores.test_redis_buckets import SERIES, SLICES, TICKS, until
from tests.support.market import MINUTE
from tests.support.redis_cluster import RedisCluster
from tests.support.servers import HOST, wait_until

T = TypeVar("T")

HOUR_BEFORE = MINUTE - 60 * MINUTE_MS
OF_HOUR_BEFORE = {Slot(series, HOUR_BEFORE): candle_of(Tick(50.0, HOUR_BEFORE, 1)) for series in SERIES}
MINUTES = SLICES | OF_HOUR_BEFORE


@contextmanager
def writer_of(cluster: RedisCluster, buckets: int, series: list[Series] = SERIES) -> Iterator[BucketedWriter]:
    place = cluster_keywords([(HOST, cluster.nodes[-1].port)], buckets, "")
    with closing(BucketedWriter.connect(place, series, SetClock(), 70)) as writer:
        yield writer


def ask(cluster: RedisCluster, buckets: int, question: Callable[[BucketedCache], Awaitable[T]]) -> T:
    async def answer() -> T:
        place = cluster_keywords([(HOST, cluster.nodes[-1].port)], buckets, "")
        cache = BucketedCache.connect(place, SetClock(), 10_000)
        try:
            return await question(cache)
        finally:
            await cache.close()

    return asyncio.run(answer())


def end_of_all(cluster: RedisCluster) -> None:
    """Wait until no process counts as running."""
    with cluster.client() as client:
        wait_until(lambda: not client.exists("marketflow:{control}:buckets:held"), 10)


def fill(cluster: RedisCluster, buckets: int) -> None:
    with writer_of(cluster, buckets) as writer:  # its end waits for what is late
        writer.recover()
        writer.put_newest(TICKS)
        writer.put_slices(SLICES)
        writer.put_minutes(MINUTES)
        writer.put_complete_until("exchange1", {"COIN1": NOW, "COIN2": NOW + 1})
        assert not writer.needs_refill()


def assert_has_everything(cluster: RedisCluster, buckets: int, writer: BucketedWriter) -> None:
    assert writer.recover().slices == SLICES
    assert writer.unarchived([LEAD], lambda _: LEAD) == MINUTES
    assert writer.complete_until("exchange1") == {"COIN1": NOW, "COIN2": NOW + 1}
    assert ask(cluster, buckets, lambda cache: cache.newest(SERIES)) == list(TICKS.values())
    found = ask(cluster, buckets, lambda cache: cache.summary(SERIES, MINUTE, NOW))
    assert [candle and candle.close for candle in found] == [candle.close for candle in SLICES.values()]


@pytest.mark.parametrize(("before", "after"), [(16, 5), (5, 16), (8, 16), (16, 8), (1, 4)])
def test_keys_move_to_another_number_of_buckets(redis_cluster: RedisCluster, before: int, after: int) -> None:
    """And back: what is left in the buckets of before is of no account."""
    fill(redis_cluster, before)
    for buckets in (after, before):
        end_of_all(redis_cluster)
        with writer_of(redis_cluster, buckets) as writer:
            assert_has_everything(redis_cluster, buckets, writer)
    with redis_cluster.client() as client:
        windows = list(client.scan_iter("*:window", target_nodes="primaries"))
    assert len(windows) == len(SERIES)


def test_series_that_are_no_longer_configured_move_too(redis_cluster: RedisCluster) -> None:
    fill(redis_cluster, 16)
    end_of_all(redis_cluster)
    with writer_of(redis_cluster, 5, []) as writer:
        assert writer.recover().slices == SLICES


def test_move_that_failed_is_finished_later(redis_cluster: RedisCluster) -> None:
    fill(redis_cluster, 16)
    end_of_all(redis_cluster)
    with writer_of(redis_cluster, 5) as writer:
        with redis_cluster.frozen(redis_cluster.owner_of("{b13}")):
            with pytest.raises(Unavailable):
                writer.recover()
            assert not writer.recovered
        assert_has_everything(redis_cluster, 5, writer)


def test_writer_with_another_number_is_refused_while_one_runs(redis_cluster: RedisCluster) -> None:
    fill(redis_cluster, 16)
    with writer_of(redis_cluster, 16) as running, writer_of(redis_cluster, 5) as other:
        running.recover()
        with pytest.raises(Unavailable, match=r"redis\.buckets is 5.*16.*deploy/README"):
            other.recover()
        assert not running.needs_refill()
        assert_has_everything(redis_cluster, 16, running)


def test_writer_that_was_frozen_over_a_change_writes_once_it_may(redis_cluster: RedisCluster) -> None:
    fill(redis_cluster, 16)
    with writer_of(redis_cluster, 16) as frozen, writer_of(redis_cluster, 5) as other:
        frozen.recover()
        end_of_all(redis_cluster)
        other.recover()

        def is_refused() -> bool:
            assert not frozen.needs_refill()
            return not frozen.complete

        wait_until(is_refused, 5)
        refused = {Slot(series, MINUTE + 200): candle_of(Tick(2.0, MINUTE + 201, 99)) for series in SERIES}
        with pytest.raises(Unavailable, match=r"redis\.buckets"):
            frozen.put_slices(refused)
        with pytest.raises(Unavailable, match=r"redis\.buckets"):
            frozen.put_newest(TICKS)
        later = {Slot(series, MINUTE + 100): candle_of(Tick(1.0, MINUTE + 101, 99)) for series in SERIES}
        other.put_slices(later)
        other.close()

        def goes_on() -> bool:
            if frozen.needs_refill():
                frozen.put_slices(frozen.unwritten.all())
            return frozen.complete

        wait_until(goes_on, 10)
        assert frozen.recover().slices == SLICES | refused | later


def test_reader_with_another_number_answers_nothing(redis_cluster: RedisCluster) -> None:
    """Also from its copies, which nobody keeps up to date."""
    fill(redis_cluster, 16)

    async def changed(cache: BucketedCache) -> None:
        listening = asyncio.create_task(cache.listen())
        async with asyncio.timeout(20):
            with cache.announcing(lambda _: None):
                await until(lambda: cache.live)
                assert await cache.newest(SERIES) == cache.newest_in_memory(SERIES) == list(TICKS.values())
                assert None not in await cache.summary(SERIES, MINUTE, NOW)
                await cache.ping()
                await asyncio.to_thread(move)
                with pytest.raises(Unavailable, match=r"redis\.buckets is 16.*5.*deploy/README"):
                    await cache.ping()
                await until(lambda: all(cache.newest_in_memory([series]) is None for series in SERIES))
                for series in SERIES:
                    assert cache.summary_in_memory([series], MINUTE, NOW) is None
                    with pytest.raises(Unavailable):
                        await cache.newest([series])
                    with pytest.raises(Unavailable):
                        await cache.summary([series], MINUTE, NOW)
                await asyncio.to_thread(move_back)
                with suppress(Unavailable):
                    await cache.ping()
                await cache.ping()
                await until(lambda: cache.live)
                assert await cache.newest(SERIES) == list(TICKS.values())
        await cancel(listening)

    def move() -> None:
        end_of_all(redis_cluster)
        with writer_of(redis_cluster, 5) as writer:
            writer.recover()

    def move_back() -> None:
        end_of_all(redis_cluster)
        with writer_of(redis_cluster, 16) as writer:
            writer.recover()

    ask(redis_cluster, 16, changed)


def test_more_complete_of_two_buckets_is_recovered(redis_cluster: RedisCluster) -> None:
    """Such as where a process wrote with another number before this was noticed."""
    more = {slot: merge(candle, candle_of(Tick(7.0, slot.start + 1, 9))) for slot, candle in SLICES.items()}
    with writer_of(redis_cluster, 16) as writer:
        writer.recover()
        writer.put_slices(SLICES)
    for number in (0, 15):  # before and after most others
        leave_elsewhere(redis_cluster, keys.Bucket(number), more)
    with writer_of(redis_cluster, 16) as writer:
        assert writer.recover().slices == more
    with writer_of(redis_cluster, 16) as writer:
        writer.recover()
        writer.put_minutes(more)
    for number in (0, 15):
        leave_elsewhere(redis_cluster, keys.Bucket(number), SLICES, keys.Bucket.minutes_key)
    with writer_of(redis_cluster, 16) as writer:
        assert writer.unarchived([LEAD], lambda _: LEAD) == more


def leave_elsewhere(
    cluster: RedisCluster,
    bucket: keys.Bucket,
    candles: Candles,
    key_of: Callable[[keys.Bucket, Series], str] = keys.Bucket.window_key,
) -> None:
    """Put candles into a bucket, whichever theirs is."""
    with cluster.client() as client:
        for (series, start), candle in candles.items():
            if keys.bucket_of(series.symbol, 16) != bucket.number:
                client.zadd(key_of(bucket, series), {codec.encode_candle(candle): start})
                client.zadd(bucket.series_key, {codec.encode_series(series): NOW})


def test_emptied_cluster_keeps_the_number_of_who_runs(redis_cluster: RedisCluster) -> None:
    fill(redis_cluster, 16)
    with writer_of(redis_cluster, 16) as running, writer_of(redis_cluster, 5) as other:
        running.recover()
        redis_cluster.flushall()

        def number() -> object:
            running.needs_refill()
            try:
                with redis_cluster.client() as client:
                    return client.get("marketflow:{control}:buckets")
            except redis.RedisError:
                return None

        wait_until(lambda: number() == b"16", 5)
        with pytest.raises(Unavailable, match=r"redis\.buckets"):
            other.recover()
