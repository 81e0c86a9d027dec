"""Which feeds become stale, by the states of feeds as time passes."""

from collections.abc import Iterable, Mapping

from marketflow.model import FINE_STATES, FeedState, Mode


class StaleFeeds:
    """Which feeds become stale: after silence, or after so long without a connection. For one thread at a time.

    Args:
        after_ms: how long a feed may be without a connection.
    """

    def __init__(self, after_ms: int) -> None:
        self._after_ms = after_ms
        self._since: dict[tuple[Mode, str], int] = {}
        self._stale: set[tuple[Mode, str]] = set()

    def begin(self, mode: Mode, stale: Iterable[str]) -> None:
        """Begin with what was known last: the exchanges whose feed was stale in a mode."""
        self._since, self._stale = {}, {(mode, exchange) for exchange in stale}

    def held(self, mode: Mode) -> list[str]:
        """Return the exchanges whose feed is stale in a mode."""
        return [exchange for feed_mode, exchange in sorted(self._stale) if feed_mode is mode]

    def take(self, mode: Mode, states: Mapping[str, FeedState], now_ms: int) -> list[str]:
        """Return the exchanges whose feed has become stale, by the states at a time (Unix ms)."""
        stale, since = set(), {}
        for exchange, state in states.items():
            feed = mode, exchange
            if state in FINE_STATES:
                continue
            since[feed] = self._since.get(feed, now_ms)
            if state is FeedState.STALE or feed in self._stale or now_ms - since[feed] >= self._after_ms:
                stale.add(feed)
        new = [exchange for feed_mode, exchange in sorted(stale - self._stale)]
        self._since, self._stale = since, stale
        return new
