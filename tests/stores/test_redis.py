"""What the cache promises, with real servers that are killed, frozen, full and read-only."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marketflow.alerts.slice_follower import LATEST
from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    minute_start,
    put_more_complete,
    slice_start,
)
from marketflow.settings.shards import LEAD
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS
from marketflow.stores.circuit_breaker import BREAK_SECONDS, CircuitBreaker
from marketflow.stores.ports import RecoveredCandles
from marketflow.stores.redis import codec, keys
from marketflow.stores.redis.connection import TIMEOUT_SECONDS
from marketflow.stores.redis.connection import connection_keywords as redis_keywords
from marketflow.stores.redis.reader import SLOTS_AT_ONCE, RedisReader, _decoded
from marketflow.stores.redis.writer import RedisWriter
from marketflow.tasks import background
from tests.support.market import BTC, ETH, MINUTE
from tests.support.redis_faults import frozen, killed, out_of_memory, read_only
from tests.support.servers import HOST, RedisServer, free_port, wait_until

T = TypeVar("T")
NOW = MINUTE + 30_000
TEST_BTC = BTC._replace(mode=Mode.TEST)
SERIES = [BTC, ETH, TEST_BTC]
TICK = Tick(100.5, NOW, NOW * 1_000_000 + 7)
IN_TIME = 0.6
PASSWORD = "correct horse"
TTL_SECONDS = 300


def candle(start: int = MINUTE, ticks: int = 1, price: float = 100.0) -> Candle:
    return Candle(price, price + 2, price - 2, price + 1, price * ticks, ticks, start, start + 9, start, start, 1, 2)


def one(series: Series = BTC, start: int = MINUTE, ticks: int = 1) -> Candles:
    return {Slot(series, start): candle(start, ticks)}


class SetClock:
    """Shows what it was set to."""

    def __init__(self) -> None:
        self.ms = NOW

    def __call__(self) -> int:
        return self.ms * 1_000_000


def keywords(server: RedisServer) -> dict[str, Any]:
    return redis_keywords(HOST, server.port, server.password, 0)


@contextmanager
def cache_at(place: dict[str, Any], clock: SetClock | None = None, recovered: bool = True) -> Iterator[RedisWriter]:
    """The cache of one run."""
    with closing(RedisWriter.connect(place, SERIES, clock or SetClock(), TTL_SECONDS)) as cache:
        if recovered:
            cache.recover()
        yield cache


SETTLE_MS = 10_000


def ask(server: RedisServer, question: Callable[[RedisReader], Awaitable[T]], at: int | None = None) -> T:
    """The answer of a reader made for one query, at NOW unless given."""
    clock = SetClock()
    clock.ms = NOW if at is None else at

    async def answer() -> T:
        reader = RedisReader.connect(keywords(server), clock, SETTLE_MS)
        try:
            return await question(reader)
        finally:
            await reader.close()

    return asyncio.run(answer())


def newest(server: RedisServer, series: Series = BTC) -> Tick | None:
    return ask(server, lambda reader: reader.newest([series]))[0]


@asynccontextmanager
async def in_time() -> AsyncIterator[None]:
    """Limit a block to IN_TIME in which the event loop kept up: a turn of it that takes longer counts as 20 ms."""
    kept_up = 0.0

    async def measure() -> None:
        nonlocal kept_up
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.01)
            kept_up += min(time.monotonic() - began, 0.02)

    async with background(measure()):
        yield
    assert kept_up < IN_TIME


def slots_of(client: "redis.Redis", key: str) -> list[tuple[bytes, float]]:
    return cast("list[tuple[bytes, float]]", client.zrange(key, 0, -1, withscores=True))


def fails_in_time(call: Callable[[], object]) -> str:
    """The text of the Unavailable that a call must raise soon."""
    began = time.monotonic()
    with pytest.raises(Unavailable) as raised:
        call()
    assert time.monotonic() - began < IN_TIME
    return str(raised.value)


def writes(cache: RedisWriter) -> list[Callable[[], object]]:
    """Every call that writes."""
    return [
        lambda: cache.put_newest({BTC: TICK}),
        lambda: cache.put_slices(one()),
        lambda: cache.put_minutes(one()),
        lambda: cache.mark_archived(MINUTE),
    ]


@pytest.fixture
def clock() -> SetClock:
    return SetClock()


@pytest.fixture
def cache(redis_db: RedisServer, clock: SetClock) -> Iterator[RedisWriter]:
    """A cache on an empty Redis, recovered."""
    with cache_at(keywords(redis_db), clock) as cache:
        yield cache


@pytest.fixture
def client(redis_db: RedisServer) -> Iterator["redis.Redis"]:
    with redis_db.client() as client:
        yield client


@pytest.fixture
def server(server_folder: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, with a password, which loses its data when it stops."""
    with RedisServer(server_folder / "redis", PASSWORD, persistent=False) as server:
        yield server


# What is stored, and for how long


def test_the_newest_price_is_a_hash_that_expires(cache: RedisWriter, client: "redis.Redis") -> None:
    cache.put_newest({BTC: TICK})
    key = "marketflow:{live:exchange1:BTCUSDT}:latest"
    assert client.hgetall(key) == {
        b"price": b"100.5",
        b"timestamp": str(NOW).encode(),
        b"received": str(NOW).encode(),
        b"sequence": str(TICK.sequence).encode(),
    }
    remaining = client.pttl(key)
    assert isinstance(remaining, int)
    assert TTL_SECONDS * 1000 - 5000 < remaining <= TTL_SECONDS * 1000


