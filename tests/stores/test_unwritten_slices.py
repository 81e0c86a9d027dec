"""Slices whose write has failed: how many are held, and until when."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import redis
from loguru import logger

from marketflow.errors import Unavailable
from marketflow.model import Candle, Candles, Mode, Series, Slot, Tick, candle_of
from marketflow.stores.redis.connection import connection_keywords
from marketflow.stores.redis.writer import RedisWriter
from marketflow.stores.unwritten_slices import UnwrittenSlices
from tests.support.servers import HOST, RedisServer

NOW = 1_700_000_000_000
SERIES = [Series(Mode.LIVE, "exchange1", f"COIN{number}") for number in range(1000)]


def candle(price: float, at: int) -> Candle:
    return candle_of(Tick(price, at, 1))


def slices(*starts: int, of: int = 1) -> Candles:
    return {Slot(series, start): candle(1.0, start) for start in starts for series in SERIES[:of]}


def test_later_version_replaces_an_earlier_one() -> None:
    unwritten = UnwrittenSlices()
    unwritten.add({Slot(SERIES[0], 100): candle(1.0, 100)}.items())
    unwritten.add({Slot(SERIES[0], 100): candle(2.0, 110)}.items())
    assert unwritten.all() == {Slot(SERIES[0], 100): candle(2.0, 110)}
    assert len(unwritten) == 1


def test_slices_that_are_written_or_no_longer_needed_are_removed() -> None:
    unwritten = UnwrittenSlices()
    unwritten.add(slices(300, 100, 200, of=2).items())
    unwritten.remove(slices(200, 400, of=3).items())
    assert list(unwritten.all()) == [Slot(series, start) for start in (100, 300) for series in SERIES[:2]]
    unwritten.expire(300)
    assert unwritten.all() == slices(300, of=2)
    unwritten.remove(slices(300, of=2).items())
    assert (len(unwritten), unwritten.all()) == (0, {})


def test_oldest_are_dropped_beyond_the_limit_and_the_log_says_so() -> None:
    lines: list[str] = []
    sink = logger.add(lines.append, level="ERROR", format="{message}")
    unwritten = UnwrittenSlices(5)
    unwritten.add(slices(100, 300, of=2).items())
    assert not lines
    unwritten.add(slices(200, of=2).items())
    unwritten.add(slices(400, of=3).items())
    logger.remove(sink)
    assert unwritten.all() == slices(300, of=2) | slices(400, of=3)
    (line,) = lines
    assert line.startswith("2 slices that Redis lacks are dropped")


@pytest.fixture
def cache(redis_db: RedisServer) -> Iterator[RedisWriter]:
    place = connection_keywords(HOST, redis_db.port, redis_db.password, 0)
    with closing(RedisWriter.connect(place, SERIES, lambda: NOW * 10**6, 70)) as writer:
        writer.recover()
        yield writer


def test_writes_that_fail_midway_reach_all_slices_in_turn(cache: RedisWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt writes one call of 250 slices and fails at the next one."""
    wanted = slices(NOW - 1000, of=1000)
    evaluate: Any = redis.Redis.eval
    calls = 0

    def every_second_one(self: "redis.Redis", *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 2 == 0:
            raise redis.TimeoutError("Timeout reading from socket")
        return evaluate(self, *arguments)

    monkeypatch.setattr(redis.Redis, "eval", every_second_one)
    for written in (250, 500, 750, 1000):
        with pytest.raises(Unavailable):
            cache.put_slices(cache.unwritten.all() | wanted)  # as a refill
        cache._calls._circuit_breaker().succeeded()  # it is over
        assert len(cache.between(NOW - 2000, NOW).slices) == written
    monkeypatch.undo()
    cache.put_slices(cache.unwritten.all())
    assert len(cache.unwritten) == 0


def test_slices_refused_by_the_circuit_breaker_are_held(cache: RedisWriter) -> None:
    cache._calls._circuit_breaker().failed()
    with pytest.raises(Unavailable):
        cache.put_slices(slices(NOW, of=3))
    assert cache.unwritten.all() == slices(NOW, of=3)
    assert not cache.complete
