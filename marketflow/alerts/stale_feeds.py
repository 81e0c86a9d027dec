"""Which feeds become stale, by the states of feeds as time passes.

A process that was suspended finds all its feeds silent until it has read what they sent meanwhile, and one whose clock
is set knows no longer for how long. Neither is a fault of a feed, so time counts anew from there.
"""

from collections.abc import Mapping

from marketflow.model import FINE_STATES, FeedState, Mode

GAP_MS = 5000
"""Time between two looks, in either direction, beyond which the process was suspended or the clock was set."""

SETTLE_MS = 2000
"""Time after such a gap in which feeds are read again."""


class StaleFeeds:
    """Which feeds become stale: after silence, or after so long without a connection. For one thread at a time.

    Args:
        after_ms: how long a feed may be without a connection.
    """

    def __init__(self, after_ms: int) -> None:
        self._after_ms = after_ms
        self._since: dict[tuple[Mode, str], int] = {}
        self._stale: dict[tuple[Mode, str], int] = {}
        self._looked_at: int | None = None
        self._settled_at = 0

    def begin(self, mode: Mode, stale: Mapping[str, int]) -> None:
        """Begin with what was known last: the feeds that are stale in a mode, and since when (Unix ms)."""
        self._since, self._stale = {}, {(mode, exchange): at for exchange, at in stale.items()}

    def held(self, mode: Mode) -> dict[str, int]:
        """Return since when (Unix ms) feeds are stale that are so in a mode, by exchange."""
        return {exchange: at for (feed_mode, exchange), at in self._stale.items() if feed_mode is mode}

    def take(self, mode: Mode, states: Mapping[str, FeedState], now_ms: int) -> list[str]:
        """Return the exchanges whose feed has become stale, by the states at a time (Unix ms)."""
        if self._looked_at is not None and abs(now_ms - self._looked_at) > GAP_MS:
            self._since, self._settled_at = {}, now_ms + SETTLE_MS
        self._looked_at = now_ms
        if now_ms < self._settled_at:
            return []
        stale, since = {}, {}
        for exchange, state in states.items():
            feed = mode, exchange
            if state in FINE_STATES:
                continue
            since[feed] = self._since.get(feed, now_ms)
            if state is FeedState.STALE or feed in self._stale or now_ms - since[feed] >= self._after_ms:
                stale[feed] = self._stale.get(feed, now_ms)
        new = sorted(exchange for _, exchange in stale.keys() - self._stale.keys())
        self._since, self._stale = since, stale
        return new
