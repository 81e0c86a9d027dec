"""Which of cache and memory answers."""

import asyncio
from collections.abc import Sequence

import pytest

from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick, candle_of
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.fallback import MANY_SERIES, FallbackReader
from tests.support.market import BTC


class Scripted:
    """Answers with one price, or not at all."""

    def __init__(self, price: float, unavailable: bool = False, at: int = 1) -> None:
        self.unavailable = unavailable
        self.asked = 0
        self.candle = candle_of(Tick(price, at, at))
        self.tick: Tick | None = self.candle.newest

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        self._ask()
        return [self.tick for _ in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        self._ask()
        return [self.candle for _ in series]

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        self._ask()
        return [{since: self.candle} for _ in series]

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        return [self.tick for _ in series]

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        return [self.candle for _ in series]

    def _ask(self) -> None:
        self.asked += 1
        if self.unavailable:
            raise Unavailable("unavailable")


def ask(reader: FallbackReader) -> tuple[float, float]:
    """The closes of a summary and of a minute."""

    async def answers() -> tuple[float, float]:
        (candle,) = await reader.summary([BTC], 0, 1)
        (minutes,) = await reader.by_minute([BTC], 0, 1)
        assert candle is not None
        return candle.close, minutes[0].close

    return asyncio.run(answers())


def newest(reader: FallbackReader) -> float | None:
    """The newest price, which is the same where it is answered at once."""
    (tick,) = asyncio.run(reader.newest([BTC]))
    assert reader.newest_in_memory([BTC]) == [tick]
    return tick.price if tick is not None else None


def summary_at_once(reader: FallbackReader) -> float | None:
    (candle,) = reader.summary_in_memory([BTC], 0, 1) or [None]
    return candle.close if candle is not None else None


def test_a_complete_cache_answers_about_periods() -> None:
    memory = Scripted(2.0)
    reader = FallbackReader(Scripted(1.0), memory, lambda: True)
    assert (*ask(reader), summary_at_once(reader)) == (1.0, 1.0, 1.0)
    assert memory.asked == 0


def test_memory_answers_for_an_incomplete_cache() -> None:
    cache = Scripted(1.0)
    reader = FallbackReader(cache, Scripted(2.0), lambda: False)
    assert (*ask(reader), newest(reader), summary_at_once(reader)) == (2.0, 2.0, 2.0, 2.0)
    assert cache.asked == 0


@pytest.mark.parametrize(
    ("series", "since", "now", "from_memory"),
    [
        (MANY_SERIES + 1, 3 * MINUTE_MS, 4 * MINUTE_MS, True),
        (MANY_SERIES, 3 * MINUTE_MS, 4 * MINUTE_MS, False),
        (MANY_SERIES + 1, 2 * MINUTE_MS, 4 * MINUTE_MS, False),  # an exchange's clock may have been ahead of the start
        (MANY_SERIES + 1, 3 * MINUTE_MS + 1, 4 * MINUTE_MS, False),
        (MANY_SERIES + 1, 3 * MINUTE_MS, 4 * MINUTE_MS - 1 + RECENT_MS, True),
        (MANY_SERIES + 1, 3 * MINUTE_MS, 4 * MINUTE_MS + RECENT_MS, False),  # a day's minutes are in the cache alone
    ],
)
def test_whole_minutes_of_many_series_are_read_from_memory(
    series: int, since: int, now: int, from_memory: bool
) -> None:
    cache, memory = Scripted(1.0), Scripted(2.0)
    began, clock = (2 * MINUTE_MS - 1000) * NANOSECONDS_PER_MS, lambda: now * NANOSECONDS_PER_MS
    reader = FallbackReader(cache, memory, lambda: True, began, clock)
    found = asyncio.run(reader.summary([BTC] * series, since, since + MINUTE_MS))
    assert found == [memory.candle if from_memory else cache.candle] * series


def test_memory_answers_during_cache_outage() -> None:
    reader = FallbackReader(Scripted(1.0, unavailable=True), Scripted(2.0), lambda: True, run_began=100)
    assert (*ask(reader), newest(reader)) == (2.0, 2.0, 2.0)


def test_newest_tick_of_this_run_is_read_from_memory_alone() -> None:
    cache = Scripted(1.0, at=9)
    assert newest(FallbackReader(cache, Scripted(2.0), lambda: True, run_began=1)) == 2.0
    assert cache.asked == 0


@pytest.mark.parametrize(("cached_at", "expected"), [(0, 2.0), (9, 1.0)])
def test_of_an_earlier_run_the_newer_tick_of_both_counts(cached_at: int, expected: float) -> None:
    assert newest(FallbackReader(Scripted(1.0, at=cached_at), Scripted(2.0), lambda: True, run_began=2)) == expected


def test_newest_tick_that_memory_lacks_is_read_from_the_cache() -> None:
    memory = Scripted(2.0)
    memory.tick = None
    assert newest(FallbackReader(Scripted(1.0), memory, lambda: True)) == 1.0