@pytest.mark.parametrize("count", [1, 20])
def test_older_price_of_another_process_replaces_no_newer_one(
    redis_db: RedisServer, client: "redis.Redis", count: int
) -> None:
    series = [Series(Mode.LIVE, "exchange1", f"SYM{number}") for number in range(count)]
    with ExitStack() as stack:
        owner, thawed = (
            stack.enter_context(
                closing(RedisWriter(redis_db.client(), series, lambda: NOW * 10**6, 70, is_shared=True))
            )
            for _ in range(2)
        )
        for writer in (owner, thawed):
            writer.recover()
        owner.put_newest(dict.fromkeys(series, Tick(2.0, NOW, 5)))
        thawed.put_newest(dict.fromkeys(series, Tick(1.0, NOW - 1, 9)))
        assert {client.hget(keys.latest_key(each), "price") for each in series} == {b"2.0"}
        thawed.put_newest(dict.fromkeys(series, Tick(3.0, NOW, 6)))
        assert {client.hget(keys.latest_key(each), "price") for each in series} == {b"3.0"}
        # Beyond what any clock is ahead: written before the clock was set back.
        client.hset(keys.latest_key(series[0]), "timestamp", NOW + 3_600_000)
        thawed.put_newest({series[0]: Tick(4.0, NOW + 1, 7)})
        assert client.hget(keys.latest_key(series[0]), "price") == b"4.0"


@pytest.mark.parametrize("count", [1, 20])
def test_newest_tick_without_receipt_is_stored_and_announced(
    redis_db: RedisServer, client: "redis.Redis", count: int
) -> None:
    """As of a row, which has none: its sequence is zero."""
    series = [Series(Mode.LIVE, "exchange1", f'S"{number}\u20ac') for number in range(count)]
    tick = Tick(1e22, NOW, 0)
    with (
        closing(RedisWriter(redis_db.client(), series, lambda: NOW * 10**6, 70)) as writer,
        redis_db.client() as listener,
        listener.pubsub() as announcements,
    ):
        announcements.subscribe(keys.PLAIN.newest_channel)
        assert announcements.get_message(timeout=5)
        writer.recover()
        writer.put_newest(dict.fromkeys(series, tick))
        message = announcements.get_message(timeout=5)
        assert message is not None
        assert codec.decode_newest(message["data"]) == [(each, tick) for each in series]
        for each in series:
            assert client.hget(keys.latest_key(each), "received") == b"0"
        assert ask(redis_db, lambda reader: reader.newest(series)) == [tick] * count


def test_newest_price_lives_at_least_nine_tenths_of_ttl(
    cache: RedisWriter, client: "redis.Redis", clock: SetClock
) -> None:
    cache.put_newest({BTC: TICK})
    client.pexpire(keys.latest_key(BTC), TTL_SECONDS * 900)  # a tenth of its time later
    clock.ms += TTL_SECONDS * 100
    cache.put_newest({BTC: TICK})
    remaining = client.pttl(keys.latest_key(BTC))
    assert isinstance(remaining, int)
    assert TTL_SECONDS * 1000 - 5000 < remaining <= TTL_SECONDS * 1000


def test_keys_are_named_as_the_contract_says(cache: RedisWriter, client: "redis.Redis") -> None:
    cache.put_newest({BTC: TICK})
    cache.put_slices(one())
    cache.put_minutes(one())
    of_series = {key for key in client.keys("*") if b"BTCUSDT" in key}
    tag = b"marketflow:{live:exchange1:BTCUSDT}:"
    assert of_series == {tag + b"latest", tag + b"window", tag + b"minutes"}


WRITES: list[Callable[[RedisWriter, int], object]] = [
    lambda cache, age: cache.put_slices(one(BTC, NOW, ticks=2)),
    lambda cache, age: cache.put_newest({ETH: TICK._replace(at=NOW - age), BTC: TICK}),
    lambda cache, age: cache.put_slices(one(BTC, NOW - age) | one(ETH, NOW)),
    lambda cache, age: cache.put_minutes(one(BTC, minute_start(NOW - age))),
    lambda cache, age: cache.mark_archived(minute_start(NOW - age)),
    lambda cache, age: cache.needs_refill(),
    lambda cache, age: cache.unarchived(),
    lambda cache, age: cache.recover(),
]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(WRITES), st.integers(0, 2 * MINUTES_KEPT_MS)), max_size=8))
def test_every_key_expires_by_itself_whatever_was_written(
    cache: RedisWriter, client: "redis.Redis", calls: list[tuple[Callable[[RedisWriter, int], object], int]]
) -> None:
    client.flushall()
    cache.needs_refill()
    for call, age_ms in calls:
        call(cache, age_ms)
    assert [key for key in client.keys("*") if client.ttl(key) == -1] == []


def test_keys_written_after_unnoticed_data_loss_get_an_expiry(
    cache: RedisWriter, client: "redis.Redis", redis_db: RedisServer
) -> None:
    def forever() -> list[bytes]:
        return [key for key in cast("list[bytes]", client.keys("*")) if client.ttl(key) == -1]

    cache.put_slices(one(BTC) | one(ETH))
    client.flushall()
    cache.put_slices(one(BTC) | one(ETH))
    assert forever()
    assert cache.needs_refill()
    cache.put_slices(one(BTC))
    assert forever() == [keys.window_key(ETH).encode()]
    with cache_at(keywords(redis_db)):
        assert not forever()


def test_newest_price_is_stored_with_expiry_or_not(server: RedisServer) -> None:
    with server.client() as client, cache_at(keywords(server)) as cache:
        client.execute_command("ACL", "SETUSER", "default", "-pexpire")
        with pytest.raises(Unavailable):
            cache.put_newest({BTC: TICK})
        assert client.exists(keys.latest_key(BTC)) == 0


def test_user_without_right_to_type_is_served(server: RedisServer, log: list[str]) -> None:
    """As with the ACL of an earlier version."""
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "default", "-type")
        with cache_at(keywords(server)) as cache:
            cache.put_newest({BTC: TICK})
            client.flushall()
            assert cache.needs_refill()
            cache.put_newest({BTC: TICK})
            assert not cache.needs_refill()
            assert cache.complete
    assert newest(server) == TICK
    assert len([line for line in log if "TYPE" in line]) == 1


