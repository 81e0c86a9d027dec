"""What this process knows of the last minutes. Memory is the truth, the cache its journal.

All candles of the flow are merged here, so that every version handed to a store is the whole one: writing it replaces
whatever the store has, twice or late does no harm. Bounded by the number of series times the minutes held, and by the
limit of the slices.

Minutes that were let go of can come again: somebody sets the clock of the machine back. What the archive has of them
is then taken over, as are the minutes that a run before this one wrote.

Written by the flow, read by it and, while the cache is away, by the API; one lock guards all of it and is held for
dictionary work only. Ten times a second the flow comes by, so whatever it does then costs as much as what has moved:
minutes are kept by start first, and those that are due or old are found without looking at each series.
"""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import reduce
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
from marketflow.stores.ports import RecentCandles, RecoveredCandles

_Minutes = defaultdict[int, dict[Series, Candle]]


class WindowState:
    """Newest ticks, slices and minutes of all series.

    Args:
        late_after_ms: how long after its end a minute is left open for late ticks.
        ahead_ms: how far an event time may be ahead of the clock; what lies beyond is from before it was set back.
        minute_ms: length of a minute.
        slices_held: how many slices are held before the oldest go.
        slices_held_ms: how long they are held however many they are.
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
        self._adopted: _Minutes = defaultdict(dict)  # of those that earlier runs left in the archive: mostly the same
        # Until which slice (its start) of a minute others may have the same ticks: all until then is in `_restored`.
        self._divided: defaultdict[int, dict[Series, int]] = defaultdict(dict)
        # When this run's ticks of an exchange began (clocks of exchanges differ), and of any: once it was asked for.
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
        """Ticks that came after their minute was let go of."""

    def observe(self, batch: Candles) -> dict[Series, Tick]:
        """Take notice of the newest ticks of a batch; gives those that are newer than what was known."""
        newer: dict[Series, Tick] = {}
        with self._lock:
            for slot, candle in batch.items():
                known = self._newest.get(slot.series)
                if known is None or (candle.last_at, candle.last_sequence) > known.order:
                    newer[slot.series] = self._newest[slot.series] = candle.newest
                    self._newest_at = max(self._newest_at, candle.last_at)
        return newer

    def newest_of(self, series: Iterable[Series]) -> dict[Series, Tick]:
        """The newest tick of each series that has one."""
        with self._lock:
            return {each: self._newest[each] for each in series if each in self._newest}

    def absorb(self, batch: Candles, now_ms: int) -> Candles:
        """Merge new slices in; gives the slices they are part of, whole."""
        with self._lock:
            self._oldest = min(self._oldest, _oldest_held(now_ms))
            in_time = {slot: candle for slot, candle in batch.items() if slot.start >= self._oldest}
            if len(in_time) < len(batch):
                self.late_ticks += sum(candle.ticks for slot, candle in batch.items() if slot not in in_time)
            whole = self._merge_in(in_time)
            self._slices.fit(now_ms)
            return whole

    def restore(self, left: RecoveredCandles) -> Candles:
        """Take over what other runs left in the cache; gives the slices of which more is held than is there.

        However old it is: minutes are taken as closed before they are forgotten. It may come late, when this run has
        ticks itself, be written by a process that still runs, and be read more than once. So only what is older than
        the first tick of this run is added to its ticks; of all else the more complete candle counts.
        """
        self.observe(left.slices)
        self.observe(left.minutes)
        with self._lock:
            more = self._restore_slices(left.slices)
            for minute, candle in left.minutes.items():
                self._take_over(minute, candle)
            if left.whole_from:
                self._slices.lack(left.whole_from, max((each.last_at for each in left.minutes.values()), default=0))
            return more

    def _restore_slices(self, slices: Candles) -> Candles:
        more: Candles = {}
        self._note_first()
        contested: dict[Slot, int] = {}
        evicted: defaultdict[Slot, Candles] = defaultdict(dict)
        for slot, candle in slices.items():
            minute = Slot(slot.series, minute_start(slot.start, self.minute_ms))
            if minute.start < self._slices.whole_from:
                evicted[minute][slot] = candle
            elif slot in self._slices or slot.start + SLICE_MS > self._begun_at(slot.series):
                held = self._slices.contest(slot, candle)
                if held.ticks > candle.ticks:
                    more[slot] = held
                elif held is candle:
                    contested[minute] = max(slot.start, contested.get(minute, 0))
            else:
                self._slices.merge(slot, candle)
                self._merge_minute(slot.series, minute.start, candle, self._restored)
        for minute, until in contested.items():
            self._divide(minute, until)
        for minute, parts in evicted.items():
            self._take_over(minute, reduce(merge, parts.values()))
        return more

    def _note_first(self) -> None:
        """Take notice of when this run's ticks began, before any of them are set apart."""
        for minutes in self._minutes.values():
            for series, candle in minutes.items():
                exchange = series[:2]
                self._first_at[exchange] = min(candle.first_at, self._first_at.get(exchange, candle.first_at))
        self._first_of_all = min(self._first_at.values(), default=inf)

    def _begun_at(self, series: Series) -> float:
        """When this run's ticks of an exchange began; those of one that has sent none yet may be on their way."""
        return self._first_at.get(series[:2], self._first_of_all)

    def _take_over(self, minute: Slot, other: Candle) -> None:
        """Take over a minute, of which there are no slices here; this run's ticks until its last one may be the same.

        Later ones are added to it, and so are those before where it has none of that time.
        """
        self._set_apart(minute, other)
        series, start = minute
        held = _of(self._restored, series, start)
        self._restored[start][series] = other if held is None else more_complete(held, other)
        self._unwritten[start].add(series)

    def _set_apart(self, minute: Slot, other: Candle) -> None:
        """Count this run's ticks until the last of another process's candle among what the cache has, not on top."""
        series, start = minute
        if other.last_at < self._begun_at(series):
            return
        if start >= self._slices.whole_from:
            self._divide(minute, slice_start(other.last_at))
        elif (own := self._minutes[start].pop(series, None)) is not None:
            held = _of(self._restored, series, start)
            self._restored[start][series] = own if held is None else merge(held, own)

    def _divide(self, minute: Slot, until: int) -> None:
        """Fold a minute anew from its slices: those until the slice that begins at `until`, and those after it."""
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
        """From which minute on (Unix ms) the archive may hold what is not held here; None for nowhere.

        It does after a start, until `adopt`, and after the clock was set back. To be asked before each write.
        """
        oldest = _oldest_held(now_ms)
        with self._lock:
            return oldest if oldest < self._whole_from else None

    def adopt(self, minutes: Candles, since: int) -> None:
        """Take over the minutes from `since` on that the archive has, where less of them is held.

        A minute that this run and an earlier one saw, or that happened twice by the clock, is whole only with both
        parts. Of an earlier run the slices may be here as well, unless the cache was emptied meanwhile. What is there
        when this run asks for the first time may be of a process that still runs, and of the same ticks.
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
                if held is None or held.ticks < candle.ticks:
                    self._adopted[start][series] = candle
                    self._unwritten[start].add(series)
            self._whole_from = since

    def _merge_in(self, batch: Candles) -> Candles:
        """Merge slices of this run in; gives those of them that are held, whole."""
        whole: Candles = {}
        for slot, candle in batch.items():
            if (merged := self._slices.merge(slot, candle)) is not None:
                whole[slot] = merged
            start = minute_start(slot.start, self.minute_ms)
            self._changed[start].add(slot.series)
            if self._divided and self._is_divided(slot, start):
                self._divide(Slot(slot.series, start), slot.start)
            else:
                self._merge_minute(slot.series, start, candle, self._minutes)
        return whole

    def _is_divided(self, slot: Slot, minute: int) -> bool:
        """Whether a slice belongs to what another process has of its minute, too."""
        divided = self._divided.get(minute)
        return divided is not None and slot.start <= divided.get(slot.series, -1) and minute >= self._slices.whole_from

    def _merge_minute(self, series: Series, start: int, candle: Candle, minutes: _Minutes) -> None:
        by_series = minutes[start]
        held = by_series.get(series)
        by_series[series] = candle if held is None else merge(held, candle)
        self._unwritten[start].add(series)

    def _minute(self, series: Series, start: int) -> Candle | None:
        own, earlier = _of(self._minutes, series, start), self._earlier(series, start)
        candle = merge(earlier, own) if own and earlier else own or earlier
        corrected = self._corrections[start].get(series, 0) if start in self._corrections else 0
        if candle is None or not corrected:
            return candle
        return msgspec.structs.replace(candle, version=candle.version + corrected)

    def _earlier(self, series: Series, start: int) -> Candle | None:
        """The fuller of what the two stores know: merged, the ticks that both have would count twice."""
        adopted, restored = _of(self._adopted, series, start), _of(self._restored, series, start)
        return more_complete(adopted, restored) if adopted and restored else adopted or restored

    def _whole_minutes(self, start: int, series: Iterable[Series]) -> Candles:
        found = ((Slot(each, start), self._minute(each, start)) for each in series)
        return {minute: candle for minute, candle in found if candle is not None}

    def _held_starts(self) -> set[int]:
        return self._minutes.keys() | self._restored.keys() | self._adopted.keys()

    def take_closed(self, now_ms: int) -> Candles:
        """The minutes that ended more than the grace before `now_ms` and were not yet taken in this version.

        And those that lie beyond `now_ms`, which would otherwise wait until the clock comes by again.
        """
        last_start, beyond = now_ms - self._late_after_ms - self.minute_ms, now_ms + self._ahead_ms
        with self._lock:
            for start in self._changed:
                if start + self.minute_ms + self._closed_after_ms <= self._taken_at:
                    for series in self._changed[start]:  # clients may have seen it called closed
                        corrections = self._corrections[start]
                        corrections[series] = corrections.get(series, 0) + 1
            self._taken_at = now_ms
            return self._take(lambda start: start <= last_start or start > beyond)

    def take_all(self) -> Candles:
        """The minutes not yet taken in this version, open ones too: the end of the flow."""
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
        """Let go of whole minutes that no period needs any more. To be called after `take_closed`."""
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
                self._divided,
                self._unwritten,
                self._changed,
            ):
                for start in [start for start in minutes if start < oldest]:
                    del minutes[start]
            for start in [start for start in self._corrections if start < oldest]:
                del self._corrections[start]

    def _expire_newest(self, beyond: int) -> None:
        """Let go of ticks beyond what the clock allows: while they count as the newest, no later one does."""
        self._newest = {series: tick for series, tick in self._newest.items() if tick.at <= beyond}
        self._newest_at = max((tick.at for tick in self._newest.values()), default=0)

    def all_newest(self) -> dict[Series, Tick]:
        """The newest tick of every series."""
        with self._lock:
            return dict(self._newest)

    def all_slices(self) -> Candles:
        """Every slice held."""
        with self._lock:
            return self._slices.all()

    def all_closed(self) -> Candles:
        """Every minute held that was taken in its present version."""
        closed: Candles = {}
        with self._lock:
            for start in self._held_starts():
                series = {
                    each
                    for minutes in (self._minutes, self._restored, self._adopted)
                    for each in minutes.get(start, ())
                }
                closed |= self._whole_minutes(start, series - self._unwritten.get(start, set()))
        return closed

    def recent(self, series: Series, since: int) -> RecentCandles:
        """What is held of one series; slices and minutes that end after `since` (Unix ms).

        Raises:
            Unavailable: `since` lies within a minute of which slices were let go.
        """
        with self._lock:
            if since < self._slices.whole_from and since % self.minute_ms:
                raise Unavailable("the slices of that time were let go of")
            minutes = {
                start: candle
                for start in self._held_starts()
                if start + self.minute_ms > since and (candle := self._minute(series, start)) is not None
            }
            return RecentCandles(self._newest.get(series), self._slices.of(series, since), minutes)


def _of(minutes: _Minutes, series: Series, start: int) -> Candle | None:
    by_series = minutes.get(start)
    return by_series.get(series) if by_series else None


def _oldest_held(now_ms: int) -> int:
    """Start of the oldest minute that is held at this time."""
    return minute_start(now_ms) - RECENT_MS
