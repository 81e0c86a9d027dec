"""The last minutes of one series, folded into one candle for any period in a few steps.

A period ends now, so the same slices are read again and again: folds of seconds and minutes are kept until one of their
slices changes. A query then merges the parts of a minute at both edges and the whole minutes between them, however long
the period is. Times in Unix ms; for one thread.
"""

from collections.abc import Iterable, Mapping
from functools import reduce

from msgspec.structs import replace

from marketflow.model import (
    MINUTE_MS,
    SECOND_MS,
    SLICE_MS,
    Candle,
    Tick,
    candle_of,
    merge,
    minute_start,
    more_complete,
    put_more_complete,
    slice_start,
)


class CandleWindow:
    """Slices and closed minutes of one series.

    Args:
        slices, minutes: candles by their start.
        minute_ms: length of a minute, in whole seconds.
    """

    def __init__(self, slices: Mapping[int, Candle], minutes: Mapping[int, Candle], minute_ms: int = MINUTE_MS) -> None:
        self._minute_ms = minute_ms
        self._minutes: dict[int, _Minute] = {}
        self._folds: dict[tuple[int, int], Candle | None] = {}
        for start, candle in slices.items():
            self.put_slice(start, candle)
        for start, candle in minutes.items():
            self.put_minute(start, candle)

    def __len__(self) -> int:
        """Number of slices."""
        return sum(len(minute.slices) for minute in self._minutes.values())

    def put_slice(self, start: int, candle: Candle) -> None:
        """Add a slice; of two versions the more complete one stays, the later of two with as many ticks."""
        self._minute_of(start).put(start, candle)

    def put_minute(self, start: int, candle: Candle) -> None:
        """Add a closed minute, by the same rule."""
        minute = self._minute_of(start)
        minute.closed = candle if minute.closed is None else more_complete(minute.closed, candle)

    def fill(self, earlier: "CandleWindow") -> None:
        """Add what `earlier` holds, by the same rule; the candles that are here count as the later versions."""
        for start, minute in earlier._minutes.items():
            mine = self._minute_of(start)
            if minute.closed is not None:
                mine.closed = minute.closed if mine.closed is None else more_complete(minute.closed, mine.closed)
            for begin, candle in minute.slices.items():
                held = mine.slices.get(begin)
                mine.put(begin, candle if held is None else more_complete(candle, held))

    def expire(self, before: int) -> None:
        """Remove the minutes that start before a time."""
        for start in [start for start in self._minutes if start < before]:
            del self._minutes[start]
        self._folds.clear()

    def covered(self, since: int, until: int, newest: Tick | None = None) -> Candle | None:
        """One candle of all that happened at or after `since` and before the minute `until`; None without any ticks.

        A slice counts when its last tick does. A minute that is there as slices and closed counts once, in its more
        complete version; a closed minute that began before `since` cannot be cut and is left out. The newest tick is
        added where it is later than its slice, which is visible up to 100 ms after it.
        """
        edge = slice_start(since)
        begin = edge if edge == since else edge + SLICE_MS
        if (key := (begin, until)) not in self._folds:
            self._folds[key] = self._fold(begin, until)
        folded = self._folds[key]
        if begin > edge and (minute := self._minutes.get(minute_start(edge, self._minute_ms))):
            cut = minute.slices.get(edge)
            if cut is not None and cut.last_at >= since and edge < until:
                folded = cut if folded is None else merge(cut, folded)
        if newest is None or not since <= newest.at < until:
            return folded
        if folded is None:
            return candle_of(newest)
        is_later = newest.order > (folded.last_at, folded.last_sequence) and not self._has(newest)
        return _with_newest(folded, newest) if is_later else folded

    def by_minute(self, since: int, until: int, newest: Tick | None = None) -> dict[int, Candle]:
        """The minutes that begin at or after `since` and before `until`, by their start, the newest tick included."""
        found = {
            start: candle
            for start, minute in self._minutes.items()
            if since <= start < until and (candle := minute.whole) is not None
        }
        if newest is not None and since <= newest.at < until:
            last = max(((candle.last_at, candle.last_sequence) for candle in found.values()), default=(0, 0))
            if newest.order > last and not self._has(newest):  # later than its slice
                start = minute_start(newest.at, self._minute_ms)
                found[start] = _with_newest(found[start], newest) if start in found else candle_of(newest)
        return found

    def _has(self, tick: Tick) -> bool:
        minute = self._minutes.get(minute_start(tick.at, self._minute_ms))
        return minute is not None and minute.has(tick)

    def _fold(self, begin: int, until: int) -> Candle | None:
        parts = [
            minute.since(begin) if start < begin else minute.whole
            for start, minute in self._minutes.items()
            if begin - self._minute_ms < start < until
        ]
        return merged(parts)

    def _minute_of(self, start: int) -> "_Minute":
        self._folds.clear()
        start = minute_start(start, self._minute_ms)
        if (minute := self._minutes.get(start)) is None:
            minute = self._minutes[start] = _Minute(start, self._minute_ms)
        return minute


class _Minute:
    """One minute as slices and as a closed candle, with the folds made so far."""

    def __init__(self, start: int, length: int) -> None:
        self._end = start + length
        self._start = start
        self.closed: Candle | None = None
        self.slices: dict[int, Candle] = {}
        self._seconds: dict[int, Candle | None] = {}
        self._folded: Candle | None = None

    def put(self, start: int, candle: Candle) -> None:
        put_more_complete(self.slices, start, candle)
        self._seconds.pop(start - start % SECOND_MS, None)
        self._folded = None

    @property
    def whole(self) -> Candle | None:
        """The more complete of its slices and the closed candle."""
        if self._folded is None and self.slices:
            self._folded = self.since(self._start)
        if self._folded is None or self.closed is None:
            return self._folded or self.closed
        return more_complete(self._folded, self.closed)

    def has(self, tick: Tick) -> bool:
        """Whether a tick is in its slice or in the closed candle, which has all until its last one.

        The receipt of that one says nothing: it is not known of a minute that was made again from a venue's trades.
        """
        if self.closed is not None and tick.at <= self.closed.last_at:
            return True
        held = self.slices.get(slice_start(tick.at))
        if held is None:
            return False
        # While two processes write, as one that cannot know that it was replaced, each has its own time of receipt.
        is_last = (held.last_at, held.close) == (tick.at, tick.price)
        return is_last or (held.last_at, held.last_sequence) >= tick.order

    def since(self, begin: int) -> Candle | None:
        """Its slices from `begin` on."""
        second = -(-begin // SECOND_MS) * SECOND_MS
        cut = [self.slices.get(start) for start in range(begin, min(second, self._end), SLICE_MS)]
        return merged(cut + [self._second(start) for start in range(second, self._end, SECOND_MS)])

    def _second(self, start: int) -> Candle | None:
        if start not in self._seconds:
            self._seconds[start] = merged(map(self.slices.get, range(start, start + SECOND_MS, SLICE_MS)))
        return self._seconds[start]


def _with_newest(folded: Candle, newest: Tick) -> Candle:
    """Add a tick that is later than its slice. Its quantity comes with that, so until then the amounts lack it."""
    return replace(merge(folded, candle_of(newest)), amounts=folded.amounts)


def merged(candles: Iterable[Candle | None]) -> Candle | None:
    """All candles as one; None without any."""
    present = [candle for candle in candles if candle is not None]
    return reduce(merge, present) if present else None