@pytest.mark.parametrize("price", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 1e22, 123456789.123456789])
def test_candles_and_prices_come_back_to_the_last_bit(cache: RedisWriter, redis_db: RedisServer, price: float) -> None:
    tick = Tick(price, NOW, 2**62 + 1)
    stored = Candle(price, price, price, price, price * 0.3, 3, MINUTE, NOW, MINUTE, NOW, 2**62, 2**62 + 1)
    cache.put_newest({BTC: tick})
    cache.put_slices({Slot(BTC, MINUTE): stored})
    cache.put_minutes({Slot(BTC, MINUTE): stored})
    assert ask(redis_db, lambda reader: reader.recent([BTC], MINUTE)) == [(tick, {MINUTE: stored}, {MINUTE: stored})]


@pytest.mark.parametrize(("ticks", "stays"), [(0, "ticks"), (3, "ticks"), (4, "ticks"), (5, "venue")])
def test_minute_of_the_venue_replaces_only_a_poorer_one(
    cache: RedisWriter, client: "redis.Redis", ticks: int, stays: str
) -> None:
    ours = candle(ticks=4)
    theirs = msgspec.structs.replace(candle(ticks=ticks, price=200.0), source="venue")
    for order in ((ours, theirs), (theirs, ours)):
        for each in order:
            cache.put_minutes({Slot(BTC, MINUTE): each})
        (member,) = cast("list[bytes]", client.zrange(keys.minutes_key(BTC), 0, -1))
        assert codec.decode_candle(member).source == stays
        client.delete(keys.minutes_key(BTC))


def test_verified_minute_replaces_the_same_unverified_one(cache: RedisWriter, client: "redis.Redis") -> None:
    unverified = candle(ticks=4)
    verified = msgspec.structs.replace(unverified, verified=True)
    cache.put_minutes({Slot(BTC, MINUTE): unverified})
    cache.put_minutes({Slot(BTC, MINUTE): verified})
    (member,) = cast("list[bytes]", client.zrange(keys.minutes_key(BTC), 0, -1))
    assert codec.decode_candle(member) == verified


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(1, 2**62), st.integers(0, 2**62))
def test_any_candle_survives_its_encoding(price: float, ticks: int, sequence: int) -> None:
    stored = Candle(price, price, price, price, price, ticks, 0, NOW, 0, NOW, 0, sequence)
    assert codec.decode_slots([(codec.encode_candle(stored), float(NOW))]) == {NOW: stored}


@pytest.mark.parametrize("kind", ["window", "minutes"])
def test_more_complete_slot_replaces_and_repetition_changes_nothing(
    cache: RedisWriter, client: "redis.Redis", kind: str
) -> None:
    put = cache.put_slices if kind == "window" else cache.put_minutes
    key = f"marketflow:{{live:exchange1:BTCUSDT}}:{kind}"
    put(one(ticks=1))
    once = slots_of(client, key)
    put(one(ticks=1))
    assert slots_of(client, key) == once
    put(one(ticks=2))
    assert codec.decode_slots(slots_of(client, key)) == {MINUTE: candle(ticks=2)}
    assert client.zcard(key) == 1


