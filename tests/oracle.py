"""Brute force: every candle recomputed from the list of ticks, in the plainest way there is."""

import math
from collections.abc import Iterable, Sequence

from marketflow.model import Candle, Candles, Series, Slot, Tick

BTC = "BTCUSDT"


def candle_of_ticks(ticks: Sequence[Tick]) -> Candle:
    """The candle of ticks in any order."""
    by_order = sorted(ticks, key=lambda tick: tick.order)
    first, last = by_order[0], by_order[-1]
    high = max(tick.price for tick in ticks)
    low = min(tick.price for tick in ticks)
    return Candle(
        first.price,
        high,
        low,
        last.price,
        math.fsum(tick.price for tick in ticks),
        len(ticks),
        first.at,
        last.at,
        min(tick.at for tick in ticks if tick.price == high),
        min(tick.at for tick in ticks if tick.price == low),
        first.sequence,
        last.sequence,
    )


def candles_of_ticks(ticks: Iterable[tuple[Series, Tick]], length_ms: int) -> Candles:
    """The candle of each series and stretch of `length_ms`."""
    by_slot: dict[Slot, list[Tick]] = {}
    for series, tick in ticks:
        by_slot.setdefault(Slot(series, tick.at - tick.at % length_ms), []).append(tick)
    return {slot: candle_of_ticks(group) for slot, group in by_slot.items()}


def assert_same(candles: Candles, expected: Candles) -> None:
    """The same slots and candles; totals up to 1e-9 of themselves."""
    assert candles.keys() == expected.keys()
    for slot, candle in candles.items():
        want = expected[slot]
        assert math.isclose(candle.total, want.total, rel_tol=1e-9), (slot, candle, want)
        assert _without_total(candle) == _without_total(want), slot


def _without_total(candle: Candle) -> tuple[object, ...]:
    return tuple(getattr(candle, name) for name in Candle.__struct_fields__ if name != "total")
