"""Late recoveries: candles of other processes beside ticks of this one. No tick counts twice.

The n-th tick costs 2**n, so the total of any candle says which ticks are in it, once each.
"""

from collections.abc import Iterable
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketflow.model import MINUTE_MS, Candle, Candles, Slot, Tick, candle_of, merge_all, slice_start
from marketflow.pipeline.state import WindowState
from marketflow.stores.ports import RecoveredCandles
from tests.pipeline.world import BTC, START_MS

MINUTE = Slot(BTC, START_MS)
NOW = START_MS + MINUTE_MS


def tick(number: int) -> Tick:
    """The ticks of a minute come every 150 ms from its second 10 on."""
    at = START_MS + 10_000 + number * 150
    return Tick(float(2**number), at, at * 1_000_000)


def slices(numbers: Iterable[int]) -> Candles:
    ticks = map(tick, numbers)
    return merge_all({Slot(BTC, slice_start(each.at)): candle_of(each)} for each in ticks)


def minute_of(candles: Candles) -> Candle:
    return merge_all({MINUTE: candle} for candle in candles.values())[MINUTE]


def numbers_of(candle: Candle) -> list[int]:
    bits = int(candle.total)
    assert bits.bit_count() == candle.ticks, "a tick counts twice"
    return [number for number in range(bits.bit_length()) if bits >> number & 1]


def row(memory: WindowState) -> list[int]:
    return numbers_of(memory.take_all()[MINUTE])


def running(*numbers: Iterable[int], **limits: int) -> WindowState:
    memory = WindowState(late_after_ms=2000, **limits)
    memory.absorb(slices(chain(*numbers)), NOW)
    return memory


def test_slices_of_another_process_are_not_added_to_the_same_ticks() -> None:
    memory = running(range(10, 30))
    assert memory.restore(RecoveredCandles(slices(range(25)))) == {}
    assert row(memory) == list(range(30))
    memory.absorb(slices(range(30, 40)), NOW)
    assert row(memory) == list(range(40))


def test_overlapping_slice_keeps_its_more_complete_candle() -> None:
    whole = [Tick(float(2**n), START_MS + n, n) for n in range(3)]
    slot = Slot(BTC, START_MS)
    three = merge_all({slot: candle_of(each)} for each in whole)
    two = merge_all({slot: candle_of(each)} for each in whole[1:])
    for own, left, written in ((two, three, {}), (three, two, three)):
        memory = WindowState(late_after_ms=2000)
        memory.absorb(own, NOW)
        assert memory.restore(RecoveredCandles(left)) == written
        assert memory.all_slices() == three
        assert row(memory) == [0, 1, 2]


def test_slices_that_this_run_lacks_are_taken_from_another_process() -> None:
    memory = running(range(10, 15), range(20, 30))
    memory.restore(RecoveredCandles(slices(range(25))))
    assert row(memory) == list(range(30))


@pytest.mark.parametrize("times", [1, 2, 3])
def test_slices_read_again_count_once(times: int) -> None:
    memory = WindowState(late_after_ms=2000)
    for _ in range(times):
        memory.restore(RecoveredCandles(slices(range(20))))
    memory.absorb(slices(range(25, 30)), NOW)
    for _ in range(times):
        memory.restore(RecoveredCandles(slices(range(25))))
    assert row(memory) == list(range(30))


def test_evicted_slices_are_not_added_to_the_same_ticks() -> None:
    memory = running(range(50), slices_held=10, slices_held_ms=1000)
    assert len(memory.all_slices()) < 12
    memory.restore(RecoveredCandles(slices(range(40))))
    assert row(memory) == list(range(50))


def test_minute_of_another_process_is_not_added_to_the_same_ticks() -> None:
    """They are recovered as minutes, since there are more slices than may be held."""
    memory = running(range(10, 30))
    memory.restore(RecoveredCandles({}, {MINUTE: minute_of(slices(range(25)))}, whole_from=NOW))
    assert row(memory) == list(range(30))


