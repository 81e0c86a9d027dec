"""Follows the slices that all ingest processes write, and gives candles that have each new tick once.

A slice is read again while it may grow; of a more complete version only what is new counts. Where one begins, the
newest slice before that is the price that the first tick is compared with.
"""

import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, Protocol

import msgspec

from marketflow.model import Candle, Candles, Series, Slot, Tick, candle_of

LATEST = 2**62
"""A time (Unix ms) after all slices."""


class SliceReader(Protocol):
    """Reads slices of all processes; the second item is the series that cannot be read now."""

    def slices_since(self, starts: Mapping[Series, int], until: int) -> tuple[Candles, Collection[Series]]:
        """The slices of each series that begin at its time or later, and before `until` (Unix ms)."""
        ...

    def last_before(self, series: Collection[Series], before: int) -> tuple[Candles, Collection[Series]]:
        """The newest slice of each series of those that begin before a time (Unix ms)."""
        ...


class News(NamedTuple):
    """New ticks of one slice of some series.

    Args:
        start: of the slice (Unix ms).
        candles: of the ticks.
    """

    start: int
    candles: Candles


class _Place(NamedTuple):
    """The newest slice that was read: its start (Unix ms), and the candle; None where there was none."""

    start: int = 0
    candle: Candle | None = None


class SliceFollower:
    """Knows how far each series was read; for any thread.

    Args:
        slices: reads them.
    """

    def __init__(self, slices: SliceReader) -> None:
        self._slices = slices
        self._lock = threading.Lock()
        self._places: dict[Series, _Place] = {}
        self._awaited: set[Series] = set()  # followed by `follow`, and not yet wanted
        self._begin = LATEST
        self.is_behind = False
        """Whether some series could not be read by the last call of `news`."""

    def begin(self, at: int) -> None:
        """Forget all; begin the series that are wanted next with their slices from a time on (Unix ms)."""
        with self._lock:
            self._places, self._awaited, self._begin = {}, set(), at

    def follow(self, series: Iterable[Series]) -> None:
        """Begin series that are not yet followed with the price of now."""
        with self._lock:
            new = {each for each in series if each not in self._places}
            self._awaited |= new.difference(self._start(new, LATEST)[1])

    def newest(self, series: Iterable[Series]) -> dict[Series, Tick]:
        """Return the newest tick of each series that was read."""
        places = self._places
        found = {each: place.candle for each in series if (place := places.get(each)) is not None}
        return {each: candle.newest for each, candle in found.items() if candle is not None}

    def news(self, wanted: Collection[Series], until: int) -> list[News]:
        """Return the new ticks of series by slice, the oldest first, of slices that begin before `until` (Unix ms).

        What is begun with them comes first: the price before.
        """
        with self._lock:
            self._awaited -= {*wanted}
            places = self._places
            for gone in places.keys() - {*wanted} - self._awaited:
                del places[gone]
            before, unread = self._start({each for each in wanted if each not in places}, self._begin)
            if not unread:
                self._begin = LATEST
            starts = {each: places[each].start for each in wanted if each in places}
            found, not_now = self._slices.slices_since(starts, until)
            self.is_behind = bool(unread or not_now)
            new: defaultdict[int, Candles] = defaultdict(dict)
            for slot, candle in sorted(found.items(), key=lambda item: item[0].start):
                if (added := self._take(slot, candle)) is not None:
                    new[slot.start][slot] = added
        first = [News(min(slot.start for slot in before), before)] if before else []
        return first + [News(start, candles) for start, candles in sorted(new.items())]

    def _start(self, series: Collection[Series], before: int) -> tuple[Candles, Collection[Series]]:
        """Begin series with their newest slice before a time; return those slices as one tick, and what is unread."""
        if not series:
            return {}, ()
        found, unread = self._slices.last_before(series, before)
        self._places |= {each: _Place() for each in series if each not in unread}
        self._places |= {slot.series: _Place(slot.start, candle) for slot, candle in found.items()}
        return {slot: candle_of(candle.newest) for slot, candle in found.items()}, unread

    def _take(self, slot: Slot, candle: Candle) -> Candle | None:
        start, held = self._places[slot.series]
        if slot.start < start:
            return None
        self._places[slot.series] = _Place(slot.start, candle)
        return candle if held is None or slot.start > start else _added(held, candle)


def _added(held: Candle, grown: Candle) -> Candle | None:
    """Return the way of a price since an earlier version of a slice; None if its last tick is the same.

    Levels within the earlier version were crossed by that one already.
    """
    if (grown.last_at, grown.last_sequence) <= (held.last_at, held.last_sequence):
        return None
    ends = (held.close, held.last_at), (grown.close, grown.last_at)
    high = (grown.high, grown.high_at) if grown.high > held.high else max(ends)
    low = (grown.low, grown.low_at) if grown.low < held.low else min(ends)
    return msgspec.structs.replace(
        grown,
        open=held.close,
        first_at=held.last_at,
        first_sequence=held.last_sequence,
        high=high[0],
        high_at=high[1],
        low=low[0],
        low_at=low[1],
    )
