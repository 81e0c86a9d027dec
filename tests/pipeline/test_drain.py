"""The end of the pipeline: pending rows are written for as long as the drain may last; the others are counted."""

from collections.abc import Iterable

import pytest

from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, SLICE_MS, Candles, Mode, Series, Slot, Tick, candle_of
from marketflow.pipeline.backlog import Pending
from tests.pipeline.world import BTC, EXCHANGE, START_MS, World
from tests.support.oracle import assert_same, candles_of_ticks

MANY = [Series(Mode.TEST, EXCHANGE, f"S{number}") for number in range(5000)]


@pytest.fixture
def world() -> World:
    return World().start()


def trade(world: World, series: Iterable[Series] = MANY) -> None:
    """One tick of each series."""
    for number, each in enumerate(series):
        world.send(1.0 + number, series=each)


def rows_of(world: World) -> Candles:
    return candles_of_ticks(world.sent, MINUTE_MS)


def stop(world: World) -> None:
    """Stop it in mid-minute, and wait for its end."""
    world.stop()
    world.run(4.1)
    assert world.completed


def test_rows_are_written_by_an_archive_that_returns_in_the_drain(world: World) -> None:
    trade(world)
    world.run(10)
    world.archive.down = True
    world.stop()
    world.run(2)
    assert not world.archive.rows
    world.archive.down = False
    world.run(0.3)
    assert world.completed
    assert_same(world.archive.rows, rows_of(world))
    assert world.backlog.pending() == Pending(0, 0)


def test_rows_that_the_archive_never_takes_are_in_the_cache(world: World) -> None:
    trade(world)
    world.run(10)
    world.archive.down = True
    stop(world)
    assert world.backlog.pending() == Pending(len(MANY), 0)
    assert_same(world.cache.minutes, rows_of(world))


def test_outage_in_the_drain_costs_only_transactions_after_it(world: World) -> None:
    trade(world)
    world.run(10)
    world.archive.transactions_left = 3
    stop(world)
    assert world.backlog.pending() == Pending(len(MANY) - 3 * world.archive.rows_a_transaction, 0)
    assert world.pipeline.counters.rows_written == len(world.archive.rows) == 3 * world.archive.rows_a_transaction
    assert_same(world.archive.rows | world.backlog.rows(), rows_of(world))


def test_oldest_minutes_are_written_first(world: World) -> None:
    world.archive.down = True
    for _ in range(3):
        trade(world, MANY[:1000])
        world.run(60)
    world.archive.down, world.archive.transactions_left = False, 1
    stop(world)
    assert {slot.start for slot in world.archive.rows} == {START_MS}


def test_rows_are_cached_by_a_cache_that_returns_in_the_drain(world: World) -> None:
    trade(world)
    world.run(10)
    world.archive.down = world.cache.down = True
    world.stop()
    world.run(3)
    world.cache.down = False
    world.run(1.1)
    assert world.completed
    assert world.backlog.pending() == Pending(len(MANY), 0)
    assert_same(world.cache.minutes, rows_of(world))


def test_cache_that_was_emptied_has_pending_rows_again_at_the_end(world: World) -> None:
    """Also those of earlier minutes, which it had confirmed."""
    world.archive.down = True
    trade(world, MANY[:100])
    world.run(70)
    trade(world, MANY[:100])
    world.run(5)
    world.cache.empty()
    stop(world)
    assert world.backlog.pending() == Pending(200, 0)
    assert_same(world.cache.minutes, rows_of(world))


def test_stores_that_are_slow_share_the_rows(world: World) -> None:
    """The stop has time for little more than half of the rows in each store."""
    trade(world)
    world.run(10)
    world.archive.transactions_left = 3
    put_minutes, parts = world.cache.put_minutes, 0

    def few(minutes: Candles) -> bool:
        nonlocal parts
        parts += 1
        if parts > 3:
            raise Unavailable("slow")
        return put_minutes(minutes)

    world.cache.put_minutes = few  # type: ignore[method-assign]
    stop(world)
    assert len(world.cache.minutes) == 3000
    assert world.backlog.pending() == Pending(len(MANY) - 3000, 0)


def test_rows_in_neither_store_are_counted(world: World) -> None:
    """A minute that the cache has confirmed before does not count as lost."""
    world.archive.down = True
    trade(world, MANY[:100])
    world.run(70)
    world.cache.down = True
    trade(world, MANY[:70])
    stop(world)
    assert world.backlog.pending() == Pending(100, 70)


def test_newer_version_of_a_cached_row_is_in_neither_store(world: World) -> None:
    world.archive.down = True
    trade(world, MANY[:10])
    world.run(70)
    world.cache.down = True
    world.send(5.0, series=MANY[0], ago_ms=60_000)
    stop(world)
    assert world.backlog.pending() == Pending(9, 1)


def test_cache_outage_does_not_delay_an_end_with_all_rows_archived(world: World) -> None:
    trade(world)
    world.run(10)
    world.cache.down = True
    world.stop()
    world.run(0.3)
    assert world.completed
    assert world.backlog.pending() == Pending(0, 0)


def test_end_without_rows_waits_for_no_store(world: World) -> None:
    world.archive.down = world.cache.down = True
    world.run(10)
    world.stop()
    world.run(0.3)
    assert world.completed


def test_archive_that_returns_in_the_drain_merges_its_part_of_a_minute() -> None:
    """An earlier run has archived a part of the running minute, of which the cache has nothing."""
    world = World()
    before = Tick(9.0, START_MS + 100, 1)
    world.archive.rows[Slot(BTC, START_MS)] = candle_of(before)
    world.archive.down = True
    world.start()
    world.run(10)
    world.send(1.0)
    world.run(1)
    world.stop()
    world.run(1)
    world.archive.down = False
    world.run(0.3)
    assert world.completed
    assert_same(world.archive.rows, candles_of_ticks([(BTC, before), *world.sent], MINUTE_MS))
    assert world.backlog.pending() == Pending(0, 0)


def test_slices_are_written_beside_a_drain_that_repeats(world: World) -> None:
    trade(world, MANY[:100])
    world.archive.down = True
    world.stop()
    world.run(1)
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


def test_write_that_is_repeated_in_the_drain_counts_rows_once(world: World) -> None:
    """Each attempt confirms some transactions, and the next one writes only the others."""
    trade(world)
    world.run(10)

    def fail(transaction: object, number: int = 0) -> int:
        raise Unavailable(f"{transaction} {number}")

    write = world.archive._transaction
    attempts = 0

    def sometimes(minutes: Candles, on_written: object) -> int:
        nonlocal attempts
        attempts += 1
        return fail(minutes) if attempts % 2 == 0 else write(minutes, on_written)  # type: ignore[arg-type]

    world.archive._transaction = sometimes  # type: ignore[method-assign]
    stop(world)
    assert world.pipeline.counters.rows_written == len(MANY)
    assert_same(world.archive.rows, rows_of(world))
    assert {len(times) for times in world.archive.written_at.values()} == {1}
