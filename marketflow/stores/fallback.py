"""Reads of the process that ingests: from its memory what that has first, from the cache what the cache has longer."""

from collections.abc import Callable, Sequence

from marketflow.clock import Clock, milliseconds, system_clock
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick, minute_start
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.ports import CacheReader

MANY_SERIES = 100
"""Of more series, minutes of this run are read from memory: in the cache, the last ones are slices. The minutes of
15,000 series with a tick a second took 7 s of CPU, and take 0.2 s.
"""


class FallbackReader:
    """Reads newest ticks of this run from memory, and minutes of many series; all else from the cache while it has all.

    Args:
        cache: where everything is, a moment later than in memory.
        memory: of this process.
        complete: whether the cache has everything; a Redis that rejects writes still answers, with old prices.
        run_began: Unix ns; of ticks that were received before it, the cache may have a newer one than memory.
        clock: the time by which memory expires minutes.
    """

    def __init__(
        self,
        cache: CacheReader,
        memory: CacheReader,
        complete: Callable[[], bool],
        run_began: int = 0,
        clock: Clock = system_clock,
    ) -> None:
        self._cache = cache
        self._memory = memory
        self._complete = complete
        self._run_began = run_began
        self._clock = clock

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series."""
        held = await self._memory.newest(series)
        earlier = self._of_earlier_runs(held)
        if not earlier or not self._complete():
            return held
        try:
            cached = await self._cache.newest([series[i] for i in earlier])
        except Unavailable:
            return held  # the writer reports the outage
        return _newer_of_both(held, earlier, cached)

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """The newest tick of each series, if all of them are in memory."""
        held = self._memory.newest_in_memory(series)
        if held is None:
            return None
        earlier = self._of_earlier_runs(held)
        if not earlier or not self._complete():
            return held
        cached = self._cache.newest_in_memory([series[i] for i in earlier])
        return None if cached is None else _newer_of_both(held, earlier, cached)

    def _of_earlier_runs(self, held: Sequence[Tick | None]) -> list[int]:
        """Indexes of the series without a tick of this run, of which the cache may have a newer one."""
        return [i for i, tick in enumerate(held) if tick is None or tick.sequence < self._run_began]

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """One candle for each series of all that is held from `since` on, if all of it is in memory."""
        return self._chosen.summary_in_memory(series, since, until)

    def _is_in_memory(self, since: int) -> bool:
        """Whether memory has all minutes from a time on (Unix ms): they are of this run, and have not expired."""
        began = milliseconds(self._run_began) + MINUTE_MS  # the clocks of exchanges may have been ahead
        oldest = minute_start(milliseconds(self._clock())) - RECENT_MS
        return since % MINUTE_MS == 0 and since >= max(began, oldest)

    @property
    def _chosen(self) -> CacheReader:
        return self._cache if self._complete() else self._memory

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is held from `since` on."""
        if self._complete() and not (len(series) > MANY_SERIES and self._is_in_memory(since)):
            try:
                return await self._cache.summary(series, since, until)
            except Unavailable:
                pass  # the writer reports the outage
        return await self._memory.summary(series, since, until)

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start."""
        if self._complete():
            try:
                return await self._cache.by_minute(series, since, until)
            except Unavailable:
                pass
        return await self._memory.by_minute(series, since, until)


def _newer_of_both(held: list[Tick | None], earlier: Sequence[int], cached: Sequence[Tick | None]) -> list[Tick | None]:
    """Put the cached ticks of the series at the indexes `earlier` into `held` where they are newer."""
    for i, tick in zip(earlier, cached, strict=True):
        mine = held[i]
        if tick is not None and (mine is None or tick.order > mine.order):
            held[i] = tick
    return held
