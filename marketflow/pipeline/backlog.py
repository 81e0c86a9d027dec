"""Minutes on their way to the archive: the backlog of those that it has not confirmed, and the write that empties it.

The cache keeps a day of minutes as well, from which a restart recovers the backlog.
"""

import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from loguru import logger

from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.model import Candles, Series, Slot, minute_start, put_more_complete
from marketflow.pipeline.instrumentation import Instrumentation
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.pipeline.state import WindowState
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.ports import ArchiveWriter, CacheWriter, Rollups

DEFAULT_LIMIT = 500_000
"""Rows that the backlog holds at most."""

ROWS_A_PART = 1000
"""Minutes that are written to the cache and confirmed at once."""


class Pending(NamedTuple):
    """How many rows the archive has not confirmed: those that the cache has, and those that are in neither store."""

    in_cache: int
    in_no_store: int


class Backlog:
    """Bounded buffer of minute rows: keeps the more complete version of each, and beyond the limit drops the oldest.

    Args:
        limit: rows at most.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._rows: Candles = {}
        self._cached: Candles = {}  # of the rows, those that the cache has in this version
        self.dropped = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, minutes: Candles) -> int:
        """Add minutes, or more complete versions of those that are pending; return how many rows were dropped."""
        with self._lock:
            for slot, candle in minutes.items():
                put_more_complete(self._rows, slot, candle)
            excess = max(0, len(self._rows) - self._limit)
            if excess:
                for slot in sorted(self._rows, key=lambda slot: slot.start)[:excess]:
                    self._remove(slot)
            self.dropped += excess
            return excess

    def rows(self) -> Candles:
        """All pending rows."""
        with self._lock:
            return dict(self._rows)

    def confirm(self, written: Candles) -> None:
        """Remove rows that the archive has, unless a newer version is pending."""
        with self._lock:
            for slot, candle in written.items():
                if self._rows.get(slot) is candle:
                    self._remove(slot)

    def _remove(self, slot: Slot) -> None:
        del self._rows[slot]
        self._cached.pop(slot, None)

    def complete_until(self, now_ms: int) -> int:
        """Start (Unix ms) of a minute before which no row is pending or can follow.

        Late ticks make new versions of a minute for as long as it is in the window state.
        """
        with self._lock:
            return min([minute_start(now_ms) - RECENT_MS, *(slot.start for slot in self._rows)])

    # The cache, from which a restart recovers what is pending

    def note_cached(self, minutes: Candles) -> None:
        """Note that the cache has these versions."""
        with self._lock:
            for slot, candle in minutes.items():
                if self._rows.get(slot) is candle:
                    self._cached[slot] = candle

    def note_uncached(self, minutes: Iterable[Slot]) -> None:
        """Note that the cache may have lost these."""
        with self._lock:
            for slot in minutes:
                self._cached.pop(slot, None)

    def uncached(self) -> Candles:
        """Pending rows that the cache has not confirmed."""
        with self._lock:
            return {slot: candle for slot, candle in self._rows.items() if self._cached.get(slot) is not candle}

    def pending(self) -> Pending:
        """How many rows are pending now."""
        with self._lock:
            in_cache = sum(self._rows[slot] is candle for slot, candle in self._cached.items())
            return Pending(in_cache, len(self._rows) - in_cache)


class ArchiveSink:
    """Writes the rows of the backlog to the archive, and rolls up its days.

    Args:
        state: adopts what an earlier run archived of the last minutes.
        backlog: rows that the archive has not confirmed.
        cache: gets the mark before which all minutes are archived.
        archive: where rows are kept.
        rollups: daily candles in the archive.
        series: returns all series of this process.
        clock: wall-clock time.
        log: counts and logs.
        ownership: which shards are written here.
    """

    def __init__(
        self,
        state: WindowState,
        backlog: Backlog,
        cache: CacheWriter,
        archive: ArchiveWriter,
        rollups: Rollups,
        series: Callable[[], Iterable[Series]],
        clock: Clock,
        log: Instrumentation,
        ownership: Ownership,
    ) -> None:
        self._state, self._backlog, self._cache, self._archive = state, backlog, cache, archive
        self._ownership = ownership
        self._rollups, self._series, self._clock, self._log = rollups, series, clock, log
        self.available_once = threading.Event()
        """Set when the archive has answered for the first time."""
        self._backlog_recovered: frozenset[str] = frozenset()
        self._windows_ended = False

    def backlog_recovered(self, shards: frozenset[str]) -> None:
        """Note that the backlog holds what earlier runs and owners have not archived of these shards."""
        self._backlog_recovered |= shards

    def backlog_lost(self, shards: frozenset[str]) -> None:
        """Note that another process archives these shards from now on."""
        self._backlog_recovered -= shards

    def upsert_rows(self) -> None:
        """Write all rows that are pending now, and confirm them to the backlog and to the cache.

        Raises:
            Unavailable: some are not written, or not known to be.
        """
        now_ms = milliseconds(self._clock())
        # Before the first row of this run is written, which would be read back as one of an earlier run.
        if (since := self._state.lacks_since(now_ms)) is not None:
            self._state.adopt(self._archive.recent(self._series(), since), since)
            if self._windows_ended:
                self._add_changed()
        rows = self._backlog.rows()
        self._archive.write(rows, self._written)
        self._answered()
        if not rows:
            return
        # Read before `complete_until`: the mark must not cover a recovered row that is added after it.
        complete = self._backlog_recovered & self._ownership.owned
        until = self._backlog.complete_until(now_ms)
        try:
            if complete:
                self._cache.mark_archived(until, complete)
        except Unavailable:
            logger.debug("archived minutes are not marked in the cache: a restart would write some rows once more")

    def _written(self, rows: Candles, rejected: int) -> None:
        self._answered()
        self._log.rows_written(len(rows), rejected)
        self._cache.note_stored(rows)
        self._backlog.confirm(rows)

    def _answered(self) -> None:
        self._log.archive_available()
        self.available_once.set()

    # The end

    def end_windows(self) -> Candles:
        """Return all minutes that changed since the last call, open ones as well."""
        self._windows_ended = True
        return self._state.take_all()

    def _add_changed(self) -> None:
        """Make minutes pending that were merged with what an earlier run archived after the windows had ended."""
        self._backlog.add(self._ownership.slots_in(self._ownership.owned, self._state.take_all()))

    def upsert_rest(self) -> None:
        """Write the rows that are still pending, if there are any.

        Raises:
            Unavailable: as for `upsert_rows`.
        """
        if len(self._backlog):
            self.upsert_rows()

    def cache_rest(self) -> None:
        """Write the pending rows to the cache that it has not confirmed, or has lost.

        Raises:
            Unavailable: not all are written.
        """
        if len(self._backlog) and self._cache.needs_refill():
            self._backlog.note_uncached(slot for slot in self._backlog.rows() if self._cache.lacks(slot.series))
        if not self.cache_minutes(self._backlog.uncached()):
            raise Unavailable("not all are confirmed yet")

    def cache_minutes(self, minutes: Candles) -> bool:
        """Write minutes to the cache, in parts; return whether it has confirmed all.

        Raises:
            Unavailable: not all are written.
        """
        # In reverse: the archive begins at the front, so together they cover more rows where a stop is short of time.
        slots = list(reversed(minutes))
        confirmed = True
        for begin in range(0, len(slots), ROWS_A_PART):
            part = {slot: minutes[slot] for slot in slots[begin : begin + ROWS_A_PART]}
            if self._cache.put_minutes(part):
                self._backlog.note_cached(part)
            else:
                confirmed = False
        return confirmed

    def roll_up(self) -> bool:
        """Do one step of the daily roll-up; return whether there is more to do.

        Raises:
            Unavailable: to be repeated.
        """
        more = self._rollups.roll_up(milliseconds(self._clock()))
        self._log.rollup_succeeded()
        return more
