"""Reads from the memory of the ingest process during an outage of the cache."""

from collections.abc import Callable, Sequence

from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, Tick
from marketflow.stores.ports import CacheReader


class FallbackReader:
    """Reads the cache while it has all that was written, the memory of this process otherwise.

    Args:
        cache: the first choice.
        memory: the second.
        complete: whether the cache has everything; a Redis that rejects writes still answers, with old prices.
    """

    def __init__(self, cache: CacheReader, memory: CacheReader, complete: Callable[[], bool]) -> None:
        self._cache = cache
        self._memory = memory
        self._complete = complete

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series."""
        if self._complete():
            try:
                return await self._cache.newest(series)
            except Unavailable:
                pass  # the writer reports the outage
        return await self._memory.newest(series)

    def newest_in_memory(self, series: Sequence[Series]) -> list[Tick | None] | None:
        """The newest tick of each series, if all of them are in memory."""
        return self._chosen.newest_in_memory(series)

    def summary_in_memory(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None] | None:
        """One candle for each series of all that is held from `since` on, if all of it is in memory."""
        return self._chosen.summary_in_memory(series, since, until)

    @property
    def _chosen(self) -> CacheReader:
        return self._cache if self._complete() else self._memory

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of all that is held from `since` on."""
        if self._complete():
            try:
                return await self._cache.summary(series, since, until)
            except Unavailable:
                pass
        return await self._memory.summary(series, since, until)

    async def by_minute(self, series: Sequence[Series], since: int, until: int) -> list[dict[int, Candle]]:
        """The minutes of each series from `since` on, by their start."""
        if self._complete():
            try:
                return await self._cache.by_minute(series, since, until)
            except Unavailable:
                pass
        return await self._memory.by_minute(series, since, until)
