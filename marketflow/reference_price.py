"""The reference price of a symbol: the median of the newest prices of its exchanges.

The newest tick over all exchanges jumps from one to the other, and one exchange that is off moves it. The median moves
when the market does.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from marketflow.model import Tick, rounded

FRESH_MS = 15_000
"""Age of a tick up to which its price counts: an exchange that is silent for longer is stale by default."""


class ReferencePrice(NamedTuple):
    """The median of the newest prices of a symbol.

    Args:
        price: in the quote currency.
        exchanges: number of exchanges whose price is fresh, and counts.
        at: event time (Unix ms) of the newest tick among them.
    """

    price: float
    exchanges: int
    at: int


def reference_price(ticks: Iterable[Tick | None], now_ms: int) -> ReferencePrice | None:
    """Return the reference price of the newest ticks, one an exchange; None if none is fresh."""
    fresh = [tick for tick in ticks if tick is not None and tick.at >= now_ms - FRESH_MS]
    if not fresh:
        return None
    return ReferencePrice(median_of([tick.price for tick in fresh]), len(fresh), max(tick.at for tick in fresh))


def median_of(prices: Sequence[float]) -> float:
    """Return the median of prices, one at least."""
    ordered, middle = sorted(prices), len(prices) // 2
    if len(prices) % 2:
        return ordered[middle]
    return rounded((ordered[middle - 1] + ordered[middle]) / 2)  # the mean of two has digits that neither has
