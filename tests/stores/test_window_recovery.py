"""A window folded by columns is what its slices merged one by one are."""

from hypothesis import given
from hypothesis import strategies as st

from marketflow.model import MINUTE_MS, SLICE_MS, Candle, Tick, candle_of, merge, minute_start, slice_start
from marketflow.stores.redis.codec import encode_candle
from marketflow.stores.redis.recovery import minutes_of_window
from tests.support.market import MINUTE

# Whole prices add up exactly in any order.
TICKS = st.lists(
    st.builds(Tick, st.integers(1, 9).map(float), st.integers(MINUTE, MINUTE + 3 * MINUTE_MS), st.integers(0, 5)),
    min_size=1,
    max_size=30,
)


def slices_of(ticks: list[Tick], length_ms: int) -> dict[int, Candle]:
    slices: dict[int, Candle] = {}
    for tick in ticks:
        start = minute_start(tick.at, length_ms)
        slices[start] = merge(slices[start], candle_of(tick)) if start in slices else candle_of(tick)
    return dict(sorted(slices.items()))


@given(TICKS, st.sampled_from([1000, MINUTE_MS]))
def test_minutes_have_every_tick_of_their_slices(ticks: list[Tick], minute_ms: int) -> None:
    members = [encode_candle(candle) for candle in slices_of(ticks, SLICE_MS).values()]
    assert minutes_of_window(members, minute_ms) == slices_of(ticks, minute_ms)


@given(TICKS, st.sampled_from([1000, MINUTE_MS]))
def test_slices_of_one_tick_are_folded_like_all_others(ticks: list[Tick], minute_ms: int) -> None:
    lone = list({slice_start(tick.at): tick for tick in ticks}.values())
    members = [encode_candle(candle) for candle in slices_of(lone, SLICE_MS).values()]
    assert minutes_of_window(members, minute_ms) == slices_of(lone, minute_ms)


def test_more_complete_slice_counts_and_invalid_ones_are_skipped() -> None:
    first, second = Tick(1.0, MINUTE, 1), Tick(2.0, MINUTE + 5, 2)
    whole = merge(candle_of(first), candle_of(second))
    members = [encode_candle(candle_of(first)), encode_candle(whole), b"\xff", b"[1,2,", b"[1,2,3,4]"]
    assert minutes_of_window(members, MINUTE_MS) == {MINUTE: whole}
    assert minutes_of_window(members[:1] * 2, MINUTE_MS) == {MINUTE: candle_of(first)}
    assert minutes_of_window([], MINUTE_MS) == {}