slots = st.dictionaries(
    st.builds(Slot, st.sampled_from(SERIES), st.sampled_from([MINUTE, MINUTE + SLICE_MS, MINUTE + 2 * SLICE_MS])),
    st.integers(1, 3),
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(slots, slots)
def test_slots_of_one_write_are_stored_and_announced_each_by_itself(
    cache: RedisWriter,
    client: "redis.Redis",
    redis_db: RedisServer,
    first: dict[Slot, int],
    second: dict[Slot, int],
) -> None:
    """Whatever series, starts and numbers of ticks come together, in any order."""
    client.flushall()
    cache.needs_refill()
    expected: Candles = {}
    with redis_db.client() as listener, listener.pubsub() as announcements:
        announcements.subscribe(keys.PLAIN.slices_channel)
        assert announcements.get_message(timeout=5)
        for ticks in filter(None, (first, second)):
            written = {slot: candle(slot.start, count) for slot, count in ticks.items()}
            cache.put_slices(written)
            message = announcements.get_message(timeout=5)
            assert message is not None
            announced = codec.decode_announced(message["data"])
            assert {slot: codec.valid_slot(slot.start, member) for slot, member in announced} == written
            for slot, each in written.items():
                put_more_complete(expected, slot, each)
    for series in SERIES:
        stored = codec.decode_slots(slots_of(client, keys.window_key(series)))
        assert {Slot(series, start): each for start, each in stored.items()} == {
            slot: each for slot, each in expected.items() if slot.series == series
        }
        assert client.ttl(keys.window_key(series)) != -1


def test_more_complete_of_two_stored_slots_counts() -> None:
    poor, full = (codec.encode_candle(candle(ticks=ticks)) for ticks in (2, 10))
    assert codec.decode_slots([(poor, MINUTE), (full, MINUTE)]) == {MINUTE: candle(ticks=10)}
    assert codec.decode_slots([(full, MINUTE), (poor, MINUTE)]) == {MINUTE: candle(ticks=10)}


def test_outage_does_not_end_by_calls_without_a_command(server: RedisServer, log: list[str]) -> None:
    with cache_at(keywords(server)) as cache:
        cache.unarchived()
        server.kill()
        for _ in range(3):
            time.sleep(BREAK_SECONDS)
            fails_in_time(lambda: cache.put_slices(one()))
            time.sleep(BREAK_SECONDS)
            assert not cache.needs_refill()
            time.sleep(BREAK_SECONDS)
            cache.mark_archived(MINUTE, [])
            assert cache.between(0, MINUTE, wanted=lambda _: False) == RecoveredCandles({})
    assert [line for line in log if "Redis cannot be used" in line]
    assert not [line for line in log if "Redis can be used again" in line]


def test_outage_does_not_end_by_reads_while_writes_fail(server: RedisServer, log: list[str]) -> None:
    """The log says so once, not every ten seconds that Redis can be used again."""
    with server.client() as client, cache_at(keywords(server)) as cache:
        client.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")
        for _ in range(3):
            time.sleep(BREAK_SECONDS)
            fails_in_time(lambda: cache.put_slices(one()))
            time.sleep(BREAK_SECONDS)
            assert cache.needs_refill()
        assert len([line for line in log if "Redis cannot be used" in line]) == 1
        assert not [line for line in log if "Redis can be used again" in line]
        client.execute_command("ACL", "SETUSER", "default", "+eval", "+evalsha")
        cache.put_slices(one())
        assert not cache.needs_refill()
        assert [line for line in log if "Redis can be used again" in line]


def test_outage_before_the_recovery_does_not_end_by_reads(server: RedisServer, log: list[str]) -> None:
    with cache_at(keywords(server), recovered=False) as cache:
        with read_only(server):
            for _ in range(2):
                fails_in_time(cache.recover)
                time.sleep(BREAK_SECONDS)
        assert not [line for line in log if "Redis can be used again" in line]
        assert wait_until(lambda: cache.recover() is not None)
        assert [line for line in log if "Redis can be used again" in line]


def test_old_slices_and_minutes_are_trimmed(cache: RedisWriter, client: "redis.Redis", clock: SetClock) -> None:
    cache.put_slices(one(start=MINUTE) | one(start=MINUTE + SLICE_MS))
    cache.put_minutes(one(start=MINUTE) | one(start=MINUTE + MINUTE_MS))
    clock.ms = MINUTE + RECENT_MS + 2 * MINUTE_MS - SLICE_MS
    cache.put_slices(one(start=clock.ms))
    assert len(slots_of(client, keys.window_key(BTC))) == 3, "of a minute all slices go at once"
    clock.ms += SLICE_MS
    cache.put_slices(one(start=clock.ms))
    assert [score for _, score in slots_of(client, keys.window_key(BTC))] == [clock.ms - SLICE_MS, clock.ms]
    clock.ms = MINUTE + MINUTES_KEPT_MS + 3 * MINUTE_MS
    cache.put_minutes(one(start=minute_start(clock.ms)))
    assert [score for _, score in slots_of(client, keys.minutes_key(BTC))] == [MINUTE + MINUTE_MS, clock.ms]


def test_thousands_of_slots_are_written_in_one_call(cache: RedisWriter, client: "redis.Redis") -> None:
    slices = {
        Slot(series, NOW - i * SLICE_MS): candle(NOW - i * SLICE_MS) for i in range(1234) for series in (BTC, ETH)
    }
    cache.put_slices(slices)
    assert client.zcard(keys.window_key(BTC)) == client.zcard(keys.window_key(ETH)) == 1234
    assert cache.recover().slices == slices


# What the next run finds


@pytest.mark.parametrize("hours", [0, 23])
def test_next_run_recovers_slices_of_both_modes_hours_later(
    cache: RedisWriter, redis_db: RedisServer, hours: int
) -> None:
    left: Candles = {}
    for series in SERIES:
        left |= one(series, MINUTE - RECENT_MS) | one(series, MINUTE)
    cache.put_slices(left)
    later = SetClock()
    later.ms += hours * 60 * MINUTE_MS
    with redis_db.client() as client:
        assert client.pttl(keys.window_key(BTC)) > 24 * 60 * MINUTE_MS
    with cache_at(keywords(redis_db), later, recovered=False) as next_run:
        assert next_run.recover().slices == left
        assert next_run.complete


def test_slices_between_two_times_are_those_of_any_process(
    cache: RedisWriter, redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = one(BTC, MINUTE) | one(BTC, MINUTE + 100) | one(ETH, MINUTE + 200) | one(ETH, MINUTE + 300)
    cache.put_slices(written)
    inner = {slot: candle for slot, candle in written.items() if 100 <= slot.start - MINUTE < 300}
    with cache_at(keywords(redis_db), recovered=False) as other:
        assert other.between(MINUTE + 100, MINUTE + 300) == RecoveredCandles(inner)
        monkeypatch.setattr("marketflow.stores.redis.recovery.SLICES_HELD", 1)
        folded = {Slot(series, MINUTE): candle for (series, _), candle in inner.items()}
        assert other.between(MINUTE + 100, MINUTE + 300) == RecoveredCandles({}, folded)


def test_slices_of_each_series_are_read_from_its_own_time(cache: RedisWriter, redis_db: RedisServer) -> None:
    written = one(BTC, MINUTE) | one(BTC, MINUTE + 100) | one(ETH, MINUTE) | one(ETH, MINUTE + 300)
    cache.put_slices(written)
    with cache_at(keywords(redis_db), recovered=False) as other:
        found = other.slices_since({BTC: MINUTE + 100, ETH: MINUTE, BTC._replace(symbol="SOLUSDT"): 0}, MINUTE + 300)
        assert {*found} == {Slot(BTC, MINUTE + 100), Slot(ETH, MINUTE)}
        assert found.items() <= written.items()
        assert {*other.last_before([BTC, ETH], MINUTE + 300)} == {Slot(BTC, MINUTE + 100), Slot(ETH, MINUTE)}
        assert {*other.last_before([BTC, ETH], LATEST)} == {Slot(BTC, MINUTE + 100), Slot(ETH, MINUTE + 300)}
        assert other.last_before([BTC, ETH], MINUTE) == {}


def test_too_many_slices_are_recovered_as_minutes_but_the_last_ones(
    cache: RedisWriter, redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = [Tick(100.0 + n, MINUTE + n * 1000, n) for n in range(120)]
    cache.put_slices({Slot(series, slice_start(tick.at)): candle_of(tick) for tick in ticks for series in (BTC, ETH)})
    monkeypatch.setattr("marketflow.stores.redis.recovery.SLICES_HELD", 239)
    later = SetClock()
    later.ms += 60_000
    with cache_at(keywords(redis_db), later, recovered=False) as next_run:
        slices, minutes, whole_from, _ = next_run.recover()
    assert whole_from == NOW + 60_000 - 10_000
    assert {(slot.series, slot.start): minute.ticks for slot, minute in minutes.items()} == {
        (series, start): ticks for series in (BTC, ETH) for start, ticks in ((MINUTE, 60), (MINUTE + MINUTE_MS, 20))
    }
    assert minutes[Slot(BTC, MINUTE)].newest == ticks[59]
    assert slices == {Slot(series, tick.at): candle_of(tick) for tick in ticks[80:] for series in (BTC, ETH)}


def test_slice_of_one_tick_is_stored_as_tick(cache: RedisWriter, client: "redis.Redis") -> None:
    lone = candle_of(TICK)
    cache.put_slices({Slot(BTC, slice_start(NOW)): lone})
    ((member, _),) = slots_of(client, keys.window_key(BTC))
    assert member == b"[100.5,%d,%d]" % (NOW, TICK.sequence)
    client.zadd(keys.window_key(BTC), {msgspec.json.encode(lone): NOW})
    assert codec.decode_slots(slots_of(client, keys.window_key(BTC))) == {NOW: lone}


def test_next_run_finds_series_removed_from_settings(cache: RedisWriter, redis_db: RedisServer) -> None:
    left = one(BTC) | one(ETH) | one(TEST_BTC)
    cache.put_slices(left)
    cache.put_minutes(left)
    later = SetClock()
    for _ in range(2):  # it may crash as well
        later.ms += 8 * 60 * MINUTE_MS
        with closing(RedisWriter.connect(keywords(redis_db), [BTC], later, TTL_SECONDS)) as next_run:
            assert next_run.recover().slices == left
            assert next_run.unarchived() == left


def test_series_removed_a_day_ago_is_dropped_from_index(
    cache: RedisWriter, client: "redis.Redis", redis_db: RedisServer
) -> None:
    later = SetClock()
    later.ms += keys.EXPIRY_MS
    with closing(RedisWriter.connect(keywords(redis_db), [BTC], later, TTL_SECONDS)) as next_run:
        next_run.recover()
    assert client.zcard(keys.PLAIN.series_key) == 1


def test_what_this_version_cannot_read_is_left_out(
    cache: RedisWriter, client: "redis.Redis", redis_db: RedisServer
) -> None:
    cache.put_slices(one())
    for number, member in enumerate([b"", b"\xff", b"[1,2]", b'{"open":1}', b"[" * 3000]):
        client.zadd(keys.window_key(BTC), {member: MINUTE + number * SLICE_MS})
    client.zadd(keys.PLAIN.series_key, {b"": 1, b"\xff": 2, b'["live"]': 3, b'["other","exchange1","BTCUSDT"]': 4})
    client.hset(keys.latest_key(BTC), mapping={"price": "?", "timestamp": "1.5", "sequence": ""})
    assert cache.recover().slices == one()
    assert ask(redis_db, lambda reader: reader.recent([BTC], MINUTE)) == [(None, {MINUTE: candle()}, {})]


def test_writes_before_recovery_fail_and_cause_a_refill(redis_db: RedisServer, client: "redis.Redis") -> None:
    with cache_at(keywords(redis_db), recovered=False) as cache:
        for write in writes(cache)[:3]:
            with pytest.raises(Unavailable):
                write()
        assert client.keys("*") == []
        assert not cache.needs_refill()
        cache.recover()
        assert not cache.complete
        assert cache.needs_refill()
        assert not cache.needs_refill()
        assert cache.complete


def test_minutes_from_the_mark_on_are_unarchived(cache: RedisWriter, redis_db: RedisServer) -> None:
    minutes = [one(series, MINUTE - ago * MINUTE_MS) for ago in (0, 1, 2) for series in (BTC, TEST_BTC)]
    for minute in minutes:
        cache.put_minutes(minute)
    cache.unarchived()
    cache.mark_archived(MINUTE - MINUTE_MS)
    with cache_at(keywords(redis_db)) as next_run:
        assert next_run.unarchived() == minutes[0] | minutes[1] | minutes[2] | minutes[3]


def test_without_mark_all_minutes_of_a_day_are_unarchived(
    cache: RedisWriter, redis_db: RedisServer, clock: SetClock
) -> None:
    cache.put_minutes(one(start=MINUTE - MINUTE_MS) | one(start=MINUTE))
    clock.ms = MINUTE + MINUTES_KEPT_MS
    with cache_at(keywords(redis_db), clock) as next_run:
        assert next_run.unarchived() == one(start=MINUTE)


def test_earlier_archive_mark_stands_until_backlog_is_read(cache: RedisWriter, client: "redis.Redis") -> None:
    cache.mark_archived(MINUTE)
    assert client.get(keys.PLAIN.archived_key(LEAD)) is None
    cache.unarchived()
    cache.mark_archived(MINUTE)
    assert client.get(keys.PLAIN.archived_key(LEAD)) == str(MINUTE).encode()


# Until when trades are complete


def test_times_of_completeness_are_read_by_the_next_run(cache: RedisWriter, redis_db: RedisServer) -> None:
    assert cache.complete_until("binance") == {}
    cache.put_complete_until("binance", {"BTCUSDT": MINUTE, "ETHUSDT": 5})
    cache.put_complete_until("kraken", {"BTCUSDT": 7})
    with cache_at(keywords(redis_db), recovered=False) as next_run:
        assert next_run.complete_until("binance") == {"BTCUSDT": MINUTE, "ETHUSDT": 5}
        assert next_run.complete_until("kraken") == {"BTCUSDT": 7}
        with pytest.raises(Unavailable):
            next_run.put_complete_until("kraken", {})  # it may lack what was written before


@pytest.mark.parametrize("value", [b"", b"[]", b"x", b'{"BTCUSDT":"5"}'])
def test_times_of_completeness_that_are_none_are_skipped(
    cache: RedisWriter, client: "redis.Redis", value: bytes
) -> None:
    client.set(keys.PLAIN.complete_key("binance"), value)
    assert cache.complete_until("binance") == {}
    cache.put_complete_until("binance", {"BTCUSDT": MINUTE})
    assert client.pttl(keys.PLAIN.complete_key("binance")) > 0


# What the cache lacks


def test_cache_without_outage_needs_no_refill(cache: RedisWriter) -> None:
    assert cache.complete
    for write in writes(cache):
        write()
        assert not cache.needs_refill()
    assert cache.complete


def test_an_emptied_cache_needs_a_refill_once(cache: RedisWriter, client: "redis.Redis") -> None:
    client.flushall()
    assert cache.needs_refill()
    assert not cache.complete
    assert not cache.needs_refill()
    assert cache.complete


def test_emptied_cache_is_unavailable_until_writer_notices(
    cache: RedisWriter, client: "redis.Redis", redis_db: RedisServer
) -> None:
    client.flushall()
    cache.put_newest({ETH: TICK})
    cache.put_slices(one(ETH))
    assert "emptied" in fails_in_time(lambda: newest(redis_db, ETH))
    assert "emptied" in fails_in_time(lambda: ask(redis_db, lambda reader: reader.recent([BTC, ETH], MINUTE)))
    assert cache.needs_refill()
    assert newest(redis_db, ETH) == TICK


def test_restart_without_data_needs_one_refill(server: RedisServer) -> None:
    with cache_at(keywords(server)) as cache:
        cache.put_newest({BTC: TICK})
        server.restart()
        assert wait_until(cache.needs_refill)
        assert not cache.needs_refill()


def test_a_failed_write_needs_a_refill_once(server: RedisServer) -> None:
    with cache_at(keywords(server)) as cache:
        server.pause()
        fails_in_time(lambda: cache.put_newest({BTC: TICK}))
        assert not cache.complete
        assert not cache.needs_refill()  # it cannot be refilled yet
        server.resume()
        assert wait_until(cache.needs_refill)
        assert not cache.complete
        assert not cache.needs_refill()
        assert cache.complete


def test_emptied_cache_needs_refill_after_lost_probe_answer(server: RedisServer) -> None:
    with server.client() as client, cache_at(keywords(server)) as cache:
        cache.put_newest({BTC: TICK})
        client.flushall()
        server.pause()
        assert not cache.needs_refill()
        server.resume()
        assert wait_until(cache.needs_refill)


def test_cache_is_incomplete_from_failure_until_clean_probe(
    server: RedisServer,
) -> None:
    with server.client() as client, cache_at(keywords(server)) as cache:
        client.config_set("maxmemory", 1)
        fails_in_time(lambda: cache.put_slices(one()))
        client.config_set("maxmemory", 0)
        wait_until(lambda: succeeds(lambda: cache.put_slices(one())))
        assert not cache.complete
        assert cache.needs_refill()
        assert not cache.complete
        assert not cache.needs_refill()
        assert cache.complete


def succeeds(call: Callable[[], object]) -> bool:
    try:
        call()
    except Unavailable:
        return False
    return True


# Outages of Redis


Fault = Callable[[RedisServer], Any]


@pytest.mark.parametrize("fault", [killed, frozen, out_of_memory, read_only])
def test_every_write_ends_in_time_and_works_again_by_itself(server: RedisServer, fault: Fault, log: list[str]) -> None:
    with ExitStack() as stack:
        # One for each call: the circuit breaker of a cache would answer for all calls but the first.
        caches = [stack.enter_context(cache_at(keywords(server))) for _ in range(4)]
        for cache in caches:
            cache.unarchived()
        with fault(server):
            errors = [fails_in_time(writes(cache)[number]) for number, cache in enumerate(caches)]
            assert not any(cache.complete or cache.needs_refill() for cache in caches)
        for number, cache in enumerate(caches):
            assert wait_until(cache.needs_refill)
            writes(cache)[number]()
            assert not cache.needs_refill()
            assert cache.complete
    assert PASSWORD not in "".join(errors + log)
    assert any("Redis can be used again" in line for line in log)


@pytest.mark.parametrize("fault", [killed, frozen])
def test_recovery_calls_of_next_run_end_in_time(server: RedisServer, fault: Fault) -> None:
    with ExitStack() as stack:
        runs = [stack.enter_context(cache_at(keywords(server), recovered=False)) for _ in range(2)]
        with fault(server):
            fails_in_time(runs[0].recover)
            fails_in_time(runs[1].unarchived)
        wait_until(lambda: succeeds(runs[0].recover))


def test_a_redis_that_was_never_there_is_unavailable_in_time() -> None:
    place = redis_keywords(HOST, free_port(), "", 0)
    with cache_at(place, recovered=False) as cache:
        fails_in_time(cache.recover)
        assert not cache.needs_refill()
        assert not cache.complete


def test_wrong_password_is_unavailable_and_never_shown(server: RedisServer, log: list[str]) -> None:
    wrong = "battery staple"
    place = keywords(server) | {"password": wrong}
    with cache_at(place, recovered=False) as cache:
        text = fails_in_time(cache.recover)
    assert "password" in text
    shown = text + "".join(log)
    assert wrong not in shown
    assert PASSWORD not in shown


def test_calls_fail_at_once_during_redis_outage(server: RedisServer) -> None:
    with cache_at(keywords(server)) as cache:
        server.pause()
        fails_in_time(lambda: cache.put_newest({BTC: TICK}))
        began = time.monotonic()
        failed = 0
        while time.monotonic() - began < BREAK_SECONDS / 2:
            asked_at = time.monotonic()
            with pytest.raises(Unavailable, match="a moment ago"):
                cache.put_newest({BTC: TICK})
            assert time.monotonic() - asked_at < TIMEOUT_SECONDS / 2
            failed += 1
        assert failed > 100
        server.resume()


def test_threads_share_a_cache(cache: RedisWriter, redis_db: RedisServer) -> None:
    series = [Series(Mode.LIVE, "exchange1", f"SYMBOL{number}") for number in range(50)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda each: cache.put_newest({each: TICK}), series))
    assert ask(redis_db, lambda reader: reader.newest(series)) == [TICK] * 50
    assert cache.complete


# The circuit breaker


class Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_closed_breaker_lets_everyone_through() -> None:
    circuit_breaker = CircuitBreaker(0.5, Stopwatch())
    for _ in range(3):
        circuit_breaker.check()


def test_open_circuit_breaker_lets_one_call_try() -> None:
    stopwatch = Stopwatch()
    circuit_breaker = CircuitBreaker(0.5, stopwatch)
    circuit_breaker.failed()
    for seconds in (0.0, 0.49):
        stopwatch.seconds = seconds
        with pytest.raises(Unavailable):
            circuit_breaker.check()
    for seconds in (0.5, 1.0):
        stopwatch.seconds = seconds
        circuit_breaker.check()
        with pytest.raises(Unavailable):
            circuit_breaker.check()


def test_circuit_breaker_closes_on_success_and_opens_on_failure() -> None:
    stopwatch = Stopwatch()
    circuit_breaker = CircuitBreaker(0.5, stopwatch)
    circuit_breaker.failed()
    stopwatch.seconds = 0.5
    circuit_breaker.check()
    circuit_breaker.succeeded()
    circuit_breaker.check()
    circuit_breaker.check()
    circuit_breaker.failed()
    with pytest.raises(Unavailable):
        circuit_breaker.check()


# The reader


def test_the_newest_price_falls_back_to_the_last_closed_minute(
    cache: RedisWriter, client: "redis.Redis", redis_db: RedisServer
) -> None:
    assert newest(redis_db) is None
    cache.put_minutes(one(start=MINUTE) | one(start=MINUTE - MINUTE_MS))
    cache.put_newest({BTC: TICK})
    assert newest(redis_db) == TICK
    client.delete(keys.latest_key(BTC))
    assert newest(redis_db) == candle(MINUTE).newest


def test_answers_are_in_order_of_requested_series(cache: RedisWriter, redis_db: RedisServer) -> None:
    cache.put_newest({BTC: TICK, TEST_BTC: TICK._replace(price=1.0)})
    answers = ask(redis_db, lambda reader: reader.newest([TEST_BTC, ETH, BTC]))
    assert answers == [TICK._replace(price=1.0), None, TICK]
    assert ask(redis_db, lambda reader: reader.newest([])) == []


def test_recent_gives_slices_and_minutes_ending_after_a_time(cache: RedisWriter, redis_db: RedisServer) -> None:
    for start in (MINUTE - MINUTE_MS, MINUTE, MINUTE + MINUTE_MS):
        cache.put_minutes(one(start=start))
    for start in (NOW - SLICE_MS, NOW, NOW + SLICE_MS):
        cache.put_slices(one(start=start) | one(series=ETH, start=start))

    def recent(since: int) -> tuple[list[int], list[int]]:
        ((_, slices, minutes),) = ask(redis_db, lambda reader: reader.recent([BTC], since))
        return list(slices), list(minutes)

    assert recent(NOW) == ([NOW, NOW + SLICE_MS], [MINUTE, MINUTE + MINUTE_MS])
    assert recent(NOW + SLICE_MS - 1) == recent(NOW)
    assert recent(NOW + SLICE_MS) == ([NOW + SLICE_MS], [MINUTE, MINUTE + MINUTE_MS])
    assert recent(NOW - 1)[0] == [NOW - SLICE_MS, NOW, NOW + SLICE_MS]
    assert recent(MINUTE - 1)[1] == [MINUTE - MINUTE_MS, MINUTE, MINUTE + MINUTE_MS]


def test_a_write_under_which_the_cache_is_closed_is_unavailable(
    cache: RedisWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closing_under_it(connection: redis.Connection, *_: Any, **__: Any) -> None:
        cache.close()  # by another thread, when the connection has been found open and nothing been sent
        socket: Any = connection._sock
        socket.sendall(b"")

    monkeypatch.setattr(redis.Connection, "send_packed_command", closing_under_it)
    with pytest.raises(Unavailable):
        cache.put_slices(one())


def test_of_a_settled_minute_only_the_closed_candle_is_read(cache: RedisWriter, redis_db: RedisServer) -> None:
    starts = [MINUTE - 2 * MINUTE_MS, MINUTE - MINUTE_MS, MINUTE]
    for start in starts:
        cache.put_slices(one(start=start) | one(start=start + MINUTE_MS - SLICE_MS))
    cache.put_minutes(one(start=starts[0], ticks=2) | one(start=starts[1], ticks=2))

    def recent(since: int, at: int) -> tuple[list[int], list[int]]:
        ((_, slices, minutes),) = ask(redis_db, lambda reader: reader.recent([BTC], since), at)
        return sorted(slices), sorted(minutes)

    own = [MINUTE, MINUTE + MINUTE_MS - SLICE_MS]
    assert recent(starts[0], MINUTE + SETTLE_MS) == (own, starts[:2])
    unsettled = [MINUTE - MINUTE_MS, MINUTE - SLICE_MS]
    assert recent(starts[0], MINUTE + SETTLE_MS - 1) == (unsettled + own, starts[:2])
    # The edge lies inside the first minute: of it slices are needed.
    assert recent(starts[0] + 1000, MINUTE + SETTLE_MS) == ([starts[1] - SLICE_MS, *own], starts[:2])
    # A minute that was never closed is there as slices.
    with redis_db.client() as client:
        client.zremrangebyscore(keys.minutes_key(BTC), starts[1], starts[1])
    assert recent(starts[0], MINUTE + SETTLE_MS) == (unsettled + own, starts[:1])


def test_a_pool_of_connections_serves_many_more_requests(cache: RedisWriter, redis_db: RedisServer) -> None:
    cache.put_newest({BTC: TICK})
    cache.put_slices({Slot(BTC, NOW - i * SLICE_MS): candle(NOW - i * SLICE_MS) for i in range(60)})

    async def at_once(reader: RedisReader) -> list[list[Tick | None]]:
        await asyncio.gather(*(reader.recent([BTC], MINUTE) for _ in range(100)))
        return await asyncio.gather(*(reader.newest([BTC]) for _ in range(100)))

    assert ask(redis_db, at_once) == [[TICK]] * 100


def test_queries_wait_for_connection_while_redis_answers(cache: RedisWriter, redis_db: RedisServer) -> None:
    """One connection for queries that together take much longer than the limit of one."""
    cache.put_newest({BTC: TICK})

    async def answer() -> list[list[Tick | None]]:
        reader = RedisReader.connect(keywords(redis_db), SetClock(), SETTLE_MS, max_connections=1)
        query = reader.newest

        async def busy(series: list[Series]) -> list[Tick | None]:
            found = await query(series)
            await asyncio.to_thread(redis_db.client().execute_command, "DEBUG", "SLEEP", "0.05")
            return found

        try:
            return await asyncio.gather(*(busy([BTC]) for _ in range(20)))
        finally:
            await reader.close()

    assert asyncio.run(answer()) == [[TICK]] * 20


def test_ping_does_not_wait_behind_queries(cache: RedisWriter, redis_db: RedisServer) -> None:
    """/health goes by it: with every connection for queries in use Redis is not down."""

    async def question(reader: RedisReader) -> None:
        pool = cast("Any", reader._client.connection_pool)
        used = [await pool.get_connection() for _ in range(pool.max_connections)]
        try:
            with pytest.raises(Unavailable):
                await reader.newest([BTC])
            await reader.ping()
        finally:
            for connection in used:
                await pool.release(connection)

    ask(redis_db, question)


@pytest.mark.parametrize("fault", [killed, frozen])
@pytest.mark.parametrize("requests", [1, 200])
def test_requests_fail_in_time_during_redis_outage(server: RedisServer, fault: Fault, requests: int) -> None:
    """In time by an event loop that keeps up: on a loaded machine 200 requests take longer by the clock."""

    async def fail_in_time(reader: RedisReader) -> None:
        queries = [reader.recent([BTC, ETH], NOW) for _ in range(requests)]
        async with in_time():
            answers = await asyncio.gather(*queries, return_exceptions=True)
        assert {type(answer) for answer in answers} == {Unavailable}

    async def question(reader: RedisReader) -> None:
        await reader.ping()
        with fault(server):
            await fail_in_time(reader)
            with pytest.raises(Unavailable):
                await reader.ping()
        await reader.ping()

    ask(server, question)


def test_reader_started_on_frozen_redis_is_unavailable_in_time(server: RedisServer) -> None:
    async def fail_in_time(reader: RedisReader) -> None:
        async with in_time():
            with pytest.raises(Unavailable):
                await reader.newest([BTC])

    with cache_at(keywords(server)), frozen(server):
        ask(server, fail_in_time)
    assert newest(server) is None


def test_the_password_is_not_in_what_a_reader_says(server: RedisServer) -> None:
    server.password = "battery staple"
    try:
        text = fails_in_time(lambda: newest(server))
    finally:
        server.password = PASSWORD
    assert PASSWORD not in text
    assert "battery staple" not in text


# Others meanwhile


@pytest.mark.parametrize(("buckets", "slots", "pauses"), [(2, 1100, 5), (2, 1000, 0), (1, 1100, 0)])
def test_refill_of_one_of_several_buckets_rests_between_its_calls(
    redis_db: RedisServer, monkeypatch: pytest.MonkeyPatch, buckets: int, slots: int, pauses: int
) -> None:
    rests: list[float] = []
    place = redis_keywords(HOST, redis_db.port, "", 0)
    with closing(RedisWriter.connect(place, [BTC], SetClock(), 70, buckets=buckets)) as writer:
        writer.recover()
        monkeypatch.setattr("marketflow.stores.redis.slot_script.time.sleep", rests.append)
        writer.put_slices(
            {Slot(BTC, MINUTE - 100 * n): candle_of(Tick(1.0, MINUTE - 100 * n, n)) for n in range(slots)}
        )
    assert len(rests) == pauses
    assert all(0 < each < 5 for each in rests)


def test_others_run_while_many_slots_are_decoded() -> None:
    entries = [(codec.encode_candle(candle_of(Tick(1.0, MINUTE + at, at))), float(MINUTE + at)) for at in range(1000)]
    runs = 0

    async def decoded() -> dict[int, Candle]:
        async def count() -> None:
            nonlocal runs
            while True:
                runs += 1
                await asyncio.sleep(0)

        async with background(count()):
            return await _decoded(entries)

    assert len(asyncio.run(decoded())) == 1000
    assert runs >= 1000 // SLOTS_AT_ONCE
