"""Bounded buffer of slices whose write to the cache has failed; drops the oldest first.

They are held here until the cache has them or their minute has closed, also after the window state has evicted them:
possibly no other process has them, and this one may be killed. A refill writes them first, so that refills that fail
again and again write all of them in turn.
"""

import threading
from collections.abc import Iterable

from marketflow.logs import RateLimit
from marketflow.model import Candle, Candles, Series, Slot

MOST_UNWRITTEN = 1_000_000
"""How many are held, 340 MB with their candles: a minute of 15,000 series at a tick a second."""

LOG_SECONDS = 60.0
"""Least time between two log lines about dropped slices."""


class UnwrittenSlices:
    """Slices that the cache may lack, by start (Unix ms); for any number of threads.

    Args:
        limit: number beyond which the oldest are dropped.
    """

    def __init__(self, limit: int = MOST_UNWRITTEN) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._by_start: dict[int, dict[Series, Candle]] = {}
        self._count = 0
        self._log = RateLimit(LOG_SECONDS)

    def __len__(self) -> int:
        return self._count

    def add(self, slices: Iterable[tuple[Slot, Candle]]) -> None:
        """Hold slices that were not written, in place of earlier versions."""
        dropped = 0
        with self._lock:
            for (series, start), candle in slices:
                by_series = self._by_start.setdefault(start, {})
                self._count += series not in by_series
                by_series[series] = candle
            while self._count > self._limit:
                dropped += self._drop(min(self._by_start))
        if dropped:
            self._log.log(
                "dropped",
                "ERROR",
                f"{dropped} slices that Redis lacks are dropped: at most {self._limit} are held. If this process is"
                " killed before their minute is over, their ticks are lost",
            )

    def remove(self, slices: Iterable[tuple[Slot, Candle]]) -> None:
        """Remove slices that were written; return at once while none are held."""
        if not self._count:
            return
        with self._lock:
            for (series, start), _ in slices:
                by_series = self._by_start.get(start)
                if by_series is not None and by_series.pop(series, None) is not None:
                    self._count -= 1
                    if not by_series:
                        del self._by_start[start]

    def expire(self, before: int) -> None:
        """Remove slices that begin before a time (Unix ms)."""
        if not self._count:
            return
        with self._lock:
            for start in [start for start in self._by_start if start < before]:
                self._drop(start)

    def all(self) -> Candles:
        """Return all held slices, the oldest first."""
        with self._lock:
            return {
                Slot(series, start): candle
                for start in sorted(self._by_start)
                for series, candle in self._by_start[start].items()
            }

    def _drop(self, start: int) -> int:
        number = len(self._by_start.pop(start))
        self._count -= number
        return number