def test_minute_of_an_earlier_run_is_added_to_later_ticks() -> None:
    memory = running(range(10, 30))
    for _ in range(2):
        memory.restore(RecoveredCandles({}, {MINUTE: minute_of(slices(range(10)))}, whole_from=NOW))
    assert row(memory) == list(range(30))


def left_folded(numbers: Iterable[int], cut: int) -> RecoveredCandles:
    """What a cache gives that has too many slices: those from number `cut` on, and before it their minute."""
    by_part = [[number for number in numbers if (number >= cut) is later] for later in (False, True)]
    minutes = {MINUTE: minute_of(slices(by_part[0]))} if by_part[0] else {}
    return RecoveredCandles(slices(by_part[1]), minutes, whole_from=slice_start(tick(cut).at))


def test_standby_merges_minutes_that_both_sides_have_only_in_part() -> None:
    """The standby began late and has evicted slices since; the owner was killed between two of its ticks."""
    memory = running(range(20, 50), slices_held=12, slices_held_ms=1000)
    assert len(memory.all_slices()) <= 12
    for _ in range(2):
        memory.restore(left_folded(range(45), 40))
        assert row(memory) == list(range(50))
    memory.absorb(slices(range(50, 53)), NOW)
    assert row(memory) == list(range(53))


def test_standby_that_began_a_moment_ago_merges_its_slices() -> None:
    memory = running(range(46, 50))
    memory.restore(left_folded(range(48), 40))
    assert row(memory) == list(range(50))


def test_earlier_run_of_many_series_is_added_to_evicted_slices() -> None:
    memory = running(range(20, 50), slices_held=12, slices_held_ms=1000)
    memory.restore(left_folded(range(18), 15))
    assert row(memory) == [*range(18), *range(20, 50)]


def test_late_slices_of_the_owner_are_found_when_it_is_read_again() -> None:
    """After a change of owners under load; the cache has all slices of both, and returns them folded."""
    memory = running(range(36, 50), slices_held=12, slices_held_ms=1000)
    memory.restore(left_folded(range(28), 40))
    assert row(memory) == [*range(28), *range(36, 50)]
    memory.restore(left_folded(range(49), 45)._replace(whole_from=0))
    assert row(memory) == list(range(50))


def test_standby_keeps_its_minute_where_the_owner_was_frozen_long_ago() -> None:
    memory = running(range(5, 50), slices_held=12, slices_held_ms=1000)
    memory.restore(left_folded(range(8), 40))
    assert len(row(memory)) == 45


def test_tick_of_a_slice_of_the_owner_is_not_counted_again_when_late() -> None:
    memory = running(range(20, 43), range(44, 50), slices_held=12, slices_held_ms=1000)
    memory.restore(left_folded(range(45), 40))
    memory.absorb(slices([43]), NOW)
    assert row(memory) == list(range(50))


def test_row_of_another_process_is_not_added_to_the_same_ticks() -> None:
    memory = running(range(10, 30))
    memory.adopt({MINUTE: minute_of(slices(range(25)))}, START_MS)
    assert row(memory) == list(range(30))
    memory.absorb(slices(range(30, 35)), NOW)
    assert row(memory) == list(range(35))


def test_row_and_slices_of_another_process_count_once_with_own_ticks() -> None:
    for first in (0, 1):
        memory = running(range(10, 30))
        for step in (first, 1 - first):
            if step:
                memory.restore(RecoveredCandles(slices(range(20))))
            else:
                memory.adopt({MINUTE: minute_of(slices(range(25)))}, START_MS)
        assert row(memory) == list(range(30))


def test_late_tick_beside_the_row_of_an_earlier_run_costs_no_later_tick() -> None:
    memory = running([3], range(25, 40))
    memory.adopt({MINUTE: minute_of(slices(chain(range(3), range(4, 25))))}, START_MS)
    assert set(row(memory)) >= set(range(40)) - {3}


