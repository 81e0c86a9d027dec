"""Authoritative minutes replace those made of ticks, in memory and in both stores."""

from typing import Any

from msgspec.structs import replace
from reactivex import Observable
from reactivex.subject import Subject

from marketflow.model import MINUTE_MS, Amounts, Candle, Candles, Slot, more_complete
from marketflow.pipeline.state import WindowState
from tests.pipeline.world import BTC, ETH, START_MS, World

MINUTE = Slot(BTC, START_MS)
END = START_MS + MINUTE_MS


class Scripted:
    """Corrections that emit what the test sends, and record the closed minutes."""

    def __init__(self) -> None:
        self.sent: Subject[Candles] = Subject()
        self.closed: list[Candles] = []

    def minutes(self, closed: Observable[Candles], ended: Observable[Any]) -> Observable[Candles]:
        closed.subscribe(self.closed.append)
        return self.sent


def minute(ticks: int, start: int = START_MS, **more: Any) -> Candle:
    amounts = Amounts(float(ticks), 2.0 * ticks, 1.0, 2.0)
    return Candle(1.0, 3.0, 1.0, 2.0, 2.0 * ticks, ticks, start, start + 9, start, start, 0, 0, 1, amounts, **more)


def test_repaired_minute_replaces_the_closed_one_in_both_stores() -> None:
    corrections = Scripted()
    world = World(corrections=corrections).start()
    world.send(5.0)
    world.run(70)
    assert world.archive.rows[MINUTE].ticks == 1
    assert any(MINUTE in each for each in corrections.closed)
    corrections.sent.on_next({MINUTE: minute(7)})
    world.run(1)
    assert world.archive.rows[MINUTE] == world.cache.minutes[MINUTE] == replace(minute(7), version=2)


def test_repaired_minute_of_long_ago_goes_to_both_stores() -> None:
    corrections = Scripted()
    world = World(corrections=corrections).start()
    old = Slot(BTC, START_MS - 60 * MINUTE_MS)
    corrections.sent.on_next({old: minute(7, old.start)})
    world.run(1)
    assert world.archive.rows[old] == world.cache.minutes[old] == minute(7, old.start)


def test_less_complete_minute_changes_nothing() -> None:
    corrections = Scripted()
    world = World(corrections=corrections).start()
    world.send(5.0, 6.0, 7.0)
    world.run(70)
    before = world.archive.rows[MINUTE]
    corrections.sent.on_next({MINUTE: minute(2)})
    world.run(1)
    assert world.archive.rows[MINUTE] == before


def test_ticks_after_a_repair_count_once_it_is_exceeded() -> None:
    state = WindowState(late_after_ms=2_000, closed_after_ms=5_500)
    assert state.replace({MINUTE: minute(2)}, END) == {}
    assert state.take_closed(END + 5_500)[MINUTE] == minute(2)


def test_verification_alone_raises_no_version() -> None:
    state = WindowState(late_after_ms=2_000)
    state.replace({MINUTE: minute(2)}, END)
    state.take_closed(END + 2_000)
    state.replace({MINUTE: minute(2, verified=True)}, END + 9_000)
    taken = state.take_closed(END + 9_000)
    assert taken == {MINUTE: minute(2, verified=True)}
    state.replace({MINUTE: minute(2, verified=True)}, END + 10_000)
    assert state.take_closed(END + 10_000) == {}


def test_failing_corrections_stop_nothing_else() -> None:
    corrections = Scripted()
    world = World(corrections=corrections).start()
    corrections.sent.on_error(RuntimeError("a bug"))
    world.send(5.0)
    world.run(70)
    assert world.archive.rows[MINUTE].ticks == 1
    world.stop()
    world.run(1)
    assert world.completed


def test_pipeline_ends_without_waiting_for_corrections() -> None:
    world = World(corrections=Scripted()).start()
    world.send(5.0, series=ETH)
    world.stop()
    world.run(1)
    assert world.completed


def test_candle_of_ticks_is_better_than_the_venue_s_with_as_many() -> None:
    ticks, theirs = minute(2), minute(2, source="venue")
    assert more_complete(ticks, theirs) == more_complete(theirs, ticks) == ticks
    assert more_complete(minute(2), minute(3, source="venue")).source == "venue"
