"""Where a period is cut. Pure functions; times in Unix ms.

A period ends now. As far back as slices are kept its edge is exact; beyond that it is the whole minute that holds it.
A long period is split at a whole minute: minute rows of the archive before, slices and closed minutes of the cache
from there on. Both sides keep to the same minutes, so that no tick is on both.
"""

from marketflow.model import MINUTE_MS, minute_start
from marketflow.stores.cache_limits import MINUTES_KEPT_MS, RECENT_MS


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
