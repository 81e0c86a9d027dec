"""Bounded buffer of 100 ms slices; evicts the oldest first. With few series it holds the whole window.

It serves three purposes: every version of a slice written to the cache is complete; a cache that lost its data is
refilled; and while the cache is down, time ranges are exact. The first needs the last seconds, since ticks are not
later than that, the others the whole window. A slice that was evicted is written no more, since a new version would be
less complete than the one in the cache; its late ticks count in the minute alone.

Grouped by start, which is the order of eviction.
"""

from collections.abc import Callable, Collection

from marketflow.model import SLICE_MS, Candle, Candles, Series, Slot, merge, more_complete, slice_start
from marketflow.stores.cache_limits import SLICES_HELD

HELD_MS = 15_000
"""Time for which slices are held even beyond the limit: late ticks of an exchange need them."""


class Slices:
    """Slices of all series by start (Unix ms); for one thread at a time.

    Args:
        limit: number beyond which the oldest are evicted.
        held_ms: time for which they are held even beyond that; longer than the clock of an exchange may be behind.
    """

    def __init__(self, limit: int = SLICES_HELD, held_ms: int = HELD_MS) -> None:
        self._limit = limit
        self._held_ms = held_ms
        self._by_start: dict[int, dict[Series, Candle]] = {}
        self._count = 0
        self._contested: dict[Slot, tuple[Candle | None, Candle]] = {}  # this run's candle and another process's
        self.whole_from = 0
        """From this time on (Unix ms) no slice was evicted."""

    def __len__(self) -> int:
        return self._count

    def __contains__(self, slot: Slot) -> bool:
        return slot.series in self._by_start.get(slot.start, ())

    @property
    def contested(self) -> Collection[Slot]:
        """Slices of which another process's candle was more complete than this run's when it was read."""
        return self._contested

    def merge(self, batch: Candles) -> Candles:
        """Merge ticks into slices; return the whole slices, without those that were evicted."""
        whole: Candles = {}
        contested, begun = self._contested, -1
        by_series: dict[Series, Candle] = {}
        for slot, candle in batch.items():
            series, start = slot
            if start < self.whole_from:
                continue
            if start != begun:  # most begin at the same time
                begun, by_series = start, self._by_start.setdefault(start, {})
            held = by_series.get(series)
            if held is None:
                self._count += 1
                merged = candle
            elif contested and slot in contested:
                merged = self._settle(slot, candle)
            else:
                merged = merge(held, candle)
            by_series[series] = whole[slot] = merged
        return whole

    def contest(self, slot: Slot, other: Candle) -> Candle:
        """Keep and return the more complete of this run's candle and another process's.

        Both may be of the same ticks, so they are never merged, and later ticks of this run go to its own candle.
        """
        series, start = slot
        by_series = self._by_start.setdefault(start, {})
        held = by_series.get(series)
        if held is not None and held.ticks >= other.ticks:
            return held
        self._count += held is None
        own, _ = self._contested.get(slot, (held, other))
        self._contested[slot] = own, other
        by_series[series] = other
        return other

    def _settle(self, slot: Slot, candle: Candle) -> Candle:
        """Merge ticks into this run's own candle; return the more complete of it and the other process's."""
        own, other = self._contested[slot]
        own = candle if own is None else merge(own, candle)
        self._contested[slot] = own, other
        return more_complete(other, own)

    def between(self, series: Series, since: int, until: int) -> list[Candle]:
        """The slices of a series that begin at or after `since` and before `until`, both starts of slices."""
        found = (self._by_start.get(start) for start in range(since, until, SLICE_MS))
        return [by_series[series] for by_series in found if by_series is not None and series in by_series]

    def of(self, series: Series, since: int) -> dict[int, Candle]:
        """The slices of a series whose last tick is not before `since` (Unix ms), by start."""
        return {
            start: candle
            for start, by_series in self._by_start.items()
            if start > since - SLICE_MS and (candle := by_series.get(series)) is not None and candle.last_at >= since
        }

    def copied(self) -> list[tuple[int, dict[Series, Candle]]]:
        """A copy of all slices by start (Unix ms), in a fraction of the time that their slots take."""
        return [(start, dict(by_series)) for start, by_series in self._by_start.items()]

    def mark_evicted(self, before: int, last_at: int) -> None:
        """Mark slices of an earlier run that are not held here as evicted.

        Args:
            before: they begin before this time (Unix ms).
            last_at: the last of their ticks (Unix ms), which may be ahead; ignored beyond `held_ms`.
        """
        ahead = min(slice_start(last_at) + SLICE_MS, before + self._held_ms)
        self.whole_from = max(self.whole_from, before, ahead)

    def remove(self, unwanted: Callable[[Series], bool]) -> None:
        """Remove the slices of some series."""
        for start, by_series in self._by_start.items():
            for series in [series for series in by_series if unwanted(series)]:
                del by_series[series]
                self._count -= 1
                self._contested.pop(Slot(series, start), None)

    def expire(self, oldest: int) -> None:
        """Remove slices that no query needs any more: those that begin before `oldest` (Unix ms)."""
        for start in [start for start in self._by_start if start < oldest]:
            self._evict(start)

    def fit(self, now_ms: int) -> None:
        """Evict the oldest while they are too many."""
        # `whole_from` is far ahead only after the clock was set back, and would then evict current slices. Lowered at
        # any other time, less complete versions of evicted slices would be written.
        if self.whole_from > now_ms + self._held_ms:
            self.whole_from = now_ms - self._held_ms
        if self._count <= self._limit:
            return
        for start in sorted(self._by_start):
            # Some more than needed, so that sorting is rare.
            if start >= now_ms - self._held_ms or self._count <= self._limit * 0.95:
                break
            self._evict(start)
            self.whole_from = start + SLICE_MS

    def _evict(self, start: int) -> None:
        by_series = self._by_start.pop(start)
        self._count -= len(by_series)
        if self._contested:
            for series in by_series:
                self._contested.pop(Slot(series, start), None)
