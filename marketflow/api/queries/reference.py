"""Candles of the reference price: the medians of those of all exchanges."""

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

from msgspec import structs

from marketflow.model import Candle, merge
from marketflow.reference_price import median_of


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
