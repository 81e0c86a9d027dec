"""The price of so long ago: the closes of a period in buckets, so that memory is bounded whatever the rate."""

import sys
from collections import deque
from collections.abc import Iterable

from marketflow.model import SLICE_MS

BUCKETS = 240
"""Buckets of a period: one of 24 hours is as exact as six minutes, one of 10 s as a slice."""


class PriceHistory:
    """Closes of the last `period_ms`, and the one before.

    Args:
        period_ms: how far back they reach.
    """

    def __init__(self, period_ms: int) -> None:
        self._period_ms = period_ms
        self._bucket_ms = max(SLICE_MS, period_ms // BUCKETS)
        self._closes: deque[tuple[int, float]] = deque()  # the last one of each bucket, with its time (Unix ms)

    def before(self, at: int) -> float | None:
        """Return the price of a period before a time (Unix ms), which only grows; None where that is not known."""
        closes, then = self._closes, at - self._period_ms
        while len(closes) > 1 and closes[1][0] <= then:
            closes.popleft()
        return closes[0][1] if closes and closes[0][0] <= then else None

    @property
    def bucket_ms(self) -> int:
        """Length of a bucket in ms."""
        return self._bucket_ms

    def seed(self, closes: Iterable[tuple[int, float]]) -> None:
        """Put older prices before those that were added: pairs of a time (Unix ms) and a price."""
        first = self._closes[0][0] if self._closes else sys.maxsize
        self._closes.extendleft(sorted((close for close in closes if close[0] < first), reverse=True))

    def add(self, at: int, price: float) -> None:
        """Add the newest price, in place of what was given of its bucket and of later ones.

        A process that begins to lead evaluates the last seconds again, of which the archive may have minutes by then.
        """
        closes, bucket_ms = self._closes, self._bucket_ms
        while closes and closes[-1][0] // bucket_ms >= at // bucket_ms:
            closes.pop()
        closes.append((at, price))
