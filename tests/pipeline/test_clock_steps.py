"""Steps of the machine's clock: every tick stays in exactly one row, the newest price stays the newest."""

import pytest

from marketflow.model import MINUTE_MS, Slot, Tick, candle_of
from marketflow.pipeline.backlog import Backlog
from marketflow.stores.cache_limits import RECENT_MS
from tests.pipeline.world import BTC, START_MS, World
from tests.support.oracle import assert_same, candles_of_ticks

HOUR_MS = 60 * MINUTE_MS


@pytest.fixture
def world() -> World:
    return World().start()


def trade(world: World, seconds: int) -> None:
    """A tick each second."""
    for _ in range(seconds):
        world.run(1.0)
        world.send(1.0 + len(world.sent))


def assert_exact(world: World) -> None:
    world.stop()
    world.run(1)
    assert world.completed
    assert_same(world.archive.rows, candles_of_ticks(world.sent, MINUTE_MS))
    assert world.state.late_ticks == 0
    assert world.pipeline.counters.failed_batches == 0


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS, 90_000, -90_000, 10_000, -10_000])
def test_every_tick_is_in_one_row_though_the_clock_steps(world: World, step_ms: int) -> None:
    trade(world, 90)
    world.clock_step_ms += step_ms
    trade(world, 90)
    assert_exact(world)


@pytest.mark.parametrize("step_ms", [HOUR_MS, -HOUR_MS])
def test_the_minute_that_ran_is_written_within_seconds_of_the_step(world: World, step_ms: int) -> None:
    trade(world, 10)
    world.clock_step_ms += step_ms
    trade(world, 5)
    assert world.archive.rows[Slot(BTC, START_MS)].ticks == 10


@pytest.mark.long
def test_repeated_minutes_have_the_ticks_of_both(world: World) -> None:
    trade(world, 12 * 60)
    world.clock_step_ms -= 11 * MINUTE_MS  # to a minute that has expired
    trade(world, 150)
    assert world.archive.rows[Slot(BTC, START_MS + MINUTE_MS)].ticks > 60
    assert_exact(world)


@pytest.mark.long
def test_repeated_minutes_are_complete_after_an_archive_outage(world: World) -> None:
    trade(world, 12 * 60)
    world.archive.down = True
    world.clock_step_ms -= 11 * MINUTE_MS
    trade(world, 150)
    world.archive.down = False
    trade(world, 10)
    assert_exact(world)


def test_a_step_there_and_back_loses_nothing(world: World) -> None:
    trade(world, 30)
    world.clock_step_ms += HOUR_MS
    trade(world, 10)
    world.clock_step_ms -= HOUR_MS
    trade(world, 60)
    assert_exact(world)


def test_the_newest_price_is_the_newest_after_a_step_back(world: World) -> None:
    trade(world, 10)
    world.clock_step_ms -= HOUR_MS
    trade(world, 2)
    world.run(1)
    assert world.cache.newest[BTC].price == world.sent[-1][1].price


def test_minutes_ahead_of_the_clock_mark_none_as_archived() -> None:
    before_the_step = {Slot(BTC, START_MS + HOUR_MS): candle_of(Tick(1.0, START_MS + HOUR_MS, 1))}
    backlog = Backlog()
    backlog.add(before_the_step)
    assert backlog.complete_until(START_MS) == START_MS - RECENT_MS
