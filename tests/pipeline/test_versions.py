"""A correction of a closed minute raises its version; ticks before it is closed do not."""

import msgspec

from marketflow.model import MINUTE_MS, Candles, Series, Slot, Tick, candle_of, slice_start
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import RecoveredCandles
from tests.support.market import BTC, ETH, MINUTE


def tick(at: int, series: Series = BTC) -> Candles:
    return {Slot(series, slice_start(at)): candle_of(Tick(1.0, at, at))}


def versions(candles: Candles) -> dict[Series, int]:
    return {slot.series: candle.version for slot, candle in candles.items()}


def test_correction_of_a_closed_minute_raises_its_version() -> None:
    memory = WindowState(late_after_ms=2_000, closed_after_ms=5_500)
    end = MINUTE + MINUTE_MS
    memory.absorb(tick(MINUTE) | tick(MINUTE, ETH), end - 1)
    assert versions(memory.take_closed(end + 2_000)) == {BTC: 1, ETH: 1}
    memory.absorb(tick(end - 100), end + 4_900)
    assert versions(memory.take_closed(end + 4_900)) == {BTC: 1}
    assert memory.take_closed(end + 5_500) == {}
    for n in (2, 3):
        memory.absorb(tick(end - 200), end + 9_000 * n)
        assert versions(memory.take_closed(end + 9_000 * n)) == {BTC: n}
    assert versions(memory.all_closed()) == {BTC: 3, ETH: 1}
    assert memory.recent(BTC, MINUTE).minutes[MINUTE].version == 3


def test_minute_that_is_open_again_is_emitted_with_its_version() -> None:
    """Where the clock is set back, the memory must not show a later version than the stores have."""
    memory = WindowState(late_after_ms=2_000, closed_after_ms=5_500)
    memory.absorb(tick(MINUTE), MINUTE)
    assert versions(memory.take_closed(MINUTE + 2 * MINUTE_MS)) == {BTC: 1}
    memory.absorb(tick(MINUTE + 30_000), MINUTE + 30_000)
    assert versions(memory.take_closed(MINUTE + 30_000)) == {BTC: 2}
    memory.absorb(tick(MINUTE + 31_000), MINUTE + 31_000)
    assert memory.take_closed(MINUTE + 31_000) == {}
    assert versions(memory.take_closed(MINUTE + 2 * MINUTE_MS)) == {BTC: 2}


def test_versions_expire_with_their_minutes() -> None:
    memory = WindowState(late_after_ms=2_000)
    memory.absorb(tick(MINUTE), MINUTE)
    memory.take_closed(MINUTE + 2 * MINUTE_MS)
    memory.absorb(tick(MINUTE), MINUTE + 2 * MINUTE_MS)
    memory.take_closed(MINUTE + 3 * MINUTE_MS)
    assert memory._corrections
    memory.expire(MINUTE + 20 * MINUTE_MS)
    assert not memory._corrections


def test_recovered_minute_has_the_version_of_its_row() -> None:
    memory = WindowState(late_after_ms=2_000)
    corrected = msgspec.structs.replace(candle_of(Tick(1.0, MINUTE, MINUTE)), version=2)
    memory.restore(RecoveredCandles(tick(MINUTE)))
    memory.adopt({Slot(BTC, MINUTE): corrected}, MINUTE)
    assert versions(memory.take_closed(MINUTE + 2 * MINUTE_MS)) == {BTC: 2}
    memory.absorb(tick(MINUTE + 100), MINUTE + 2 * MINUTE_MS)
    assert versions(memory.take_closed(MINUTE + 2 * MINUTE_MS + 100)) == {BTC: 3}


def test_recovered_minute_without_new_ticks_keeps_its_version() -> None:
    memory = WindowState(late_after_ms=2_000)
    memory.take_closed(MINUTE + 2 * MINUTE_MS)
    memory.restore(RecoveredCandles(tick(MINUTE)))
    memory.adopt({Slot(ETH, MINUTE): candle_of(Tick(1.0, MINUTE, 1))}, MINUTE)
    assert versions(memory.take_closed(MINUTE + 2 * MINUTE_MS + 100)) == {BTC: 1, ETH: 1}
