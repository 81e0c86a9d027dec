"""A window folds what it remembers just as folding all of it anew would."""

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Tick,
    candle_of,
    merge,
    minute_start,
    more_complete,
    slice_start,
)
from marketflow.stores.candle_window import CandleWindow, merged

NOW = 1_763_690_430_500
"""30.5 seconds into a minute."""

LATER = minute_start(NOW) + 2 * MINUTE_MS

AGES = st.one_of(st.integers(0, 3_000), st.integers(0, 4 * MINUTE_MS))
PRICES = st.integers(1, 5).map(float)
# Few times, so that ticks share slices and periods begin right at, before and after them.
TICKS = st.builds(lambda age, price, sequence: Tick(price, NOW - age, sequence), AGES, PRICES, st.integers(0, 9))
PERIODS = st.one_of(AGES, st.sampled_from([SLICE_MS, 1_000, 30_500, 90_500]))


def folded(ticks: list[Tick]) -> Candle:
    return reduce(merge, map(candle_of, ticks))


def plainly(
    slices: dict[int, Candle], minutes: dict[int, Candle], since: int, until: int, length: int
) -> Candle | None:
    """What a window of these slices and closed minutes covers, by the definition."""
    by_minute: dict[int, list[Candle]] = {}
    for start, candle in slices.items():
        if candle.last_at >= since and start < until:
            by_minute.setdefault(minute_start(start, length), []).append(candle)
    found = {start: reduce(merge, candles) for start, candles in by_minute.items()}
    for start, closed in minutes.items():
        if since <= start < until:
            found[start] = more_complete(found[start], closed) if start in found else closed
    return merged(found[start] for start in sorted(found))


@given(st.sampled_from([MINUTE_MS, 20_000, 1_000]), st.lists(st.one_of(TICKS, PERIODS), max_size=60), st.data())
def test_queries_see_everything_added_before_them(length: int, steps: list[Tick | int], data: st.DataObject) -> None:
    window = CandleWindow({}, {}, length)
    slices: dict[int, Candle] = {}
    minutes: dict[int, Candle] = {}
    for step in steps:
        if isinstance(step, Tick):
            start = slice_start(step.at)
            slices[start] = merge(slices[start], candle_of(step)) if start in slices else candle_of(step)
            window.put_slice(start, slices[start])
            if data.draw(st.booleans()):
                minute = minute_start(step.at, length)
                minutes[minute] = slices[start]
                window.put_minute(minute, slices[start])
        else:
            assert window.covered(NOW - step, LATER) == plainly(slices, minutes, NOW - step, LATER, length)
    assert len(window) == len(slices)


@given(st.lists(TICKS, max_size=20), st.lists(TICKS, max_size=20), PERIODS)
def test_what_was_known_stays_when_the_rest_is_filled_in(known: list[Tick], rest: list[Tick], period: int) -> None:
    mine = {slice_start(tick.at): candle_of(tick) for tick in known}
    loaded = {slice_start(tick.at): candle_of(tick) for tick in rest}
    window = CandleWindow(mine, {minute_start(start): candle for start, candle in mine.items()})
    window.fill(CandleWindow(loaded, {minute_start(start): candle for start, candle in loaded.items()}))
    whole = CandleWindow(
        loaded | mine, {minute_start(start): candle for source in (loaded, mine) for start, candle in source.items()}
    )
    assert window.covered(NOW - period, LATER) == whole.covered(NOW - period, LATER)


def test_minutes_before_a_time_are_expired() -> None:
    minute = minute_start(NOW)
    window = CandleWindow({at: candle_of(Tick(1.0, at, 1)) for at in (minute - SLICE_MS, minute)}, {})
    assert window.covered(minute - MINUTE_MS, LATER) is not None
    window.expire(minute)
    assert len(window) == 1
    assert window.covered(minute - MINUTE_MS, LATER) == candle_of(Tick(1.0, minute, 1))


def test_a_closed_minute_cut_by_the_edge_is_left_out() -> None:
    start = minute_start(NOW)
    tick = Tick(1.0, start + 40_000, 1)
    closed = folded([Tick(9.0, start, 0), tick])
    window = CandleWindow({slice_start(tick.at): candle_of(tick)}, {start: closed})
    assert window.covered(start + 1, LATER) == candle_of(tick)
    assert window.covered(start, LATER) == closed


def test_slice_counts_when_its_last_tick_does() -> None:
    start = slice_start(NOW)
    candle = folded([Tick(1.0, start + 10, 1), Tick(2.0, start + 60, 2)])
    window = CandleWindow({start: candle}, {})
    assert window.covered(start + 60, LATER) == candle
    assert window.covered(start + 61, LATER) is None


