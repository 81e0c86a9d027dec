"""Buffer of slices: bounded, evicts the oldest, writes no version less complete than that in the cache."""

import pytest

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candles, Series, Slot, Tick, candle_of, merge_all, slice_start
from marketflow.pipeline.slices import HELD_MS, Slices
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import RecoveredCandles
from tests.pipeline.world import BTC, ETH, START_MS

SECOND = 1000
LIMIT = 100


def tick(second: float, sequence: int = 0) -> Candles:
    """A tick, `second` seconds after START_MS."""
    at = START_MS + round(second * SECOND)
    return {Slot(BTC, slice_start(at)): candle_of(Tick(100.0, at, sequence))}


def ticks(first: float, last: float) -> Candles:
    """Ten a second."""
    return merge_all(tick(tenth / 10) for tenth in range(round(first * 10), round(last * 10)))


@pytest.fixture
def memory() -> WindowState:
    """A window state of LIMIT slices, which is ten seconds of ticks, after a minute of ticks."""
    memory = WindowState(late_after_ms=2000, slices_held=LIMIT)
    for second in range(60):
        memory.absorb(ticks(second, second + 1), START_MS + (second + 1) * SECOND)
    return memory


def minute_of(memory: WindowState) -> Candles:
    return memory.take_closed(START_MS + 2 * MINUTE_MS)


def test_limit_evicts_oldest_slices_but_none_of_the_last_seconds(
    memory: WindowState,
) -> None:
    starts = sorted(slot.start for slot in memory.all_slices())
    assert starts[0] == START_MS + 60 * SECOND - HELD_MS
    assert len(starts) == HELD_MS // 100


def test_new_ticks_do_not_wait_for_a_copy_of_all(memory: WindowState) -> None:
    """Of 200,000 slices, as a refill needs them, it takes a third of a second."""

    def wanted(series: Series) -> bool:
        memory.observe(tick(60))  # would wait for itself
        return series == BTC

    assert {slot.series for slot in memory.all_slices(wanted)} == {BTC}
    minute_of(memory)
    assert {slot.series for slot in memory.all_closed(lambda series: series == BTC)} == {BTC}
    assert memory.all_slices(lambda _: False) == memory.all_closed(lambda _: False) == {}


def test_minute_has_the_ticks_of_evicted_slices(memory: WindowState) -> None:
    assert minute_of(memory)[Slot(BTC, START_MS)].ticks == 600


def test_late_tick_of_an_evicted_slice_counts_in_its_minute_only(memory: WindowState) -> None:
    assert memory.absorb(tick(10, sequence=1), START_MS + 60 * SECOND) == {}
    assert minute_of(memory)[Slot(BTC, START_MS)].ticks == 601


def test_a_late_tick_of_the_last_seconds_makes_the_whole_slice(memory: WindowState) -> None:
    (whole,) = memory.absorb(tick(52, sequence=1), START_MS + 60 * SECOND).values()
    assert whole.ticks == 2


def test_a_few_series_keep_all_their_slices() -> None:
    memory = WindowState(late_after_ms=2000)
    for second in range(420):
        memory.absorb(ticks(second, second + 1), START_MS + (second + 1) * SECOND)
    assert len(memory.all_slices()) == 4200
    assert memory.recent(BTC, START_MS + 12_345).slices


def test_range_before_the_slices_is_exact_only_at_whole_minutes(memory: WindowState) -> None:
    assert len(memory.recent(BTC, START_MS + 50 * SECOND).slices) == 100
    with pytest.raises(Unavailable):
        memory.recent(BTC, START_MS + 10 * SECOND)
    assert memory.recent(BTC, START_MS).minutes[START_MS].ticks == 600


def test_slices_are_held_after_the_clock_was_set_back(memory: WindowState) -> None:
    hour_ago = -3600
    for second in range(hour_ago, hour_ago + 20):
        now_ms = START_MS + (second + 1) * SECOND
        memory.absorb({}, now_ms)
        assert len(memory.absorb(ticks(second, second + 1), now_ms)) == 10


def test_recovered_minutes_are_complete_beyond_the_slice_limit() -> None:
    memory = WindowState(late_after_ms=2000)
    left = merge_all(tick(second) for second in range(30))
    whole = {Slot(BTC, START_MS): merge_all({Slot(BTC, 0): each} for each in left.values())[Slot(BTC, 0)]}
    memory.restore(RecoveredCandles({}, whole, whole_from=START_MS + 30 * SECOND))
    assert memory.absorb(tick(29, sequence=1), START_MS + 30 * SECOND) == {}
    assert memory.absorb(tick(30), START_MS + 30 * SECOND)
    assert minute_of(memory)[Slot(BTC, START_MS)].ticks == 32
    assert memory.newest_of([BTC])[BTC].at == START_MS + 29 * SECOND


@pytest.fixture
def recovered() -> WindowState:
    """It found more slices than may be held, and 20 ticks of the last two seconds among them; then the flow goes on."""
    memory = WindowState(late_after_ms=2000)
    minute = merge_all({Slot(BTC, START_MS): candle} for candle in ticks(28, 30).values())
    memory.restore(RecoveredCandles({}, minute, whole_from=START_MS + 30 * SECOND))
    for tenth in range(300, 310):
        memory.absorb(tick(tenth / 10), START_MS + tenth * 100 + 100)
    return memory


def test_late_tick_makes_no_poorer_slice_after_large_recovery(recovered: WindowState) -> None:
    assert recovered.absorb(tick(29, sequence=1), START_MS + 31 * SECOND) == {}
    assert minute_of(recovered)[Slot(BTC, START_MS)].ticks == 20 + 10 + 1


def test_period_before_large_recovery_is_not_answered_as_whole(recovered: WindowState) -> None:
    with pytest.raises(Unavailable):
        recovered.recent(BTC, START_MS + 28_500)
    assert recovered.recent(BTC, START_MS).minutes[START_MS].ticks == 30


def test_large_recovery_holds_back_slices_that_were_ahead_of_the_clock() -> None:
    memory = WindowState(late_after_ms=2000)
    minute = merge_all({Slot(BTC, START_MS): candle} for candle in ticks(28, 32).values())
    memory.restore(RecoveredCandles({}, minute, whole_from=START_MS + 30 * SECOND))
    assert memory.absorb(tick(31.9, sequence=1), START_MS + 30 * SECOND) == {}
    assert memory.absorb(tick(32), START_MS + 32 * SECOND)


def test_slices_are_held_for_as_long_as_the_allowed_skew() -> None:
    """Also of an exchange that is a minute behind, as allowed, with any number of other slices."""
    memory = WindowState(late_after_ms=2000, slices_held=LIMIT, slices_held_ms=70_000)
    for second in range(120):
        behind = {Slot(ETH, slot.start - MINUTE_MS): candle for slot, candle in tick(second).items()}
        assert (
            memory.absorb(ticks(second, second + 1) | behind, START_MS + (second + 1) * SECOND).keys() >= behind.keys()
        )


def test_the_slices_of_one_series_are_not_those_of_another() -> None:
    slices = Slices()
    for slot, candle in tick(1).items():
        slices.merge({slot: candle})
        slices.merge({Slot(ETH, slot.start + SECOND): candle})
    assert len(slices) == 2
    assert list(slices.of(BTC, START_MS)) == [START_MS + SECOND]
    slices.expire(START_MS + 2 * SECOND)
    assert len(slices) == 1