@given(
    begun=st.integers(0, 49),
    killed=st.integers(0, 49),
    cut=st.integers(25, 45),
    held=st.integers(10, 30),
    later=st.integers(0, 3),
    times=st.integers(1, 3),
)
def test_takeover_loses_no_tick_and_counts_none_twice(
    begun: int, killed: int, cut: int, held: int, later: int, times: int
) -> None:
    """The owner has all ticks until it was killed, the standby all since it began."""
    memory = running(range(begun, 50), slices_held=held, slices_held_ms=1000)
    whole_from = min((slot.start for slot in memory.all_slices()), default=0)
    for _ in range(times):
        memory.restore(left_folded(range(killed), cut))
        memory.absorb({}, NOW)
    memory.absorb(slices(range(50, 50 + later)), NOW)
    found = row(memory)
    if killed < begun or whole_from <= tick(killed).at:
        assert found == [*range(killed), *range(max(begun, killed), 50 + later)]
    else:  # neither side has all of what was evicted here
        assert set(found) <= set(range(50 + later))


def left_before(recovered: RecoveredCandles, begun: int) -> RecoveredCandles:
    """As `recovered`, with what came before the first tick of this run apart; the owner has written all of that."""
    return recovered._replace(before={MINUTE: minute_of(slices(range(begun)))} if begun and recovered.minutes else {})


@given(
    begun=st.integers(0, 40),
    owned=st.integers(0, 49),
    holes=st.sets(st.integers(0, 49)),
    reads=st.lists(st.integers(0, 55), min_size=1, max_size=3),
    held=st.integers(10, 30),
    lag=st.integers(0, 6),
)
def test_takeover_is_exact_whatever_the_owner_could_not_write(
    begun: int, owned: int, holes: set[int], reads: list[int], held: int, lag: int
) -> None:
    """The cache may lack any tick that this run has received: it is read late, and writes of both have failed.

    Args:
        begun: the first tick that this run received.
        owned: how many the former owner received; what came later is written here.
        holes: of those since `begun`, the ones that nobody could write.
        reads: after which ticks the cache is read; ticks of the last 10 are not folded.
        held: limit of the slices.
        lag: how many ticks this run is behind.
    """
    memory = WindowState(late_after_ms=2000, slices_held=held, slices_held_ms=1500)
    for now in range(begun + lag, 56):
        memory.absorb(slices([now - lag]) if now - lag < 50 else {}, tick(now).at)
        for _ in range(reads.count(now) + (now == 55)):
            known = max(min(now + 1, owned), now - lag)
            written = [number for number in range(min(known, 50)) if number < begun or number not in holes]
            memory.restore(left_before(left_folded(written, now - 10), begun))
    assert row(memory) == [*range(50)]


FIRST = 20
"""The first tick of this run; the other process began before."""

own_numbers = st.sets(st.integers(FIRST, 49))
other_numbers = st.sets(st.integers(0, 49))
orders = st.lists(st.sampled_from(["ticks", "slices", "row"]), max_size=6)


@given(st.lists(own_numbers, min_size=6, max_size=6), other_numbers, other_numbers, orders)
def test_no_recovery_counts_a_tick_twice(
    own: list[set[int]], cached: set[int], archived: set[int], order: list[str]
) -> None:
    """Two processes that receive parts of the same ticks, with reads at random times."""
    memory = running([FIRST])
    seen = {FIRST}
    for step, received in zip(order, own, strict=False):
        if step == "ticks":
            memory.absorb(slices(received - seen), NOW)
            seen |= received
        elif step == "slices":
            memory.restore(RecoveredCandles(slices(cached)))
        elif archived:
            memory.adopt({MINUTE: minute_of(slices(archived))}, START_MS)
    found = set(row(memory))
    assert found <= seen | cached | archived
    if "row" not in order:
        expected = slices(seen | cached if "slices" in order else seen)
        assert len(memory.all_slices()) == len(expected)
        assert found == set(chain.from_iterable(map(numbers_of, memory.all_slices().values())))
