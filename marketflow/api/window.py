"""Where a period is cut, and what the remembered candles say about it. Pure functions; times in Unix ms.

A period ends now. As far back as slices are kept its edge is exact; beyond that it is the whole minute that holds it.
A long period is split at a whole minute: minute rows of the archive before, slices and closed minutes of the cache
from there on. Both sides keep to the same minutes, so that no tick is on both.
"""

from collections.abc import Iterable
from functools import reduce

from marketflow.model import MINUTE_MS, Candle, candle_of, fuller, merge, minute_start
from marketflow.stores.ports import MINUTES_KEPT_MS, RECENT_MS, Recent


def covered(recent: Recent, since: int, until: int, minute_ms: int = MINUTE_MS) -> Candle | None:
    """One candle of all that is remembered at or after `since` and before `until`, None without any.

    A slice belongs to it when its last tick does. A minute that is there as slices and closed counts once, in its
    fuller version; a closed minute that began before `since` cannot be cut and is left out.
    """
    minutes = _minutes_of_slices(recent.slices, since, until, minute_ms)
    for start, closed in recent.minutes.items():
        if since <= start < until:
            held = minutes.get(start)
            minutes[start] = closed if held is None else fuller(held, closed)
    return _with_newest(merged(minutes.values()), recent, since, until)


def merged(candles: Iterable[Candle | None]) -> Candle | None:
    """All candles as one, None without any."""
    present = [candle for candle in candles if candle is not None]
    return reduce(merge, present) if present else None


def split_between(now: int) -> int:
    """The first whole minute that the slices still cover: archive before, cache from here on."""
    return -minute_start(RECENT_MS - now)


def oldest_kept_minute(now: int) -> int:
    """Start of the oldest minute that the cache keeps."""
    return minute_start(now - MINUTES_KEPT_MS)


def horizon(now: int, ahead_ms: int = MINUTE_MS) -> int:
    """A time before which any minute begins that holds ticks, with room for exchanges whose clocks are ahead.

    What lies beyond is from before the clock was set back, and no part of a period that ends now.
    """
    return minute_start(now + ahead_ms) + MINUTE_MS


def _minutes_of_slices(slices: dict[int, Candle], since: int, until: int, minute_ms: int) -> dict[int, Candle]:
    minutes: dict[int, Candle] = {}
    for start, candle in slices.items():
        if candle.last_at >= since and start < until:
            minute = minute_start(start, minute_ms)
            held = minutes.get(minute)
            minutes[minute] = candle if held is None else merge(held, candle)
    return minutes


def _with_newest(folded: Candle | None, recent: Recent, since: int, until: int) -> Candle | None:
    """Add the newest tick where it is ahead of its slice: it is visible at once, its slice after up to 100 ms."""
    newest = recent.newest
    if newest is None or not since <= newest.at < until:
        return folded
    if folded is None:
        return candle_of(newest)
    return merge(folded, candle_of(newest)) if newest.order > folded.newest.order else folded