def test_newest_tick_counts_once_before_and_after_its_slice() -> None:
    before, newest = Tick(1.0, NOW - 500, 1), Tick(2.0, NOW - 1, 2)
    window = CandleWindow({slice_start(before.at): candle_of(before)}, {})
    assert window.covered(NOW - 1_000, LATER, newest) == folded([before, newest])
    window.put_slice(slice_start(newest.at), candle_of(newest))
    assert window.covered(NOW - 1_000, LATER, newest) == folded([before, newest])
    assert CandleWindow({}, {}).covered(NOW, LATER, newest) is None


def test_newest_tick_counts_once_in_a_minute_that_was_made_again() -> None:
    """Of such a minute the times of receipt are unknown: those of its trades stand for them, which are earlier."""
    start = minute_start(NOW)
    trades = [Tick(1.0, start + 500, (start + 600) * 10**6), Tick(2.0, start + 900, (start + 1_000) * 10**6)]
    lost = Tick(3.0, start + 100, 0)
    made_again = folded([lost, *(Tick(price, at, at * 10**6) for price, at, _ in trades)])
    slices = {slice_start(tick.at): candle_of(tick) for tick in trades}
    for held in (slices, {}):  # slices are held for six minutes
        window = CandleWindow(held, {start: made_again})
        assert window.by_minute(start, LATER, trades[-1]) == {start: made_again}
        assert window.covered(start, LATER, trades[-1]) == made_again


def test_newest_tick_counts_once_where_two_processes_have_received_it() -> None:
    """Each at a time of its own: one writes the slice, and the other one the newest price a moment later."""
    window = CandleWindow({}, {}, MINUTE_MS)
    window.put_slice(slice_start(NOW), folded([Tick(1.0, NOW - 20, 5), Tick(2.0, NOW, 6)]))
    found = window.covered(minute_start(NOW), LATER, Tick(2.0, NOW, 9))
    assert found is not None
    assert found.ticks == 2


def test_two_ticks_of_one_millisecond_are_two_ticks() -> None:
    first, second = Tick(1.0, NOW, 1), Tick(2.0, NOW, 2)
    window = CandleWindow({slice_start(NOW): candle_of(first)}, {})
    assert window.covered(NOW, LATER, second) == folded([first, second])


def test_ticks_ahead_of_the_clock_are_excluded() -> None:
    beyond, within = Tick(9.0, LATER + 1, 1), Tick(1.0, NOW, 2)
    slices = {slice_start(tick.at): candle_of(tick) for tick in (beyond, within)}
    window = CandleWindow(slices, {minute_start(beyond.at): candle_of(beyond)})
    assert window.covered(NOW - 1_000, LATER, beyond) == candle_of(within)


@given(st.sampled_from([MINUTE_MS, 20_000]), st.lists(TICKS, max_size=30), st.lists(TICKS, max_size=5), st.booleans())
def test_minutes_are_the_ticks_folded_by_minute(
    length: int, ticks: list[Tick], closed: list[Tick], ahead: bool
) -> None:
    slices: dict[int, Candle] = {}
    minutes: dict[int, Candle] = {}
    for tick in ticks:
        start = slice_start(tick.at)
        slices[start] = merge(slices[start], candle_of(tick)) if start in slices else candle_of(tick)
    for tick in closed:
        minutes[minute_start(tick.at, length)] = candle_of(tick)
    newest = Tick(7.0, NOW + 50, 99) if ahead else None
    since = minute_start(NOW) - 2 * MINUTE_MS
    found = CandleWindow(slices, minutes, length).by_minute(since, LATER, newest)
    starts = {minute_start(at, length) for at in (*slices, *minutes, *([newest.at] if newest else []))}
    assert [*sorted(found)] == sorted(start for start in starts if since <= start < LATER)
    for start, candle in found.items():
        within = {at: each for at, each in slices.items() if start <= at < start + length}
        expected = plainly(within, {at: each for at, each in minutes.items() if at == start}, start, LATER, length)
        if newest is not None and minute_start(newest.at, length) == start:
            expected = merged([expected, candle_of(newest)])
        assert candle == expected


def test_late_slice_leaves_a_corrected_minute_its_version() -> None:
    ticks = [Tick(1.0, minute_start(NOW) + SLICE_MS * n, n) for n in range(3)]
    corrected = replace(folded(ticks[:2]), version=2)
    window = CandleWindow({slice_start(tick.at): candle_of(tick) for tick in ticks}, {minute_start(NOW): corrected})
    assert window.by_minute(0, LATER) == {minute_start(NOW): replace(folded(ticks), version=2)}
