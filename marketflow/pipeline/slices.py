"""The slices that memory holds: the newest of all series, so many that a few series lack none of the window.

They are for three things: every version of a slice that is handed to the cache is the whole one; a cache that lost its
data is refilled; and while it is away periods are cut exactly. The first needs seconds, for ticks are not later than
that, the others the whole window; what does not fit of it is let go of, and only the minutes stay. Of a slice that was
let go no version is made any more, for it would be poorer than the one the cache has: its late ticks count in their
minute alone.

By start first, since that is how they go.
"""

from collections.abc import Iterator

from marketflow.model import SLICE_MS, Candle, Candles, Series, Slot, merge, more_complete, slice_start
from marketflow.stores.cache_limits import SLICES_HELD

HELD_MS = 15_000
"""How long slices are held at least, however many they are: ticks of an exchange that is behind find theirs."""


class Slices:
    """Slices of all series by start (Unix ms); not for several threads at once.

    Args:
        limit: how many are held before the oldest go.
        held_ms: how long they are held however many they are; longer than an exchange's clock may be behind.
    """

    def __init__(self, limit: int = SLICES_HELD, held_ms: int = HELD_MS) -> None:
        self._limit = limit
        self._held_ms = held_ms
        self._by_start: dict[int, dict[Series, Candle]] = {}
        self._count = 0
        self._contested: dict[Slot, tuple[Candle | None, Candle]] = {}  # this run's candle and another process's
        self.whole_from = 0
        """From this time on (Unix ms) no slice was let go of."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Slot, Candle]]:
        for start, by_series in self._by_start.items():
            for series, candle in by_series.items():
                yield Slot(series, start), candle

    def __contains__(self, slot: Slot) -> bool:
        return slot.series in self._by_start.get(slot.start, ())

    def merge(self, slot: Slot, candle: Candle) -> Candle | None:
        """Merge a slice in; gives all of it, None where it was let go of."""
        series, start = slot
        if start < self.whole_from:
            return None
        by_series = self._by_start.get(start)
        if by_series is None:
            by_series = self._by_start[start] = {}
        held = by_series.get(series)
        if held is None:
            self._count += 1
        elif self._contested and slot in self._contested:
            candle = self._settle(slot, candle)
        else:
            candle = merge(held, candle)
        by_series[series] = candle
        return candle

    def contest(self, slot: Slot, other: Candle) -> Candle:
        """Hold the more complete of this run's candle and another process's; gives it.

        Both may be of the same ticks, so they are never added up, nor is what this run has yet to receive.
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
        """Merge this run's ticks with its own ones; gives the more complete candle."""
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

    def all(self) -> Candles:
        """Every slice held."""
        return dict(self)

    def lack(self, before: int, last_at: int) -> None:
        """Make no version of slices that an earlier run left and that are not held here.

        Args:
            before: they begin before this time (Unix ms).
            last_at: the last of their ticks (Unix ms), which may be ahead; beyond what is held it counts for nothing.
        """
        ahead = min(slice_start(last_at) + SLICE_MS, before + self._held_ms)
        self.whole_from = max(self.whole_from, before, ahead)

    def expire(self, oldest: int) -> None:
        """Let go of all that nobody asks for any more: what begins before `oldest` (Unix ms)."""
        for start in [start for start in self._by_start if start < oldest]:
            self._evict(start)

    def fit(self, now_ms: int) -> None:
        """Let go of the oldest while they are too many."""
        # Only a clock that was set back leaves it far ahead, and what is evicted would then be the present. Taken back
        # at any other time, it would have poorer versions made of slices that are not held.
        if self.whole_from > now_ms + self._held_ms:
            self.whole_from = now_ms - self._held_ms
        if self._count <= self._limit:
            return
        for start in sorted(self._by_start):
            # A little more than needed, so that sorting is rare.
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
