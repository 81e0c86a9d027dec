"""Brute force: every candle recomputed from the list of ticks, in the plainest way there is.

And the comparison with the table, exact, which says of a row that is wrong which ticks it lacks or has too many.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from marketflow.model import MINUTE_MS, Candle, Candles, Series, Slot, Tick

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
    return {slot: candle_of_ticks(group) for slot, group in ticks_by_slot(ticks, length_ms).items()}


def ticks_by_slot(ticks: Iterable[tuple[Series, Tick]], length_ms: int) -> dict[Slot, list[Tick]]:
    """The ticks of each series and stretch of `length_ms`, in the order given."""
    by_slot: dict[Slot, list[Tick]] = {}
    for series, tick in ticks:
        by_slot.setdefault(Slot(series, tick.at - tick.at % length_ms), []).append(tick)
    return by_slot


Rows = Mapping[Slot, Mapping[str, Any]]
"""The table: each row by its column names, under its series and the start of its minute (Unix ms)."""


def assert_rows_equal(rows: Rows, sent: Iterable[tuple[Series, Tick]], minute_ms: int = MINUTE_MS) -> None:
    """The rows are those of all ticks that were sent: no more, no fewer, none that differs.

    Raises:
        AssertionError: they are not; it says what is wrong with each, and which ticks are missing.
    """
    complaints = differences(rows, sent, minute_ms)
    assert not complaints, "\n".join(complaints)


def differences(rows: Rows, sent: Iterable[tuple[Series, Tick]], minute_ms: int = MINUTE_MS) -> list[str]:
    """What is wrong with rows, one line for each that is."""
    ticks = ticks_by_slot(sent, minute_ms)
    complaints = [
        f"{_name(slot)}: a row of {rows[slot]['tick_count']} ticks that nobody sent" for slot in rows.keys() - ticks
    ]
    for slot, group in sorted(ticks.items()):
        if slot not in rows:
            complaints.append(f"{_name(slot)}: no row; {len(group)} ticks were sent")
        elif wrong := _wrong(rows[slot], candle_of_ticks(group)):
            complaints.append(f"{_name(slot)}: {', '.join(wrong)}; {_account(rows[slot], group)}")
    return complaints


def missing(row: Mapping[str, Any], ticks: Sequence[Tick]) -> list[Tick] | None:
    """The ticks that a row lacks, if they are one run in the order of sending; None otherwise, or if it has too many.

    Told by how many they are and what they amount to, so that prices must not repeat in a pattern.
    """
    count = len(ticks) - int(row["tick_count"])
    amount = math.fsum(tick.price for tick in ticks) - row["average_price"] * row["tick_count"]
    if count < 0:
        return None
    sums = list(accumulate((tick.price for tick in ticks), initial=0.0))
    for begin in range(len(ticks) - count + 1):
        if math.isclose(
            sums[begin + count] - sums[begin], amount, rel_tol=1e-9, abs_tol=1e-6 * max(1.0, sums[-1] / len(ticks))
        ):
            return list(ticks[begin : begin + count])
    return None


def _wrong(row: Mapping[str, Any], candle: Candle) -> list[str]:
    expected = {
        "tick_count": candle.ticks,
        "open_price": candle.open,
        "max_price": candle.high,
        "min_price": candle.low,
        "close_price": candle.close,
    }
    wrong = [f"{name} is {row[name]} and not {value}" for name, value in expected.items() if row[name] != value]
    if candle.average is None or not math.isclose(row["average_price"], candle.average, rel_tol=1e-9):
        wrong.append(f"average_price is {row['average_price']} and not {candle.average}")
    return wrong


def _account(row: Mapping[str, Any], ticks: Sequence[Tick]) -> str:
    lacking = missing(row, ticks)
    if lacking is None:
        return "the difference is no one run of ticks"
    if not lacking:
        return "no tick is missing"
    first, last = ticks.index(lacking[0]), ticks.index(lacking[-1])
    return f"missing are those sent as number {first} to {last} of {len(ticks)}, {lacking[0]} to {lacking[-1]}"


def _name(slot: Slot) -> str:
    return f"{slot.series.mode}:{slot.series.exchange}:{slot.series.symbol} at {slot.start}"


def assert_same(candles: Candles, expected: Candles) -> None:
    """The same slots and candles; totals up to 1e-9 of themselves. Ticks say nothing of versions."""
    assert candles.keys() == expected.keys()
    for slot, candle in candles.items():
        want = expected[slot]
        assert math.isclose(candle.total, want.total, rel_tol=1e-9), (slot, candle, want)
        assert _without_total(candle) == _without_total(want), slot


def _without_total(candle: Candle) -> tuple[object, ...]:
    return tuple(getattr(candle, name) for name in Candle.__struct_fields__ if name not in ("total", "version"))
