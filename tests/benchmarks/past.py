"""What MarketFlow would have stored if it had run for a day: minutes in both stores, slices of the last minutes."""

import math
from collections.abc import Iterator, Sequence

from marketflow.clock import milliseconds, system_clock
from marketflow.model import MINUTE_MS, SLICE_MS, Candle, Candles, Mode, Series, Slot, minute_start, slice_start
from marketflow.resources import resource
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS
from marketflow.stores.postgres.writer import PostgresWriter
from marketflow.stores.redis.connection import connection_keywords
from marketflow.stores.redis.writer import RedisWriter
from tests.benchmarks.stage import Stage
from tests.support.servers import HOST

TTL_SECONDS = 70


def remember_a_day(stage: Stage, exchanges: Sequence[str], symbols: Sequence[str], ticks_a_second: float) -> None:
    """Write a day that ends now, of `ticks_a_second` of each series; before MarketFlow is started."""
    series = [Series(Mode.LIVE, exchange, symbol) for exchange in exchanges for symbol in symbols]
    now_ms = milliseconds(system_clock())
    open_minute = minute_start(now_ms)
    ticks = max(1, round(ticks_a_second * SLICE_MS / 1000))
    slices = _candles(series, open_minute - RECENT_MS, slice_start(now_ms), SLICE_MS, ticks)
    minutes = _candles(series, open_minute - MINUTES_KEPT_MS, open_minute, MINUTE_MS, ticks * MINUTE_MS // SLICE_MS)

    cache = RedisWriter.connect(
        connection_keywords(HOST, stage.redis.port, "", 0), series, system_clock, ttl_seconds=TTL_SECONDS
    )
    cache.recover()
    cache.unarchived()
    cache.put_slices(slices)
    cache.put_minutes(minutes)
    cache.mark_archived(open_minute)
    cache.close()
    archive = PostgresWriter(stage.postgres.keywords, resource("ddl"), batch_size=1000)
    archive.write(minutes)
    archive.close()


def _candles(series: Sequence[Series], begin: int, end: int, length_ms: int, ticks: int) -> Candles:
    """A candle of `ticks` ticks for each slot of `length_ms` between two times (Unix ms)."""
    return {
        Slot(each, start): _candle(start, length_ms, ticks, price)
        for number, each in enumerate(series)
        for start, price in _prices(begin, end, length_ms, 100.0 * (number + 1))
    }


def _prices(begin: int, end: int, step_ms: int, base: float) -> Iterator[tuple[int, float]]:
    for start in range(begin, end, step_ms):
        yield start, round(base * (1 + 0.01 * math.sin(start / 1e5)), 4)


def _candle(start: int, length_ms: int, ticks: int, price: float) -> Candle:
    first, last = start, start + length_ms - 1
    high, low = round(price * 1.001, 4), round(price * 0.999, 4)
    middle = start + length_ms // 2
    return Candle(
        open=price,
        high=high,
        low=low,
        close=price,
        total=price * ticks,
        ticks=ticks,
        first_at=first,
        last_at=last,
        high_at=middle,
        low_at=middle,
        first_sequence=first * 1_000_000,
        last_sequence=last * 1_000_000,
    )
