"""The reference price of a symbol: the median over its exchanges.

The newest tick over all exchanges jumps from one to the other, and one exchange that is off moves it. The median moves
when the market does.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from statistics import median
from typing import NamedTuple

from msgspec import structs

from marketflow.model import Candle, Tick, merge, rounded

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


def reference_candles(of_exchanges: Iterable[Mapping[int, Candle]]) -> dict[int, Candle]:
    """Return the candles of the medians of candles by their start, one mapping an exchange; all else is merged.

    Values are ordered as in any candle: of the medians, too, the lows are the lowest and the highs the highest.
    """
    by_start: dict[int, list[Candle]] = {}
    for candles in of_exchanges:
        for start, candle in candles.items():
            by_start.setdefault(start, []).append(candle)
    return {start: _reference_candle(candles) for start, candles in by_start.items()}


def _reference_candle(candles: Sequence[Candle]) -> Candle:
    whole = reduce(merge, candles)
    averages = [candle.average for candle in candles if candle.average is not None]
    return structs.replace(
        whole,
        open=median_of([candle.open for candle in candles]),
        high=median_of([candle.high for candle in candles]),
        low=median_of([candle.low for candle in candles]),
        close=median_of([candle.close for candle in candles]),
        total=median_of(averages) * whole.ticks if averages else 0.0,
    )


def median_of(prices: Sequence[float]) -> float:
    """Return the median of prices."""
    middle = median(prices)
    return middle if len(prices) % 2 else rounded(middle)  # the mean of two has digits that neither has
