"""The slices that all ingest processes write: from Redis, or from memory where that cannot be read."""

from collections.abc import Collection, Mapping

from marketflow.cluster.owner_states import OwnerStates
from marketflow.errors import Unavailable
from marketflow.model import Candles, Series, Slot, candle_of, slice_start
from marketflow.pipeline.state import WindowState
from marketflow.stores.redis.buckets.bucketed_writer import BucketedWriter


class SharedSlices:
    """A SliceReader.

    Args:
        cache: reads Redis.
        memory: has the slices that this process receives.
        owners: reports whether all of them have written what failed during an outage.
    """

    def __init__(self, cache: BucketedWriter, memory: WindowState, owners: OwnerStates) -> None:
        self._cache, self._memory, self._owners = cache, memory, owners
        self._lacking: set[Series] = set()  # Redis may lack slices of them

    def slices_since(self, starts: Mapping[Series, int], until: int) -> tuple[Candles, Collection[Series]]:
        """Return the slices of each series that begin at its time or later, and before `until` (Unix ms).

        They are those in memory where Redis cannot be read or may lack some. The second item is the series of which
        memory may lack some as well.
        """
        self._check_lacking()
        read = {each: start for each, start in starts.items() if each not in self._lacking}
        found, failed = self._cache.slices_since(read, until)
        self._failed(failed)
        unread: set[Series] = set()
        for each in starts.keys() & self._lacking:
            held = self._held(each, starts[each], until)
            found |= held
            if not held:
                unread.add(each)
        return found, unread

    def last_before(self, series: Collection[Series], before: int) -> tuple[Candles, Collection[Series]]:
        """Return the newest slice of each series before a time (Unix ms), or the newest tick during an outage."""
        found, failed = self._cache.last_before(series, before)
        self._failed(failed)
        newest = self._memory.newest_of(failed)
        held = {Slot(each, slice_start(tick.at)): candle_of(tick) for each, tick in newest.items()}
        return found | held, failed - newest.keys()

    def _check_lacking(self) -> None:
        if not self._lacking:
            return
        try:
            if self._owners.have_written():
                self._lacking.clear()
        except Unavailable:
            self._owners.reset_reports()

    def _failed(self, series: Collection[Series]) -> None:
        if series:
            self._lacking.update(series)
            self._owners.reset_reports()

    def _held(self, series: Series, start: int, until: int) -> Candles:
        """Return the slices in memory from `start` on; none if that at `start` is missing: so may be later ones."""
        try:
            slices = self._memory.recent(series, start).slices
        except Unavailable:
            return {}
        if start not in slices:
            return {}
        return {Slot(series, at): candle for at, candle in slices.items() if start <= at < until}
