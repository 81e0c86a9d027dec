"""Newest version of each candle that is streamed, by the version of the state in which it changed.

Of each series the running candle, those that are over and not closed, and the last closed one make its snapshot. Older
ones stay for subscribers that have not received them yet, up to a number of them: of a subscriber that is further
behind, the log no longer knows all changes, and it needs a snapshot.
"""

from collections.abc import Iterable

from marketflow.api.streaming.candle_stream.candle_series import CandleSeries, CandleSlot
from marketflow.api.streaming.events import StreamCandle

MOST_OLD_CANDLES = 10_000
"""Candles that are in no snapshot: some 10 MB."""


class CandleLog:
    """The log of one mode.

    Args:
        most_old: number of candles that are in no snapshot, beyond which those that changed first are evicted.
    """

    def __init__(self, most_old: int = MOST_OLD_CANDLES) -> None:
        self._most_old = most_old
        self._entries: dict[CandleSlot, tuple[StreamCandle, int]] = {}  # with versions, in the order of these
        self._in_snapshot: dict[CandleSeries, list[int]] = {}  # by start
        self._since: dict[CandleSeries, int] = {}
        self._complete_since = 0  # of the changes after this version, all are known

    def clear(self) -> None:
        """Remove everything."""
        self._entries.clear()
        self._in_snapshot.clear()
        self._since.clear()

    def begin(self, series: CandleSeries, candles: Iterable[tuple[int, StreamCandle]], version: int) -> None:
        """Log a series from this version on.

        Args:
            series: which one.
            candles: those of its snapshot by start, the oldest first.
            version: of the state.
        """
        self.end(series)
        self._since[series] = version
        self._in_snapshot[series] = []
        for start, candle in candles:
            self.put(CandleSlot(series, start), candle, version)

    def end(self, series: CandleSeries) -> None:
        """Log a series no longer."""
        if self._since.pop(series, None) is not None:
            del self._in_snapshot[series]
            for slot in [slot for slot in self._entries if slot.series == series]:
                del self._entries[slot]

    def put(self, slot: CandleSlot, candle: StreamCandle, version: int) -> None:
        """Store the new version of a candle of a series that is logged."""
        self._entries.pop(slot, None)
        self._entries[slot] = candle, version
        starts = self._in_snapshot[slot.series]
        if slot.start not in starts and (not starts or slot.start > starts[0]):
            starts.append(slot.start)
            starts.sort()
        closed = max((start for start in starts if self._entries[CandleSlot(slot.series, start)][0].closed), default=0)
        del starts[: starts.index(closed) if closed else 0]

    def evict(self) -> None:
        """Evict what is too much."""
        old = len(self._entries) - sum(map(len, self._in_snapshot.values()))
        if old <= self._most_old:
            return
        for slot in [slot for slot in self._entries if slot.start not in self._in_snapshot[slot.series]]:
            _, self._complete_since = self._entries.pop(slot)
            old -= 1
            if old <= self._most_old // 2:  # more than needed, so that it is rare
                break

    def has(self, chosen: Iterable[CandleSeries]) -> bool:
        """Return whether all these series are logged."""
        return all(series in self._since for series in chosen)

    def has_all_since(self, chosen: Iterable[CandleSeries], version: int) -> bool:
        """Return whether all changes of these series after a version are logged."""
        return version >= self._complete_since and all(
            version >= self._since.get(series, version + 1) for series in chosen
        )

    def snapshot(self, chosen: Iterable[CandleSeries]) -> list[StreamCandle]:
        """Return the candles of the snapshot of these series, of each the oldest first."""
        return [self._entries[CandleSlot(series, start)][0] for series in chosen for start in self._in_snapshot[series]]

    def changes(self, chosen: frozenset[CandleSeries], version: int) -> list[StreamCandle]:
        """Return the candles of these series that changed after a version, the oldest first."""
        changed: list[tuple[int, StreamCandle]] = []
        for slot in reversed(self._entries):
            candle, changed_in = self._entries[slot]
            if changed_in <= version:
                break
            if slot.series in chosen:
                changed.append((slot.start, candle))
        changed.reverse()
        changed.sort(key=lambda each: each[0])
        return [candle for _, candle in changed]
