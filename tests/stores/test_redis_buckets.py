"""The cache on a real Redis Cluster: writes, reads and announcements by bucket, and the recovery of each."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import pytest
import redis

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Mode, Series, Slot, Tick, candle_of
from marketflow.settings.shards import LEAD
from marketflow.stores.redis import codec
from marketflow.stores.redis.buckets.bucketed_cache import BucketedCache
from marketflow.stores.redis.buckets.bucketed_writer import BucketedWriter
from marketflow.stores.redis.connection import cluster_keywords, connection_keywords, sync_client
from marketflow.stores.redis.keys import Bucket, bucket_of
from marketflow.tasks import cancel
from tests.stores.test_redis import NOW, SetClock
from tests.support.market import MINUTE
from tests.support.redis_cluster import RedisCluster
from tests.support.servers import HOST, RedisServer, free_port, wait_until

T = TypeVar("T")

BUCKETS = 16
SERIES = [Series(Mode.LIVE, exchange, f"COIN{n}") for exchange in ("exchange1", "exchange2") for n in range(40)]
TICKS = {series: Tick(100.0 + n, NOW, n + 1) for n, series in enumerate(SERIES)}
SLICES = {Slot(series, MINUTE): candle_of(Tick(100.0 + n, MINUTE, n + 1)) for n, series in enumerate(SERIES)}


def keywords(cluster: RedisCluster) -> dict[str, Any]:
    return cluster_keywords([("127.0.0.1", cluster.nodes[-1].port)], BUCKETS, "")


@contextmanager
def writer_of(place: dict[str, Any]) -> Iterator[BucketedWriter]:
    with closing(BucketedWriter.connect(place, SERIES, SetClock(), 70)) as writer:
        yield writer


@pytest.fixture
def writer(redis_cluster: RedisCluster) -> Iterator[BucketedWriter]:
    with writer_of(keywords(redis_cluster)) as writer:
        writer.recover()
        yield writer


def test_closed_writer_of_a_cluster_is_unavailable() -> None:
    writer = BucketedWriter.connect(cluster_keywords([(HOST, free_port())], BUCKETS, ""), SERIES, SetClock(), 70)
    writer.close()
    for call in (
        lambda: writer.put_newest(TICKS),
        lambda: writer.put_slices(SLICES),
        lambda: writer.mark_archived(MINUTE, [LEAD]),
        writer.needs_refill,
    ):
        with pytest.raises(Unavailable):
            call()


def ask(cluster: RedisCluster, question: Callable[[BucketedCache], Awaitable[T]]) -> T:
    async def answer() -> T:
        cache = BucketedCache.connect(keywords(cluster), SetClock(), 10_000)
        try:
            return await question(cache)
        finally:
            await cache.close()

    return asyncio.run(answer())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - of another process
        await asyncio.sleep(0.01)


def bucket_of_series(series: Series) -> Bucket:
    return Bucket(bucket_of(series.symbol, BUCKETS))


def test_newest_ticks_are_stored_in_all_buckets(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    writer.put_newest(TICKS)
    assert not writer.needs_refill()
    assert ask(redis_cluster, lambda cache: cache.newest(SERIES)) == list(TICKS.values())
    writer.put_newest({SERIES[0]: Tick(1.0, NOW + 1, 100)})  # few are commands of their own
    assert ask(redis_cluster, lambda cache: cache.newest(SERIES[:1])) == [Tick(1.0, NOW + 1, 100)]
    with redis_cluster.client() as client:
        assert client.exists(bucket_of_series(SERIES[0]).latest_key(SERIES[0]))


def test_slices_and_minutes_are_read_from_all_buckets(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    writer.put_slices(SLICES)
    writer.put_minutes(SLICES)
    found = ask(redis_cluster, lambda cache: cache.summary(SERIES, MINUTE, NOW))
    assert [candle and candle.close for candle in found] == [candle.close for candle in SLICES.values()]
    minutes = ask(redis_cluster, lambda cache: cache.by_minute(SERIES, MINUTE, MINUTE + MINUTE_MS))
    assert [of_series[MINUTE].ticks for of_series in minutes] == [1] * len(SERIES)


def test_next_run_recovers_all_buckets(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    writer.put_slices(SLICES)
    writer.put_minutes(SLICES)
    with writer_of(keywords(redis_cluster)) as again:
        with pytest.raises(Unavailable):
            again.put_slices(SLICES)
        assert again.recover().slices == SLICES
        assert again.unarchived([LEAD], lambda _: LEAD) == SLICES
        again.mark_archived(NOW, [LEAD])
    with writer_of(keywords(redis_cluster)) as third:
        assert third.unarchived([LEAD], lambda _: LEAD) == {}


def test_complete_until_is_divided_by_symbol(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    until = {f"COIN{n}": NOW + n for n in range(40)}
    writer.put_complete_until("exchange1", until)
    assert writer.complete_until("exchange1") == until
    assert writer.complete_until("exchange2") == {}


def test_announcements_of_all_buckets_arrive(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    """By one subscription for each master."""
    announced: dict[Series, Tick] = {}
    slots: set[Slot] = set()

    async def listen(cache: BucketedCache) -> int:
        listening = asyncio.create_task(cache.listen())
        async with asyncio.timeout(10):
            with cache.announcing(announced.update), cache.announcing_slots(lambda found: slots.update(dict(found))):
                await until(lambda: cache.live)
                await asyncio.to_thread(writer.put_newest, TICKS)
                await asyncio.to_thread(writer.put_slices, SLICES)
                await until(lambda: len(announced) == len(SERIES) and len(slots) == len(SLICES))
                clients = [node.call("CLIENT", "LIST", "TYPE", "PUBSUB") for node in redis_cluster.masters()]
        await cancel(listening)
        return sum(len(each.splitlines()) for each in clients)

    assert ask(redis_cluster, listen) == len(redis_cluster.masters())
    assert announced == TICKS
    assert slots == SLICES.keys()


def test_emptied_master_has_its_buckets_alone_refilled(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    writer.put_newest(TICKS)
    assert not writer.needs_refill()
    emptied = redis_cluster.owner_of(bucket_of_series(SERIES[0]).series_key)
    of_emptied = [each for each in SERIES if redis_cluster.owner_of(bucket_of_series(each).series_key) is emptied]
    emptied.call("FLUSHALL")
    assert writer.needs_refill()
    assert not writer.complete
    assert [each for each in SERIES if writer.lacks(each)] == of_emptied
    assert not writer.needs_refill()
    assert writer.complete


def test_rolled_back_master_has_its_buckets_alone_refilled(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    """A replica without the last writes has taken the place of its master."""
    bucket = bucket_of_series(SERIES[0])
    run_keys = [key for key in redis_cluster.owner_of(bucket.series_key).call("KEYS", "*:alive:*") if "{b" in key]
    (run_key,) = [key for key in run_keys if key.startswith(f"marketflow:{{b{bucket.number}}}:")]
    assert not writer.needs_refill()
    with redis_cluster.client() as client:
        before = client.get(run_key)
        assert not writer.needs_refill()
        client.set(run_key, before, keepttl=True)
    assert writer.needs_refill()
    assert {bucket_of_series(each) for each in SERIES if writer.lacks(each)} == {bucket}


def test_writes_follow_buckets_to_other_masters(redis_cluster: RedisCluster, writer: BucketedWriter) -> None:
    writer.put_newest(TICKS)
    redis_cluster.failover(redis_cluster.owner_of(bucket_of_series(SERIES[0]).series_key))

    def written() -> bool:
        try:
            writer.put_newest(TICKS)
            writer.put_slices(SLICES)
        except Unavailable:
            return False
        return not writer.needs_refill()

    wait_until(written, 3)
    assert ask(redis_cluster, lambda cache: cache.newest(SERIES)) == list(TICKS.values())


def test_client_of_control_keys_follows_a_killed_master(redis_cluster: RedisCluster) -> None:
    with sync_client(keywords(redis_cluster), 0.5) as client:
        client.set("marketflow:{control}:mode", "live")
        killed = redis_cluster.owner_of("marketflow:{control}:mode")

        def answers() -> bool:
            try:
                return bool(client.get("marketflow:{control}:mode") == b"live")
            except redis.RedisError:  # until its replica has taken over
                return False

        assert answers()
        with redis_cluster.killed(killed):
            wait_until(answers, 5)


def test_plain_redis_has_the_keys_of_the_version_before(redis_db: RedisServer) -> None:
    """An upgrade finds what the version before has left, in the keys as it named them."""
    series = Series(Mode.LIVE, "exchange1", "BTCUSDT")
    tick, name = Tick(5.0, MINUTE + 1, 1), "marketflow:{live:exchange1:BTCUSDT}"
    slices = {Slot(series, MINUTE): candle_of(tick)}
    member = codec.encode_candle(candle_of(tick))
    with redis_db.client() as client:
        client.zadd(f"{name}:window", {member: MINUTE})
        client.zadd(
            f"{name}:minutes", {member: MINUTE, codec.encode_candle(candle_of(Tick(4.0, 1, 1))): MINUTE - MINUTE_MS}
        )
        client.hset(f"{name}:latest", mapping={"price": 5.0, "timestamp": NOW, "received": NOW, "sequence": 7})
        client.zadd("marketflow:{archive}:series", {codec.encode_series(series): NOW})
        client.set("marketflow:{archive}:until", MINUTE)
        place = connection_keywords(HOST, redis_db.port, "", 0)
        with closing(BucketedWriter.connect(place, [], SetClock(), 70)) as writer:
            assert writer.recover().slices == slices
            assert writer.unarchived([LEAD], lambda _: LEAD) == slices
            writer.put_newest({series: Tick(6.0, NOW + 1, 8)})
            writer.put_slices({Slot(series, MINUTE + 100): candle_of(Tick(5.5, MINUTE + 101, 2))})
            assert client.hget(f"{name}:latest", "price") == b"6.0"
            assert client.zcard(f"{name}:window") == 2
