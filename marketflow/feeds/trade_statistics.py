"""Rate of the ticks of each series, and their delay from event to receipt, over the last minute or so.

A candle counts as one sample of the delay, that of its last tick, so the cost grows with candles and not with ticks;
memory is bounded by the number of series. The delay is by two clocks: where that of the exchange is ahead, it is zero.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from marketflow.counters import DelayCounter, Delays
from marketflow.model import NANOSECONDS_PER_MS, Candle, Candles, Series

PERIOD_MS = 30_000
"""Length of a period; statistics are of the last whole one and the running one."""

BOUNDS_MS = (0, *sorted({round(10 ** (step / 16)) for step in range(5 * 16 + 1)}))
"""Bounds of the histogram of a series, from 1 ms to 100 s, each at most 16 % above the one before from 7 ms on."""


class SeriesStatistics(NamedTuple):
    """Of one series: ticks a second, and percentiles of the delay (ms), None without a tick."""

    ticks_per_second: float
    delay_p50_ms: float | None
    delay_p99_ms: float | None


NO_TICKS = SeriesStatistics(0.0, None, None)


class _Periods:
    """The running period of a series and the one before."""

    __slots__ = ("before", "before_ticks", "began", "delays", "ticks")

    def __init__(self, began: int) -> None:
        self.began = began
        self.ticks = self.before_ticks = 0
        self.delays = self.before = _histogram()

    def begin(self, now_ms: int) -> None:
        """Begin the next period; after a longer pause nothing of before counts."""
        follows = now_ms < self.began + 2 * PERIOD_MS
        self.before, self.before_ticks = (self.delays, self.ticks) if follows else (_histogram(), 0)
        self.began = self.began + PERIOD_MS if follows else now_ms
        self.delays, self.ticks = _histogram(), 0


class TradeStatistics:
    """Statistics of all series. `observe` is for one thread; any may read."""

    def __init__(self) -> None:
        self._series: dict[Series, _Periods] = {}
        self._of_exchanges: dict[str, DelayCounter] = {}
        self._began: int | None = None

    def observe(self, batch: Candles, now_ms: int) -> None:
        """Count the ticks of a batch.

        Args:
            batch: new ticks, as candles.
            now_ms: the time (Unix ms).
        """
        if self._began is None:
            self._began = now_ms
        newest: dict[str, Candle] = {}
        for (series, _), candle in batch.items():
            periods = self._series.get(series)
            if periods is None:
                periods = self._series[series] = _Periods(now_ms)
            elif not periods.began <= now_ms < periods.began + PERIOD_MS:
                periods.begin(now_ms)
            periods.ticks += candle.ticks
            delay = candle.last_sequence // NANOSECONDS_PER_MS - candle.last_at
            periods.delays[bisect_left(BOUNDS_MS, delay)] += 1
            newest[series.exchange] = candle
        for exchange, candle in newest.items():
            counter = self._of_exchanges.get(exchange)
            if counter is None:
                counter = self._of_exchanges[exchange] = DelayCounter()
            counter.count([(candle.last_sequence / NANOSECONDS_PER_MS - candle.last_at) / 1000])

    def of(self, series: Series, now_ms: int) -> SeriesStatistics:
        """The statistics of a series at a time (Unix ms)."""
        periods = self._series.get(series)
        if periods is None or now_ms >= periods.began + 2 * PERIOD_MS:
            return NO_TICKS
        delays = list(periods.delays)
        if now_ms < periods.began + PERIOD_MS:
            delays = [a + b for a, b in zip(delays, periods.before, strict=True)]
        return SeriesStatistics(self.rate(series, now_ms), percentile(delays, 0.5), percentile(delays, 0.99))

    def rate(self, series: Series, now_ms: int) -> float:
        """The ticks a second of a series at a time (Unix ms)."""
        periods = self._series.get(series)
        if periods is None or self._began is None or now_ms >= periods.began + 2 * PERIOD_MS:
            return 0.0
        ticks, since = periods.ticks, periods.began
        if now_ms < since + PERIOD_MS:  # later the running period has ended, and no tick has begun the next one
            ticks, since = ticks + periods.before_ticks, since - PERIOD_MS
        return 1000 * ticks / max(now_ms - max(since, self._began), 1000)

    def delays_of(self, exchange: str) -> Delays:
        """Histogram of the delays of an exchange since the start: one sample a batch."""
        return self._of_exchanges.get(exchange, _NO_DELAYS).so_far()


_NO_DELAYS = DelayCounter()


def percentile(counts: Sequence[int], part: float) -> float | None:
    """A percentile in ms of a histogram by BOUNDS_MS; None of an empty one.

    Args:
        counts: `counts[i]` are above `BOUNDS_MS[i - 1]` and at most `BOUNDS_MS[i]`; the last is of those above all.
        part: 0.5 for the median.
    """
    rank = part * sum(counts)
    below = 0
    for number, count in enumerate(counts):
        if count and below + count >= rank:
            if number in (0, len(BOUNDS_MS)):
                return float(BOUNDS_MS[min(number, len(BOUNDS_MS) - 1)])
            low, high = BOUNDS_MS[number - 1], BOUNDS_MS[number]
            return round(low + (high - low) * (rank - below) / count, 1)
        below += count
    return None


def _histogram() -> "array[int]":
    return array("I", bytes(4 * (len(BOUNDS_MS) + 1)))
