"""The algebra of candles."""

from decimal import Decimal
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Candles,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge,
    merge_all,
    merge_into,
    minute_start,
    more_complete,
    rounded,
    slice_start,
)
from tests.support.oracle import assert_same, candle_of_ticks, candles_of_ticks

# Eighths add up without rounding, so that the laws can be checked for equality.
PRICES = st.integers(1, 10_000_000).map(lambda n: n / 8)
SERIES = st.builds(Series, st.sampled_from(Mode), st.sampled_from(["a", "b"]), st.sampled_from(["X", "Y"]))


@st.composite
def tick_lists(query_candles: st.DrawFn, min_size: int = 1) -> list[Tick]:
    """Ticks as they arrive: in the order of their sequence, of any event time, often the same one."""
    rows = query_candles(st.lists(st.tuples(PRICES, st.integers(0, 2000)), min_size=min_size, max_size=30))
    return [Tick(price, at, sequence) for sequence, (price, at) in enumerate(rows)]


@st.composite
def candles(query_candles: st.DrawFn) -> Candle:
    return candle_of_ticks(query_candles(tick_lists()))


@st.composite
def distinct_candles(query_candles: st.DrawFn, count: int) -> list[Candle]:
    """Candles of ticks of one series, which all have an order of arrival of their own."""
    ticks = query_candles(tick_lists(min_size=count))
    groups: list[list[Tick]] = [[] for _ in range(count)]
    for i, tick in enumerate(ticks):
        groups[i if i < count else query_candles(st.integers(0, count - 1))].append(tick)
    return [candle_of_ticks(group) for group in groups]


@given(distinct_candles(3))
def test_merging_is_associative(three: list[Candle]) -> None:
    a, b, c = three
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(distinct_candles(2))
def test_merging_is_commutative(two: list[Candle]) -> None:
    a, b = two
    assert merge(a, b) == merge(b, a)


@given(tick_lists())
def test_a_tick_is_a_candle_of_one(ticks: list[Tick]) -> None:
    assert reduce(merge, map(candle_of, ticks)) == candle_of_ticks(ticks)


@given(tick_lists(), st.data())
def test_any_cut_into_batches_in_any_order_gives_the_same_candle(ticks: list[Tick], data: st.DataObject) -> None:
    batches: dict[int, list[Tick]] = {}
    for tick in ticks:
        batches.setdefault(data.draw(st.integers(0, 5)), []).append(tick)
    shuffled = data.draw(st.permutations(list(batches.values())))
    assert reduce(merge, map(candle_of_ticks, shuffled)) == candle_of_ticks(ticks)


@given(st.lists(st.tuples(SERIES, PRICES, st.integers(0, 200_000)), max_size=40), st.data())
def test_batches_of_many_series_and_slices_merge_to_those_of_all_ticks(
    rows: list[tuple[Series, float, int]], data: st.DataObject
) -> None:
    ticks = [(series, Tick(price, at, sequence)) for sequence, (series, price, at) in enumerate(rows)]
    batches: list[list[tuple[Series, Tick]]] = [[] for _ in range(4)]
    for item in ticks:
        batches[data.draw(st.integers(0, 3))].append(item)
    merged = merge_all(candles_of_ticks(batch, SLICE_MS) for batch in batches)
    assert_same(merged, candles_of_ticks(ticks, SLICE_MS))
    minutes = merge_all({Slot(slot.series, minute_start(slot.start)): candle} for slot, candle in merged.items())
    assert_same(minutes, candles_of_ticks(ticks, MINUTE_MS))


@given(candles())
def test_no_candles_are_the_empty_element(candle: Candle) -> None:
    some: Candles = {Slot(Series(Mode.TEST, "a", "X"), 0): candle}
    assert merge_all([{}, some, {}]) == some
    assert merge_all([]) == {}
    merge_into(some, {})
    assert len(some) == 1


def test_merging_leaves_the_batches_alone() -> None:
    slot = Slot(Series(Mode.TEST, "a", "X"), 0)
    batch = {slot: candle_of(Tick(1.0, 1, 1))}
    merge_all([batch, batch])
    assert batch == {slot: candle_of(Tick(1.0, 1, 1))}


@given(candles(), candles())
def test_more_complete_candle_has_the_most_ticks(a: Candle, b: Candle) -> None:
    assert more_complete(a, b).ticks == max(a.ticks, b.ticks)
    assert more_complete(a, b).ticks == more_complete(b, a).ticks


def test_more_complete_candle_has_no_lower_version_than_the_other() -> None:
    corrected = replace(candle_of(Tick(0.1, 1, 1)), version=3)
    made_anew = merge(candle_of(Tick(0.1, 1, 1)), candle_of(Tick(0.2, 2, 2)))
    for found in (more_complete(corrected, made_anew), more_complete(made_anew, corrected)):
        assert found == replace(made_anew, version=3)


def test_slices_and_minutes_start_on_the_grid() -> None:
    assert slice_start(60_099) == 60_000
    assert minute_start(119_999) == 60_000
    assert MINUTE_MS % SLICE_MS == 0


def test_average_of_equal_prices_is_that_price() -> None:
    three = merge(merge(candle_of(Tick(0.1, 0, 1)), candle_of(Tick(0.1, 1, 2))), candle_of(Tick(0.1, 2, 3)))
    assert three.average == 0.1


def test_rounded_amounts_lose_noise_and_keep_eight_decimals() -> None:
    assert rounded(0.1 + 0.2) == 0.3
    assert rounded(12345678.12345678) == 12345678.12345678
    assert rounded(0.00000001) == 0.00000001
    assert rounded(3.185e-8) == 3.185e-8
    assert rounded(209306158.20000003) == 209306158.2
    assert rounded(1e9 * 0.000005123) == 5123.0
    assert rounded(0.0) == 0.0


@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=30))
def test_sum_of_eight_decimals_is_shown_as_it_is(numbers: list[int]) -> None:
    """Up to 14 digits; above that as long as its float has no noise."""
    exact = sum(map(Decimal, numbers)) / 10**8
    assert rounded(float(exact)) == pytest.approx(float(exact), rel=1e-13)
    if exact < 2**24:
        assert rounded(float(exact)) == float(exact)
