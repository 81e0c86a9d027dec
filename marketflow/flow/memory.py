"""What this process knows of the last minutes. Memory is the truth, the cache its journal.

All candles of the flow are merged here, so that every version handed to a store is the whole one: writing it replaces
whatever the store has, twice or late does no harm. Bounded by the number of series times the minutes held.

Minutes that were let go of can come again: somebody sets the clock of the machine back. What the archive has of them
is then taken over, as are the minutes that a run before this one wrote.

Written by the flow, read by it and, while the cache is away, by the API; one lock guards all of it and is held for
dictionary work only.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Sequence

from marketflow.model import MINUTE_MS, Candle, Candles, Series, Slot, Tick, fuller, merge, merge_into, minute_start
from marketflow.stores.ports import RECENT_MS, Recent
from marketflow.stores.window import Window


class Memory:
    """Newest ticks, slices and minutes of all series.

    Args:
        late_after_ms: how long after its end a minute is left open for late ticks.
        ahead_ms: how far an event time may be ahead of the clock; what lies beyond is from before it was set back.
        minute_ms: length of a minute.
    """

    def __init__(self, late_after_ms: int, ahead_ms: int = MINUTE_MS, minute_ms: int = MINUTE_MS) -> None:
        self._late_after_ms = late_after_ms
        self._ahead_ms = ahead_ms
        self.minute_ms = minute_ms
        self._lock = threading.Lock()
        self._newest: dict[Series, Tick] = {}
        self._slices: dict[Series, dict[int, Candle]] = {}
        self._minutes: Candles = {}  # of this run's ticks
        self._restored: Candles = {}  # of those that earlier runs left in the cache
        self._adopted: Candles = {}  # of those that earlier runs left in the archive: by and large the same ones
        self._unwritten: set[Slot] = set()
        self._oldest = 0  # start of the oldest minute that is held
        self._whole_from = sys.maxsize  # from this minute on nothing is in the archive that is not held here
        self._newest_at = 0  # of all series
        self.too_late = 0
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
                self.too_late += sum(candle.ticks for slot, candle in batch.items() if slot not in in_time)
            return self._merge_in(in_time, self._minutes)

    def restore(self, slices: Candles) -> Candles:
        """Merge in the slices that an earlier run left in the cache; gives those that are now more than what is there.

        However old they are: their minutes are taken as closed before they are forgotten.
        """
        self.observe(slices)
        with self._lock:
            changed = [slot for slot in slices if slot.start in self._slices.get(slot.series, {})]
            whole = self._merge_in(slices, self._restored)
            return {slot: whole[slot] for slot in changed}

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
        parts. Of an earlier run the slices may be here as well, unless the cache was emptied meanwhile.
        """
        with self._lock:
            for minute, candle in minutes.items():
                held = self._restored.get(minute)
                if since <= minute.start < self._whole_from and (held is None or held.ticks < candle.ticks):
                    self._adopted[minute] = candle
                    self._unwritten.add(minute)
            self._whole_from = since

    def _merge_in(self, batch: Candles, minutes: Candles) -> Candles:
        whole: Candles = {}
        for slot, candle in batch.items():
            slices = self._slices.setdefault(slot.series, {})
            held = slices.get(slot.start)
            whole[slot] = slices[slot.start] = candle if held is None else merge(held, candle)
            minute = Slot(slot.series, minute_start(slot.start, self.minute_ms))
            merge_into(minutes, {minute: candle})
            self._unwritten.add(minute)
        return whole

    def _minute(self, minute: Slot) -> Candle:
        own, earlier = self._minutes.get(minute), self._earlier(minute)
        if own is None or earlier is None:
            candle = own or earlier
            assert candle is not None, "only minutes that are held are asked for"
            return candle
        return merge(earlier, own)

    def _earlier(self, minute: Slot) -> Candle | None:
        """The fuller of what the two stores know: merged, the ticks that both have would count twice."""
        adopted, restored = self._adopted.get(minute), self._restored.get(minute)
        return fuller(adopted, restored) if adopted and restored else adopted or restored

    def _held_minutes(self) -> set[Slot]:
        return self._minutes.keys() | self._restored.keys() | self._adopted.keys()

    def take_closed(self, now_ms: int) -> Candles:
        """The minutes that ended more than the grace before `now_ms` and were not yet taken in this version.

        And those that lie beyond `now_ms`, which would otherwise wait until the clock comes by again.
        """
        last_start, beyond = now_ms - self._late_after_ms - self.minute_ms, now_ms + self._ahead_ms
        return self._take(lambda minute: minute.start <= last_start or minute.start > beyond)

    def take_all(self) -> Candles:
        """The minutes not yet taken in this version, open ones too: the end of the flow."""
        return self._take(lambda _: True)

    def _take(self, due: Callable[[Slot], bool]) -> Candles:
        with self._lock:
            taken = {minute: self._minute(minute) for minute in self._unwritten if due(minute)}
            self._unwritten.difference_update(taken)
        return taken

    def forget(self, now_ms: int) -> None:
        """Let go of whole minutes that no period needs any more. To be called after `take_closed`."""
        oldest = _oldest_held(now_ms)
        with self._lock:
            if self._newest_at > now_ms + self._ahead_ms:
                self._forget_newest(now_ms + self._ahead_ms)
            if oldest <= self._oldest:
                return
            self._oldest = oldest
            self._whole_from = max(self._whole_from, oldest)
            for slices in self._slices.values():
                for start in [start for start in slices if start < oldest]:
                    del slices[start]
            for minute in [minute for minute in self._held_minutes() if minute.start < oldest]:
                self._minutes.pop(minute, None)
                self._restored.pop(minute, None)
                self._adopted.pop(minute, None)
                self._unwritten.discard(minute)

    def _forget_newest(self, beyond: int) -> None:
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
            return {
                Slot(series, start): candle
                for series, slices in self._slices.items()
                for start, candle in slices.items()
            }

    def all_closed(self) -> Candles:
        """Every minute held that was taken in its present version."""
        with self._lock:
            return {minute: self._minute(minute) for minute in self._held_minutes() - self._unwritten}

    def recent(self, series: Series, since: int) -> Recent:
        """What is held of one series; slices and minutes that end after `since` (Unix ms)."""
        with self._lock:
            slices = {
                start: candle for start, candle in self._slices.get(series, {}).items() if candle.last_at >= since
            }
            minutes = {
                minute.start: self._minute(minute)
                for minute in self._held_minutes()
                if minute.series == series and minute.start + self.minute_ms > since
            }
            return Recent(self._newest.get(series), slices, minutes)


def _oldest_held(now_ms: int) -> int:
    """Start of the oldest minute that is held at this time."""
    return minute_start(now_ms) - RECENT_MS


class MemoryReader:
    """The memory of this process as the API reads it. Never unavailable."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory

    async def newest(self, series: Sequence[Series]) -> list[Tick | None]:
        """The newest tick of each series, however old."""
        known = self._memory.newest_of(series)
        return [known.get(each) for each in series]

    async def summary(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        """One candle for each series of what is held from `since` on."""
        return [
            Window(recent.slices, recent.minutes, self._memory.minute_ms).covered(since, until, recent.newest)
            for recent in (self._memory.recent(each, since) for each in series)
        ]
