"""The slices that memory holds: the newest of all series, so many that a few series lack none of the window.

They are for three things: every version of a slice that is handed to the cache is the whole one; a cache that lost its
data is refilled; and while it is away periods are cut exactly. The first needs seconds, for ticks are not later than
that, the others the whole window; what does not fit of it is let go of, and only the minutes stay. Of a slice that was
let go no version is made any more, for it would be poorer than the one the cache has: its late ticks count in their
minute alone.

By start first, since that is how they go.
"""

from collections.abc import Iterator

from marketflow.model import SLICE_MS, Candle, Candles, Series, Slot, merge, slice_start
from marketflow.stores.ports import SLICES_HELD

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
        else:
            candle = merge(held, candle)
        by_series[series] = candle
        return candle

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

    def forget(self, oldest: int) -> None:
        """Let go of all that nobody asks for any more: what begins before `oldest` (Unix ms)."""
        for start in [start for start in self._by_start if start < oldest]:
            self._count -= len(self._by_start.pop(start))

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
            self._count -= len(self._by_start.pop(start))
            self.whole_from = start + SLICE_MS
