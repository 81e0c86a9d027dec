"""Boundaries of periods. Pure functions; times in Unix ms.

A period ends now. Within the retention of slices its beginning is exact; before, it is the start of a minute.
A long period is split at a whole minute: minute rows of the archive before, slices and closed minutes of the cache
from there on. Both sides keep to the same minutes, so that no tick is on both.
"""

from marketflow.model import MINUTE_MS, minute_start
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS


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
