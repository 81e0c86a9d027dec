"""Boundaries of periods and of candles. Pure functions; times in Unix ms.

A period ends now. Within the retention of slices its beginning is exact; before, it is the start of a minute.
A long period is split at a whole minute: minute rows of the archive before, slices and closed minutes of the cache
from there on. Both sides keep to the same minutes, so that no tick is on both.

Candles begin on a grid in UTC: weeks on Monday, months on the 1st.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import msgspec

from marketflow.model import MINUTE_MS, minute_start
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS

DAY_MS = 24 * 60 * MINUTE_MS

_MONDAY_MS = 4 * DAY_MS
"""The first Monday of 1970."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


class Grid(msgspec.Struct, frozen=True):
    """The times at which candles begin: every `length_ms` from `origin_ms` on."""

    length_ms: int
    origin_ms: int = 0

    @property
    def part_ms(self) -> int:
        """Length of the candles that the stores make, of which these are put together: a day at most."""
        return min(self.length_ms, DAY_MS)

    @property
    def parts(self) -> int:
        """Number of parts of the longest candle."""
        return self.length_ms // self.part_ms

    def start_of(self, at: int) -> int:
        """Return the start of the candle that holds a time."""
        return at - (at - self.origin_ms) % self.length_ms

    def end_of(self, start: int) -> int:
        """Return the end of the candle that begins at `start`."""
        return start + self.length_ms

    def at_or_after(self, at: int) -> int:
        """Return the first time at or after `at` at which a candle begins."""
        start = self.start_of(at)
        return start if start == at else self.end_of(start)

    def starts(self, since: int, until: int) -> Sequence[int]:
        """Return the starts from `since`, itself one, to before `until`."""
        return range(since, until, self.length_ms)


class MonthGrid(Grid, frozen=True):
    """The beginnings of months; `length_ms` is that of the longest."""

    length_ms: int = 31 * DAY_MS

    def start_of(self, at: int) -> int:
        """Return the start of the month that holds a time."""
        first = (_EPOCH + at * _MILLISECOND).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return (first - _EPOCH) // _MILLISECOND

    def end_of(self, start: int) -> int:
        """Return the start of the next month."""
        return self.start_of(start + self.length_ms)

    def starts(self, since: int, until: int) -> Sequence[int]:
        """Return the starts from `since`, itself one, to before `until`."""
        found = []
        while since < until:
            found.append(since)
            since = self.end_of(since)
        return found


INTERVALS = {
    "1m": Grid(MINUTE_MS),
    "3m": Grid(3 * MINUTE_MS),
    "5m": Grid(5 * MINUTE_MS),
    "15m": Grid(15 * MINUTE_MS),
    "30m": Grid(30 * MINUTE_MS),
    "1h": Grid(60 * MINUTE_MS),
    "4h": Grid(4 * 60 * MINUTE_MS),
    "1d": Grid(DAY_MS),
    "1w": Grid(7 * DAY_MS, _MONDAY_MS),
    "1M": MonthGrid(),
}
"""Grids of candles by interval. All up to a day divide it."""


def split_between(now: int) -> int:
    """Return the first whole minute that slices cover: archive before, cache from there on."""
    return -minute_start(RECENT_MS - now)


def oldest_kept_minute(now: int) -> int:
    """Return the start of the oldest minute in the cache."""
    return minute_start(now - MINUTES_KEPT_MS)


def horizon(now: int, ahead_ms: int = MINUTE_MS) -> int:
    """Return a time before which every minute with ticks begins; clocks of exchanges may be ahead by `ahead_ms`.

    Later ticks are from before the clock was set back, and belong to no period that ends now.
    """
    return minute_start(now + ahead_ms) + MINUTE_MS
