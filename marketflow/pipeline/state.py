"""Window state of the last minutes, in memory. It is the source of truth; the cache is its journal.

All candles are merged here, so that every version written to a store is complete: it replaces what the store has, and
writing it twice or late does no harm. Bounded by the number of series times the minutes held, and by the limit of the
slices.

A minute that has expired recurs when the clock of the machine is set back. Its candle in the archive is then adopted,
as are the minutes that an earlier run archived.

Written and read by the pipeline, and read by the API while the cache is down; one lock guards all of it, held for
dictionary work only. The work of each 100 ms is proportional to the series that changed: minutes are grouped by start,
so that those that are due or expired are found without a pass over all series.
"""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache, reduce
from math import inf

import msgspec

from marketflow.errors import Unavailable
from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    Tick,
    merge,
    minute_start,
    more_complete,
    slice_start,
)
from marketflow.pipeline.slices import HELD_MS, Slices
from marketflow.stores.cache_limits import RECENT_MS, SLICES_HELD
from marketflow.stores.ports import RecentCandles, RecoveredCandles, Wanted, every_series

_Minutes = defaultdict[int, dict[Series, Candle]]


class WindowState:
    """Newest ticks, slices and minutes of all series.

    Args:
        late_after_ms: allowed lateness: how long after its end a minute stays open for late ticks.
        ahead_ms: how far an event time may be ahead of the clock; what is further ahead is from before it was set back.
        minute_ms: length of a minute.
        slices_held: number of slices beyond which the oldest are evicted.
        slices_held_ms: time for which they are held even beyond that number.
        closed_after_ms: how long after its end a minute is called closed; a change after that is a correction, which
            raises the version of its candle. As `late_after_ms` without it.
    """

    def __init__(
        self,
        late_after_ms: int,
        ahead_ms: int = MINUTE_MS,
        minute_ms: int = MINUTE_MS,
        slices_held: int = SLICES_HELD,
        slices_held_ms: int = HELD_MS,
        closed_after_ms: int | None = None,
    ) -> None:
        self._late_after_ms = late_after_ms
        self._ahead_ms = ahead_ms
        self.minute_ms = minute_ms
        self._lock = threading.Lock()
        self._newest: dict[Series, Tick] = {}
        self._slices = Slices(slices_held, slices_held_ms)
        self._minutes: _Minutes = defaultdict(dict)  # of this run's ticks
        self._restored: _Minutes = defaultdict(dict)  # of those that earlier runs left in the cache
        self._adopted: _Minutes = defaultdict(dict)  # of those that earlier runs archived: mostly the same
        self._replaced: _Minutes = defaultdict(dict)  # authoritative: made again from the records of a venue
        # Start of the last slice of a minute that another process may have, too: all until then is in `_restored`.
        self._divided: defaultdict[int, dict[Series, int]] = defaultdict(dict)
        # First event time of this run, by exchange (their clocks differ) and of all; set by `_note_first`.
        self._first_at: dict[tuple[Mode, str], int] = {}
        self._first_of_all: float = inf
        self._unwritten: defaultdict[int, set[Series]] = defaultdict(set)
        self._changed: defaultdict[int, set[Series]] = defaultdict(set)  # of those, by ticks of this run
        self._closed_after_ms = late_after_ms if closed_after_ms is None else closed_after_ms
        self._taken_at = 0
        self._corrections: defaultdict[int, dict[Series, int]] = defaultdict(dict)
        self._oldest = 0  # start of the oldest minute that is held
        self._whole_from = sys.maxsize  # from this minute on nothing is in the archive that is not held here
        self._newest_at = 0  # of all series
        self.late_ticks = 0
        """Number of ticks that arrived after their minute had expired."""

    def observe(self, batch: Candles) -> dict[Series, Tick]:
        """Update the newest ticks; return those of the batch that are newer than before."""
        newer: dict[Series, Tick] = {}
        with self._lock:
            newest = self._newest
            for (series, _), candle in batch.items():
                known, at = newest.get(series), candle.last_at
                if (
                    known is None or at > known.at or (at == known.at and candle.last_sequence > known.sequence)
                ):  # as tuples it would cost half as much again
                    newer[series] = newest[series] = Tick(candle.close, at, candle.last_sequence)
                    if at > self._newest_at:
                        self._newest_at = at
        return newer

    def newest_of(self, series: Iterable[Series]) -> dict[Series, Tick]:
        """The newest tick of each series that has one."""
        with self._lock:
            newest = self._newest
            return {each: tick for each in series if (tick := newest.get(each)) is not None}

    def absorb(self, batch: Candles, now_ms: int) -> Candles:
        """Merge new ticks, as slices; return the whole slices that they are part of."""
        with self._lock:
            self._oldest = min(self._oldest, _oldest_held(now_ms))
            late = [slot for slot in batch if slot.start < self._oldest]
            if late:
                self.late_ticks += sum(batch[slot].ticks for slot in late)
                batch = {slot: candle for slot, candle in batch.items() if slot.start >= self._oldest}
            whole = self._merge_in(batch)
            self._slices.fit(now_ms)
            return whole

    def restore(self, left: RecoveredCandles) -> Candles:
        """Merge what other runs left in the cache; return the slices that are more complete here than there.

        It may be of any age: minutes are emitted as closed before they expire. It may arrive late, when this run has
        ticks itself, may be written by a process that still runs, and may be read more than once. So only candles older
        than the first tick of this run are added to it; otherwise the more complete candle counts.
        """
        self.observe(left.slices)
        self.observe(left.minutes)
        with self._lock:
            more, in_part, lacked = self._restore_slices(left)
            for minute, candle in left.before.items():
                self._unite(minute, candle, {})
            for minute in in_part.keys() | left.minutes.keys():
                self._unite(minute, left.minutes.get(minute), in_part.get(minute, {}), lacked.get(minute, ()))
            if left.whole_from:
                last_at = max((each.last_at for each in left.minutes.values()), default=0)
                self._slices.mark_evicted(left.whole_from, last_at)
            return more

    def _restore_slices(
        self, left: RecoveredCandles
    ) -> tuple[Candles, dict[Slot, dict[int, Candle]], dict[Slot, list[Candle]]]:
        """Restore the slices that may be held; return those that are more complete here, and those still to be united.

        The latter by minute and start, of minutes that are not here, or there, as slices alone; of these also the ones
        of which this run has no tick, by minute.
        """
        more: Candles = {}
        self._note_first()
        contested: dict[Slot, int] = {}
        apart: Candles = {}
        in_part: defaultdict[Slot, dict[int, Candle]] = defaultdict(dict)
        lacked: defaultdict[Slot, list[Candle]] = defaultdict(list)
        for slot, candle in left.slices.items():
            minute = Slot(slot.series, minute_start(slot.start, self.minute_ms))
            if is_in_part := minute.start < self._slices.whole_from or minute in left.minutes:
                in_part[minute][slot.start] = candle
            if slot.start < self._slices.whole_from:
                continue
            is_here = slot in self._slices
            if is_here or slot.start + SLICE_MS > self._begun_at(slot.series):
                if is_in_part and not is_here:
                    lacked[minute].append(candle)
                held = self._slices.contest(slot, candle)
                if held.ticks > candle.ticks:
                    more[slot] = held
                elif held is candle and not is_in_part:
                    contested[minute] = max(slot.start, contested.get(minute, 0))
            else:
                apart[slot] = candle
                if not is_in_part:
                    self._merge_minute(self._restored, minute.start, [(slot.series, candle)])
        self._slices.merge(apart)
        for minute, until in contested.items():
            self._divide(minute, until)
        return more, in_part, lacked

    def _note_first(self) -> None:
        """Record the first event time of this run, before any of its ticks are counted as those of another one."""
        for minutes in self._minutes.values():
            for series, candle in minutes.items():
                exchange = series[:2]
                self._first_at[exchange] = min(candle.first_at, self._first_at.get(exchange, candle.first_at))
        self._first_of_all = min(self._first_at.values(), default=inf)

    def begun(self) -> dict[tuple[Mode, str], int]:
        """Return the first event time of this run (Unix ms), by mode and exchange."""
        with self._lock:
            self._note_first()
            return dict(self._first_at)

    def _begun_at(self, series: Series) -> float:
        """First event time of this run for an exchange; for one without ticks yet, the first of all."""
        return self._first_at.get(series[:2], self._first_of_all)

    def _unite(
        self, minute: Slot, folded: Candle | None, slices: Mapping[int, Candle], lacked: Iterable[Candle] = ()
    ) -> None:
        """Merge a minute with another process's part of it, where one of the two does not have all of its slices.

        The other process's candle counts where it is folded, or its slices are evicted here; after that, each slice as
        it is held by now. If the result has fewer ticks than this run's own candle with the slices that it lacked, that
        stays: the cache may lack slices that the other process could not write. Later ticks of this run are added. All
        of them are added where the other process ended before the first one.

        Args:
            minute: the series and start of the minute.
            folded: another process's candle of slices that it does not have any more.
            slices: another process's later slices, by start; those that may be held are held here, too.
            lacked: those of them of which this run has no tick yet, and adds none later.
        """
        series, start = minute
        whole_from = max(slice_start(self._slices.whole_from + SLICE_MS - 1), start)
        earlier = [candle for at, candle in slices.items() if at < whole_from]
        if folded is not None:
            earlier.append(folded)
        other = reduce(merge, [*earlier, *(candle for at, candle in slices.items() if at >= whole_from)])
        held = _of(self._restored, series, start)
        if other.last_at >= self._begun_at(series):
            after = max([whole_from, *(slice_start(each.last_at) + SLICE_MS for each in earlier)])
            other = reduce(merge, [*earlier, *self._slices.between(series, after, start + self.minute_ms)])
            own = self._minutes[start].pop(series, None)
            mine = [each for each in (held, own) if each is not None]
            mine += [each for each in lacked if held is None or each.first_at > held.last_at]  # else it may have them
            held = reduce(merge, mine) if mine else None
            self._divided[start].pop(series, None)
        self._restored[start][series] = other if held is None else more_complete(held, other)
        self._unwritten[start].add(series)

    def _set_apart(self, minute: Slot, other: Candle) -> None:
        """Move ticks of this run that another process's candle may contain to `_restored`, which is not added to it."""
        series, start = minute
        if other.last_at < self._begun_at(series):
            return
        if start >= self._slices.whole_from:
            self._divide(minute, slice_start(other.last_at))
        elif (own := self._minutes[start].pop(series, None)) is not None:
            held = _of(self._restored, series, start)
            self._restored[start][series] = own if held is None else merge(held, own)

    def _divide(self, minute: Slot, until: int) -> None:
        """Fold a minute again from its slices: `_restored` up to the slice that begins at `until`, `_minutes` after."""
        series, start = minute
        until = self._divided[start][series] = max(until, self._divided[start].get(series, 0))
        end = start + self.minute_ms
        parts = (
            (self._restored, self._slices.between(series, start, min(until + SLICE_MS, end))),
            (self._minutes, self._slices.between(series, until + SLICE_MS, end)),
        )
        for minutes, slices in parts:
            if slices:
                minutes[start][series] = reduce(merge, slices)
            else:
                minutes[start].pop(series, None)
        self._unwritten[start].add(series)

    def lacks_since(self, now_ms: int) -> int | None:
        """Return the minute (Unix ms) from which on the archive may have ticks that are not here; None if nowhere.

        That is the case after a start, until `adopt`, and after the clock was set back. Call it before each write.
        """
        oldest = _oldest_held(now_ms)
        with self._lock:
            return oldest if oldest < self._whole_from else None

    def adopt(self, minutes: Candles, since: int) -> None:
        """Adopt the archive's minutes from `since` on where they are more complete than here, or of a later version.

        A minute of this run and an earlier one, or one that occurred twice as the clock was set back, is complete only
        with both parts. The slices of an earlier run may be here as well, unless the cache was emptied. At the first
        call of a run the archive's minutes may be those of a process that still runs, and of the same ticks.
        """
        with self._lock:
            at_start = self._whole_from == sys.maxsize
            self._note_first()
            for (series, start), candle in minutes.items():
                if not since <= start < self._whole_from:
                    continue
                if at_start:
                    self._set_apart(Slot(series, start), candle)
                held = _of(self._restored, series, start)
                if held is None or held.ticks < candle.ticks or held.version < candle.version:
                    self._adopted[start][series] = candle
                    self._unwritten[start].add(series)
            self._whole_from = since

    def replace(self, minutes: Candles, now_ms: int) -> Candles:
        """Replace minutes by authoritative ones that are not less complete; return those that have expired here.

        What has changed is emitted as closed again; the version of a minute that was closed before is raised, unless
        only its verification is new.
        """
        older: Candles = {}
        with self._lock:
            oldest = max(self._oldest, _oldest_held(now_ms))
            for slot, candle in minutes.items():
                if slot.start < oldest:
                    older[slot] = candle
                else:
                    self._replace(slot, candle)
        return older

    def _replace(self, slot: Slot, candle: Candle) -> None:
        series, start = slot
        before, held = self._minute(series, start), _of(self._replaced, series, start)
        self._replaced[start][series] = candle if held is None else more_complete(held, candle)
        after = self._minute(series, start)
        if after == before:
            return
        self._unwritten[start].add(series)
        if before is not None and _values(before) != _values(after):
            self._changed[start].add(series)

    def _merge_in(self, batch: Candles) -> Candles:
        """Merge slices of this run; return the whole slices, of those that are held."""
        whole = self._slices.merge(batch)
        minute_ms, divided, contested = self.minute_ms, self._divided, self._slices.contested
        by_minute: defaultdict[int, list[tuple[Series, Candle]]] = defaultdict(list)
        shared: list[Slot] = []
        for slot, candle in batch.items():
            series, at = slot
            start = at - at % minute_ms
            if divided and self._is_divided(slot, start):
                shared.append(slot)
                self._changed[start].add(series)
            elif contested and slot in contested:  # the other process's candle counts, which may have these ticks
                self._changed[start].add(series)
            else:
                by_minute[start].append((series, candle))
        for start, candles in by_minute.items():
            self._changed[start] |= self._merge_minute(self._minutes, start, candles)
        for series, at in shared:  # afterwards: they are folded again from all slices
            self._divide(Slot(series, at - at % minute_ms), at)
        return whole

    def _is_divided(self, slot: Slot, minute: int) -> bool:
        """Whether another process may have the ticks of a slice, too."""
        divided = self._divided.get(minute)
        return divided is not None and slot.start <= divided.get(slot.series, -1) and minute >= self._slices.whole_from

    def _merge_minute(self, minutes: _Minutes, start: int, candles: Iterable[tuple[Series, Candle]]) -> set[Series]:
        """Merge candles into a minute; return their series."""
        by_series = minutes[start]
        changed: set[Series] = set()
        for series, candle in candles:
            held = by_series.get(series)
            by_series[series] = candle if held is None else merge(held, candle)
            changed.add(series)
        self._unwritten[start] |= changed
        return changed

    def _minute(self, series: Series, start: int) -> Candle | None:
        own, earlier = _of(self._minutes, series, start), self._earlier(series, start)
        candle = merge(earlier, own) if own and earlier else own or earlier
        if (replaced := _of(self._replaced, series, start)) is not None:
            candle = replaced if candle is None else more_complete(candle, replaced)
        corrected = self._corrections[start].get(series, 0) if start in self._corrections else 0
        if candle is None or not corrected:
            return candle
        return msgspec.structs.replace(candle, version=candle.version + corrected)

    def _earlier(self, series: Series, start: int) -> Candle | None:
        """The more complete candle of the two stores: merged, ticks that are in both would count twice."""
        adopted, restored = _of(self._adopted, series, start), _of(self._restored, series, start)
        return more_complete(adopted, restored) if adopted and restored else adopted or restored

    def _whole_minutes(self, start: int, series: Iterable[Series]) -> Candles:
        if not any(start in each for each in (self._restored, self._adopted, self._replaced, self._corrections)):
            own = self._minutes.get(start, {})  # always but after a start; takes a fifth of the time
            return {Slot(each, start): own[each] for each in series if each in own}
        found = ((Slot(each, start), self._minute(each, start)) for each in series)
        return {minute: candle for minute, candle in found if candle is not None}

    def _held_starts(self) -> set[int]:
        return self._minutes.keys() | self._restored.keys() | self._adopted.keys() | self._replaced.keys()

    @property
    def has_unwritten(self) -> bool:
        """Whether a minute is open, or has changed since it was taken."""
        return bool(self._unwritten)

    def take_closed(self, now_ms: int) -> Candles:
        """Return the minutes whose end and allowed lateness are over at `now_ms` and that changed since the last call.

        And those ahead of `now_ms`, which would otherwise stay until the clock, set back, has reached them again; and
        those that are open again since then, as their version is raised.
        """
        last_start, beyond = now_ms - self._late_after_ms - self.minute_ms, now_ms + self._ahead_ms
        with self._lock:
            # Clients may have seen them called closed.
            closed_before = self._taken_at - self._closed_after_ms - self.minute_ms
            corrected = {start for start in self._changed if start <= closed_before}
            for start in corrected:
                corrections = self._corrections[start]
                for series in self._changed[start]:
                    corrections[series] = corrections.get(series, 0) + 1
            self._taken_at = now_ms
            return self._take(lambda start: start <= last_start or start > beyond or start in corrected)

    def take_all(self) -> Candles:
        """Return all minutes that changed since the last call, open ones as well: the end of the pipeline."""
        with self._lock:
            return self._take(lambda _: True)

    def _take(self, due: Callable[[int], bool]) -> Candles:
        taken: Candles = {}
        for start in [start for start in self._unwritten if due(start)]:
            taken |= self._whole_minutes(start, self._unwritten[start])
            del self._unwritten[start]
            self._changed.pop(start, None)
        return taken

    def expire(self, now_ms: int) -> None:
        """Remove minutes that no query needs any more. Call it after `take_closed`."""
        oldest = _oldest_held(now_ms)
        with self._lock:
            if self._newest_at > now_ms + self._ahead_ms:
                self._expire_newest(now_ms + self._ahead_ms)
            if oldest <= self._oldest:
                return
            self._oldest = oldest
            self._whole_from = max(self._whole_from, oldest)
            self._slices.expire(oldest)
            for minutes in (
                self._minutes,
                self._restored,
                self._adopted,
                self._replaced,
                self._divided,
                self._unwritten,
                self._changed,
            ):
                for start in [start for start in minutes if start < oldest]:
                    del minutes[start]
            for start in [start for start in self._corrections if start < oldest]:
                del self._corrections[start]

    def _expire_newest(self, beyond: int) -> None:
        """Remove newest ticks that are too far ahead of the clock: as long as they are there, none replaces them."""
        self._newest = {series: tick for series, tick in self._newest.items() if tick.at <= beyond}
        self._newest_at = max((tick.at for tick in self._newest.values()), default=0)

    def remove(self, unwanted: Callable[[Series], bool]) -> None:
        """Remove all that is held of some series."""
        with self._lock:
            self._newest = {series: tick for series, tick in self._newest.items() if not unwanted(series)}
            self._slices.remove(unwanted)
            for minutes in (self._minutes, self._restored, self._adopted, self._replaced, self._divided):
                for by_series in minutes.values():
                    for series in [series for series in by_series if unwanted(series)]:
                        del by_series[series]
            for changed in (*self._unwritten.values(), *self._changed.values()):
                changed -= {series for series in changed if unwanted(series)}

    def all_newest(self) -> dict[Series, Tick]:
        """The newest tick of every series."""
        with self._lock:
            return dict(self._newest)

    def all_slices(self, wanted: Wanted = every_series) -> Candles:
        """Every slice held of the series that are wanted. New ticks do not wait for it."""
        with self._lock:
            held = self._slices.copied()
        is_wanted = cache(wanted)
        return {
            Slot(series, start): candle
            for start, by_series in held
            for series, candle in by_series.items()
            if is_wanted(series)
        }

    def all_closed(self, wanted: Wanted = every_series) -> Candles:
        """Every minute held that was taken in its current version, of the series that are wanted.

        New ticks wait for those of one start at most.
        """
        closed: Candles = {}
        with self._lock:
            starts = self._held_starts()
        for start in starts:
            with self._lock:
                series = {
                    each
                    for minutes in (self._minutes, self._restored, self._adopted, self._replaced)
                    for each in minutes.get(start, ())
                    if wanted(each)
                }
                closed |= self._whole_minutes(start, series - self._unwritten.get(start, set()))
        return closed

    def needs_slices_from(self, now_ms: int) -> int:
        """Return the time (Unix ms) before which no slice is needed: it is evicted here, and its minute is closed."""
        with self._lock:
            open_from = minute_start(now_ms - self._late_after_ms, self.minute_ms)
            return max(min(open_from, self._slices.whole_from), self._oldest)

    def recent(self, series: Series, since: int) -> RecentCandles:
        """Newest tick of one series, and its slices and minutes that end after `since` (Unix ms).

        Raises:
            Unavailable: `since` lies within a minute whose slices were evicted.
        """
        with self._lock:
            if since < self._slices.whole_from and since % self.minute_ms:
                raise Unavailable("the slices of that time were evicted")
            return RecentCandles(
                self._newest.get(series), self._slices.of(series, since), self._minutes_after(series, since)
            )

    def recent_minutes(self, series: Series, since: int) -> RecentCandles:
        """As `recent`, without the slices, of which there are thousands."""
        with self._lock:
            return RecentCandles(self._newest.get(series), {}, self._minutes_after(series, since))

    def _minutes_after(self, series: Series, since: int) -> dict[int, Candle]:
        return {
            start: candle
            for start in self._held_starts()
            if start + self.minute_ms > since and (candle := self._minute(series, start)) is not None
        }


def _of(minutes: _Minutes, series: Series, start: int) -> Candle | None:
    by_series = minutes.get(start)
    return by_series.get(series) if by_series else None


def _values(candle: Candle | None) -> tuple[object, ...] | None:
    """Return the values that a correction changes."""
    if candle is None:
        return None
    return candle.open, candle.high, candle.low, candle.close, candle.ticks, candle.amounts, candle.source


def _oldest_held(now_ms: int) -> int:
    """Start of the oldest minute that is held at this time."""
    return minute_start(now_ms) - RECENT_MS
