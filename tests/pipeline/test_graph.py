"""The whole pipeline, in virtual time."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import pytest

from marketflow.errors import SettingsError, Unavailable
from marketflow.model import MINUTE_MS, SLICE_MS, Candle, Candles, Mode, Series, Slot, Tick, candle_of, slice_start
from marketflow.pipeline.instrumentation import PipelineCounters
from marketflow.settings import load
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.ports import RecoveredCandles
from tests.pipeline.world import BTC, ETH, LIVE_BTC, START_MS, ScriptedFeed, World
from tests.support.oracle import assert_same, candle_of_ticks, candles_of_ticks

MINUTE = Slot(BTC, START_MS)


@pytest.fixture
def world() -> World:
    return World().start()


def expected_minutes(world: World) -> Candles:
    return candles_of_ticks(world.sent, MINUTE_MS)


@contextmanager
def without_collections() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# Newest ticks and slices


def test_a_lone_tick_is_in_the_cache_at_once(world: World) -> None:
    world.send(5.0)
    world.run(0.001)
    assert world.cache.newest[BTC].price == 5.0


def test_an_older_tick_never_replaces_a_newer_one(world: World) -> None:
    world.send(5.0)
    world.run(0.5)
    world.send(4.0, ago_ms=1000)
    world.run(0.5)
    assert world.cache.newest[BTC].price == 5.0


def test_of_two_ticks_of_a_millisecond_the_later_arrival_is_the_newest(world: World) -> None:
    world.send(5.0, 6.0)
    world.run(0.001)
    assert world.cache.newest[BTC].price == 6.0


def test_slices_are_in_the_cache_within_a_tenth_of_a_second(world: World) -> None:
    for price in range(1, 50):
        world.send(float(price), series=BTC if price % 2 else ETH)
        world.run(0.017)
    world.run(0.1)
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


def test_empty_buffers_come_once_a_second_while_a_minute_is_open() -> None:
    world = World()
    due_at: list[float] = []
    take_closed = world.state.take_closed

    def take_closed_and_note(now_ms: int) -> Candles:
        due_at.append(world.seconds)
        return take_closed(now_ms)

    world.state.take_closed = take_closed_and_note  # type: ignore[method-assign]
    world.start()
    due_at.clear()
    world.run(5.05)
    assert due_at == [0.1, 0.2, 5.0]
    world.send(5.0)
    due_at.clear()
    world.run(3)
    assert due_at == [5.1, 5.2, 6.0, 7.0, 8.0]
    due_at.clear()
    world.clock_step_ms -= 3_600_000
    world.run(2)
    assert due_at == [9.0, 10.0]


def test_slices_of_a_lone_tick_are_cached_within_100_ms(world: World) -> None:
    world.run_until_ms(5230)
    world.send(5.0)
    world.run_until_ms(5301)
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


def test_newest_ticks_of_a_pause_are_one_write() -> None:
    world = World()
    pauses: list[float] = []

    def pause() -> None:
        pauses.append(world.seconds)
        world.scheduler._clock = world.seconds + 0.01  # the worker blocks

    world.pipeline.pause_newest = pause
    world.start()
    for number in range(1, 30):
        world.send(float(number))
    world.run(0.05)
    assert [write[BTC].price for write in world.cache.newest_writes] == [29.0, 29.0]
    assert len(pauses) == 2


def test_slices_of_all_series_are_one_write() -> None:
    feeds = [ScriptedFeed(Mode.TEST, name) for name in ("exchange1", "exchange2")]
    world = World(feeds={Mode.TEST: feeds, Mode.LIVE: []}).start()
    for feed in feeds:
        for symbol in ("BTCUSDT", "ETHUSDT"):
            world.send(5.0, series=Series(Mode.TEST, feed.exchange, symbol), feed=feed)
    world.run(0.2)
    assert [len(write) for write in world.cache.slice_writes] == [4]


def test_many_slices_are_written_in_partitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("marketflow.pipeline.assembly.SLICES_A_PARTITION", 1)
    world = World(workers=2).start()
    series = [BTC._replace(symbol=f"S{number}") for number in range(20)]
    for each in series:
        world.send(5.0, series=each)
    world.run(0.2)
    assert len(world.cache.slice_writes) == 2
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


def test_slices_that_are_written_wait_for_no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(dict[Slot, Candle]):
        """A dict to which there are weak references."""

    parts: list[weakref.ref[Part]] = []

    def split(item: Candles, *limits: object) -> list[Part]:
        made = [Part({slot: candle}) for slot, candle in item.items()]
        parts.extend(weakref.ref(part) for part in made)
        return made

    monkeypatch.setattr("marketflow.pipeline.assembly.split_by_series", split)
    world = World().start()
    with without_collections():
        for _ in range(3):
            world.send(5.0)
            world.send(5.0, series=ETH)
            world.run(0.2)
        world.cache.slice_writes.clear()
        world.run(0.2)
        assert len(parts) == 6
        assert [part() for part in parts] == [None] * 6


def test_a_slice_that_arrives_in_pieces_is_written_whole(world: World) -> None:
    world.run_until_ms(1000)
    world.send(1.0)
    world.run(0.3)
    world.send(2.0, ago_ms=300)
    world.run(0.3)
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


# Minutes


def test_minute_is_written_once_within_five_seconds_of_its_end(world: World) -> None:
    for second in range(60):
        world.run_until_ms(second * 1000 + 10)
        world.send(100.0 + second % 7, series=BTC)
        world.send(50.0 - second % 5, series=ETH)
    world.run_until_ms(65_000)
    assert_same(world.archive.rows, expected_minutes(world))
    assert_same(world.cache.minutes, expected_minutes(world))
    (written_at,) = world.archive.written_at[MINUTE]
    assert START_MS + MINUTE_MS <= written_at <= START_MS + MINUTE_MS + 5000


def test_a_minute_is_cut_by_event_time_to_the_millisecond(world: World) -> None:
    world.run_until_ms(59_999)
    world.send(1.0)
    world.run_until_ms(60_000)
    world.send(2.0)
    world.run_until_ms(130_000)
    assert world.archive.rows[MINUTE].close == 1.0
    assert world.archive.rows[Slot(BTC, START_MS + MINUTE_MS)].open == 2.0
    assert_same(world.archive.rows, expected_minutes(world))


def test_a_minute_without_ticks_has_no_row(world: World) -> None:
    world.send(1.0)
    world.run_until_ms(130_000)
    world.send(2.0)
    world.run_until_ms(190_000)
    assert {slot.start - START_MS for slot in world.archive.rows} == {0, 120_000}


def test_minute_is_written_with_the_longest_lateness_allowed() -> None:
    longest = 300
    with pytest.raises(SettingsError):
        load(overrides={"flow.late_after_seconds": longest + 0.001})
    flow = load(overrides={"flow.late_after_seconds": longest}).flow
    world = World(late_after_ms=flow.late_after_ms).start()
    world.send(1.0)
    world.run_until_ms(MINUTE_MS + longest * 1000 + 1000)
    assert_same(world.archive.rows, expected_minutes(world))
    assert world.state.late_ticks == 0


def test_tick_within_allowed_lateness_is_in_the_first_row_version(world: World) -> None:
    world.run_until_ms(30_000)
    world.send(1.0)
    world.run_until_ms(61_500)
    world.send(9.0, ago_ms=2000)
    world.run_until_ms(70_000)
    assert_same(world.archive.rows, expected_minutes(world))
    assert len(world.archive.written_at[MINUTE]) == 1


def test_tick_after_allowed_lateness_makes_a_more_complete_row(world: World) -> None:
    world.run_until_ms(30_000)
    world.send(1.0)
    world.run_until_ms(64_000)
    assert world.archive.rows[MINUTE].ticks == 1
    world.send(9.0, ago_ms=5000)
    world.run_until_ms(65_000)
    assert_same(world.archive.rows, expected_minutes(world))
    assert_same(world.cache.minutes, expected_minutes(world))
    assert len(world.archive.written_at[MINUTE]) == 2


def test_ticks_out_of_order_make_the_same_row(world: World) -> None:
    for n in range(40):
        world.run(1.4)
        world.send(10.0 + n, ago_ms=(n * 7919) % 5000)
    world.run(70)
    assert_same(world.archive.rows, expected_minutes(world))


def test_tick_of_an_expired_minute_is_counted_and_changes_no_row(world: World) -> None:
    world.send(1.0, 2.0)
    world.run_until_ms(600_000)
    rows = dict(world.archive.rows)
    world.send(9.0, ago_ms=600_000)
    world.run(5)
    assert world.state.late_ticks == 1
    assert world.archive.rows == rows


@pytest.mark.long
def test_memory_holds_minutes_not_hours(world: World) -> None:
    for _ in range(600):
        world.run(2)
        world.send(1.0)
    assert len(world.state.all_slices()) <= 7 * 30 + 1
    assert len(world.state.all_closed()) <= 7


# Slow and failing stores


def test_a_slow_consumer_gets_fewer_and_larger_writes_and_loses_nothing() -> None:
    world = World()
    write = world.cache.put_newest
    busy: list[float] = []

    def slow(newest: dict[Series, Tick]) -> bool:
        busy.append(world.seconds)
        world.scheduler._clock = world.seconds + 1.0  # the worker blocks for a second
        return write(newest)

    world.cache.put_newest = slow  # type: ignore[method-assign]
    world.start()
    for n in range(200):
        world.send(float(n))
    world.run(10)
    assert len(busy) <= 3
    assert world.cache.newest[BTC].price == 199.0
    world.run(70)
    assert_same(world.archive.rows, expected_minutes(world))


def test_write_that_raises_is_counted_and_drops_one_item(world: World) -> None:
    world.cache.broken_writes = 1
    world.send(1.0)
    world.run(0.01)
    assert world.pipeline.counters.cache_errors == 1
    world.send(2.0)
    world.run(0.01)
    assert world.cache.newest[BTC].price == 2.0
    world.run(70)
    assert_same(world.archive.rows, expected_minutes(world))


def test_writes_that_raise_again_and_again_are_logged_once(world: World, log: list[str]) -> None:
    """Each has a traceback: a hundred a second would fill a disk."""
    world.cache.broken_writes = 50
    for number in range(50):
        world.send(float(number + 1))
        world.run(0.01)
    assert world.pipeline.counters.cache_errors >= 50
    assert len([line for line in log if "a write to the cache failed" in line]) == 1


def test_cache_outage_keeps_rows_exact_and_ends_with_a_refill(world: World) -> None:
    world.send(1.0)
    world.run_until_ms(10_000)
    world.cache.down = True
    for n in range(100):
        world.run(1)
        world.send(float(n))
    assert_same(world.archive.rows, {MINUTE: expected_minutes(world)[MINUTE]})
    world.cache.down = False
    world.run(2)
    assert world.cache.newest[BTC].price == 99.0
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))
    assert_same(world.cache.minutes, {MINUTE: expected_minutes(world)[MINUTE]})


def test_an_emptied_cache_is_refilled(world: World) -> None:
    world.send(1.0)
    world.run(1)
    world.cache.empty()
    world.run(2)
    assert world.cache.newest[BTC].price == 1.0
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))


def test_archive_outage_delays_rows_until_seconds_after_it(world: World) -> None:
    world.archive.down = True
    for n in range(300):
        world.run(1)
        world.send(float(n))
    assert not world.archive.rows
    assert len(world.backlog) == 4
    assert world.pipeline.counters.archive_errors > 100
    world.archive.down = False
    world.run(1)
    closed = {slot: candle for slot, candle in expected_minutes(world).items() if slot.start < START_MS + 240_000}
    assert_same(world.archive.rows, closed)
    assert len(world.backlog) == 0


# The end


def test_full_backlog_drops_oldest_rows_and_logs_it(log: list[str]) -> None:
    world = World(pending_limit=2).start()
    world.archive.down = True
    for _ in range(4):
        world.send(1.0)
        world.run(60)
    assert len(world.backlog) == 2
    assert world.backlog.dropped == 1
    assert any("1 minute rows are dropped" in line for line in log)
    world.archive.down = False
    world.run(5)
    assert min(world.archive.rows).start > START_MS


def test_the_end_drains_everything_and_writes_the_open_minute(world: World) -> None:
    world.run_until_ms(59_000)
    world.send(1.0)
    world.run_until_ms(61_000)
    world.send(2.0)
    world.stop()
    world.run(2)
    assert world.completed
    assert_same(world.archive.rows, expected_minutes(world))
    assert_same(world.cache.slices, candles_of_ticks(world.sent, SLICE_MS))
    assert world.cache.newest[BTC].price == 2.0


def test_end_is_in_time_while_both_stores_are_down(world: World) -> None:
    world.send(1.0)
    world.run(1)
    world.cache.down = world.archive.down = True
    world.send(2.0)
    world.run(5)
    world.stop(drain_seconds=4.0)
    world.run(4.1)
    assert world.completed
    assert world.backlog.pending() == (0, 1)


def test_the_end_comes_in_time_while_a_feed_waits_to_reconnect(world: World) -> None:
    for _ in range(6):
        world.feed.fail(OSError("gone"))
        world.run(30)
    world.feed.fail(OSError("gone"))
    world.stop()
    world.run(1.5)
    assert world.completed


def test_the_end_does_not_wait_for_a_feed_that_hangs(world: World) -> None:
    world.send(1.0)
    world.modes.end()  # and the feed does not hear of it
    world.run(2)
    assert world.completed
    assert_same(world.archive.rows, expected_minutes(world))


# Recovery


def left_behind(*ages_ms: int) -> tuple[Candles, list[tuple[Series, Tick]]]:
    ticks = [(BTC, Tick(10.0 + n, START_MS - age, n)) for n, age in enumerate(ages_ms)]
    return {Slot(series, slice_start(tick.at)): candle_of(tick) for series, tick in ticks}, ticks


def test_a_minute_cut_by_a_crash_is_completed() -> None:
    world = World()
    world.clock_step_ms = 30_000  # starts in mid-minute
    world.cache.left_behind = {
        Slot(BTC, START_MS + 10_000): candle_of(Tick(7.0, START_MS + 10_000, 1)),
        Slot(BTC, START_MS + 20_000): candle_of(Tick(8.0, START_MS + 20_000, 2)),
    }
    world.start()
    world.send(9.0)
    world.run(40)
    row = world.archive.rows[MINUTE]
    assert (row.open, row.close, row.ticks) == (7.0, 9.0, 3)


def test_minutes_that_ended_while_nothing_ran_are_written() -> None:
    world = World()
    world.cache.left_behind, ticks = left_behind(70_000, 65_000, 20_000)
    world.start()
    world.run(3)
    assert_same(world.archive.rows, candles_of_ticks(ticks, MINUTE_MS))


def test_minute_cut_by_a_crash_is_written_hours_later() -> None:
    world = World()
    world.cache.left_behind, ticks = left_behind(3_600_000, 3_599_000)
    world.cache.down = True
    world.start()
    world.run(30)
    world.cache.down = False
    world.run(3)
    assert_same(world.archive.rows, candles_of_ticks(ticks, MINUTE_MS))
    assert world.state.late_ticks == 0


def test_late_recovery_merges_slices_of_the_earlier_run() -> None:
    world = World()
    world.clock_step_ms = 30_000
    world.cache.down = True
    world.cache.left_behind = {Slot(BTC, START_MS + 10_000): candle_of(Tick(7.0, START_MS + 10_000, 1))}
    world.start()
    world.send(9.0)
    world.run(10)
    world.cache.down = False
    world.run(40)
    assert world.archive.rows[MINUTE].ticks == 2


@pytest.mark.parametrize("stopped", [False, True])
def test_first_minute_has_what_another_process_went_on_to_write(stopped: bool) -> None:
    """The other process was stopped in mid-minute: neither of the two has all ticks itself."""
    world = World()
    world.clock_step_ms = 30_000
    asked: list[tuple[int, int]] = []
    of_the_other = [Tick(7.0, START_MS + 30_100, 1), Tick(9.0, START_MS + 31_000, 2)]  # of which the second is known

    def read_again(since: int, until: int, *_: object) -> RecoveredCandles:
        asked.append((since, until))
        return RecoveredCandles({Slot(BTC, slice_start(tick.at)): candle_of(tick) for tick in of_the_other})

    world.pipeline.recovery.read_again = read_again
    world.start()
    world.run(0.999)
    world.send(9.0)
    world.run(10)
    assert not asked
    if stopped:
        world.stop()
        world.run(1)
        assert world.completed
    else:
        world.run(100)
    assert asked == [(START_MS, START_MS + MINUTE_MS)]
    assert world.archive.rows[MINUTE].ticks == 2


def test_end_does_not_wait_for_the_slices_of_another_process() -> None:
    world = World()

    def read_again(*_: object) -> RecoveredCandles:
        raise Unavailable("down")

    world.pipeline.recovery.read_again = read_again
    world.start()
    world.send(9.0)
    world.run(1)
    world.stop()
    world.run(1)
    assert world.completed
    assert world.archive.rows[MINUTE].ticks == 1


def archived(price: float, ticks: int, start: int = START_MS) -> Candles:
    ticks_of_minute = [Tick(price, start + 1000 + n, n) for n in range(ticks)]
    return {Slot(BTC, start): candle_of_ticks(ticks_of_minute)}


def test_minute_of_two_runs_is_complete_though_the_cache_was_emptied() -> None:
    world = World()
    world.clock_step_ms = 30_000
    world.archive.rows = archived(7.0, ticks=5)
    world.start()
    world.send(9.0)
    world.run(40)
    row = world.archive.rows[MINUTE]
    assert (row.open, row.close, row.ticks) == (7.0, 9.0, 6)
    assert world.cache.minutes[MINUTE] == row


def test_minute_of_two_runs_is_complete_after_an_archive_outage() -> None:
    world = World()
    world.clock_step_ms = 30_000
    world.archive.rows = archived(7.0, ticks=5)
    world.archive.down = True
    world.start()
    world.send(9.0)
    world.run(100)
    world.archive.down = False
    world.run(5)
    assert world.archive.rows[MINUTE].ticks == 6


def test_ticks_in_both_stores_count_once() -> None:
    world = World()
    world.clock_step_ms = 30_000
    world.archive.rows = archived(7.0, ticks=5)
    world.cache.left_behind = {
        Slot(BTC, START_MS + 1000): candle_of_ticks([Tick(7.0, START_MS + 1000 + n, n) for n in range(5)]),
        Slot(BTC, START_MS + 20_000): candle_of(Tick(8.0, START_MS + 20_000, 6)),
    }
    world.start()
    world.send(9.0)
    world.run(40)
    assert world.archive.rows[MINUTE].ticks == 7


def test_ticks_in_both_stores_count_once_after_late_cache_recovery() -> None:
    world = World()
    world.clock_step_ms = 30_000
    world.archive.rows = archived(7.0, ticks=5)
    world.cache.left_behind = {
        Slot(BTC, START_MS + 1000): candle_of_ticks([Tick(7.0, START_MS + 1000 + n, n) for n in range(5)])
    }
    world.cache.down = True
    world.start()
    world.send(9.0)
    world.run(10)
    world.cache.down = False
    world.run(40)
    assert world.archive.rows[MINUTE].ticks == 6


def test_minutes_the_archive_never_got_are_taken_from_the_cache() -> None:
    world = World()
    lost = {Slot(BTC, START_MS - 3_600_000): candle_of(Tick(7.0, START_MS - 3_600_000, 1))}
    world.cache.backlog = lost
    world.start()
    world.run(1)
    assert world.archive.rows == lost
    assert world.cache.archived_until == START_MS - RECENT_MS


def test_nothing_is_marked_as_archived_before_the_backlog_is_pending() -> None:
    """A crash in between would leave the backlog neither in the archive nor to be read again."""
    world = World()
    world.cache.backlog = {Slot(BTC, START_MS - 3_600_000): candle_of(Tick(7.0, START_MS - 3_600_000, 1))}
    marks: list[bool] = []

    def mark_archived(until: int, shards: object) -> None:
        marks.append(world.cache.backlog.keys() <= world.archive.rows.keys())

    world.cache.mark_archived = mark_archived  # type: ignore[method-assign]
    unarchived = world.cache.unarchived

    def read_while_a_row_is_written(shards: Collection[str], shard_of: Callable[[Series], str]) -> Candles:
        backlog = unarchived(shards, shard_of)
        slot = Slot(BTC, START_MS - MINUTE_MS)
        world.backlog.add({slot: candle_of(Tick(1.0, slot.start, 1))})
        world.pipeline.archive_sink.upsert_rows()  # by another thread of the pool
        return backlog

    world.cache.unarchived = read_while_a_row_is_written  # type: ignore[method-assign]
    world.start()
    world.run(5)
    assert marks
    assert all(marks)


def test_minutes_are_marked_archived_when_no_row_can_follow(world: World) -> None:
    world.send(1.0)
    world.run_until_ms(65_000)
    assert world.cache.archived_until == START_MS + MINUTE_MS - RECENT_MS
    world.archive.down = True
    world.send(2.0)
    world.run_until_ms(600_000)
    assert world.cache.archived_until == START_MS + MINUTE_MS - RECENT_MS
    world.archive.down = False
    world.run(5)
    assert world.cache.archived_until == START_MS + 600_000 - RECENT_MS


@pytest.mark.long
def test_refill_includes_pending_rows_that_expired_from_memory(world: World) -> None:
    world.send(1.0)
    world.archive.down = True
    world.run_until_ms(600_000)
    world.cache.empty()
    world.run(2)
    assert_same(world.cache.minutes, expected_minutes(world))


# Counters


def test_errors_counted_by_several_threads_are_all_counted() -> None:
    counts = PipelineCounters()

    def count() -> None:
        for _ in range(20_000):
            counts.add(cache_errors=1)

    patience = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=count) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(patience)
    assert counts.cache_errors == 80_000


# Modes and feeds


def test_a_switch_closes_the_old_feeds_and_opens_the_new_ones(world: World) -> None:
    (test,), (live,) = world.feeds[Mode.TEST], world.feeds[Mode.LIVE]
    assert (test.open, live.open) == (1, 0)
    assert world.modes.switch(Mode.LIVE) == Mode.TEST
    assert (test.open, live.open) == (0, 1)
    assert world.modes.switch(Mode.LIVE) == Mode.LIVE
    assert live.subscriptions == 1


def test_modes_never_mix_however_often_they_switch(world: World) -> None:
    (live,) = world.feeds[Mode.LIVE]
    for n in range(100):
        world.run(0.7)
        if world.modes.switch(Mode.LIVE if n % 2 else Mode.TEST) == Mode.TEST:
            world.send(1.0 + n, series=LIVE_BTC, feed=live) if n % 2 else world.send(1.0 + n)
        else:
            world.send(1.0 + n) if n % 2 == 0 else world.send(1.0 + n, series=LIVE_BTC, feed=live)
    world.run(70)
    assert_same(world.archive.rows, expected_minutes(world))
    assert sum(feed.open for feeds in world.feeds.values() for feed in feeds) == 1


def test_the_minute_of_the_mode_that_was_left_is_written(world: World) -> None:
    world.send(1.0)
    world.run(1)
    world.modes.switch(Mode.LIVE)
    world.run(70)
    assert_same(world.archive.rows, expected_minutes(world))


def test_failing_feed_reconnects_and_affects_no_other() -> None:
    feeds = {Mode.TEST: [ScriptedFeed(Mode.TEST, name) for name in ("a", "b")], Mode.LIVE: []}
    world = World(feeds=feeds).start()
    bad, good = feeds[Mode.TEST]
    a, b = BTC._replace(exchange="a"), BTC._replace(exchange="b")
    for n in range(20):
        bad.fail(OSError("gone"))
        world.send(float(n + 1), series=b, feed=good)
        world.run(1)
    assert good.subscriptions == 1
    assert world.pipeline.counters.reconnects == {"a": 5}
    world.run(30)
    world.send(99.0, series=a, feed=bad)
    world.run(1)
    assert world.cache.newest[a].price == 99.0
    assert world.cache.newest[b].price == 20.0


def test_archived_candle_equals_that_of_the_oracle(world: World) -> None:
    world.send(3.0, 1.0, 2.0)
    world.run(65)
    assert world.archive.rows[MINUTE] == candle_of_ticks([tick for _, tick in world.sent])


@pytest.mark.parametrize("step", ["observe", "absorb", "take_closed"])
def test_batch_on_which_a_step_raises_is_dropped_alone(
    monkeypatch: pytest.MonkeyPatch, log: list[str], step: str
) -> None:
    world = World()
    works, broken = getattr(world.state, step), False

    def at_times(*arguments: object) -> object:
        if broken:
            raise RuntimeError("a bug in the flow")
        return works(*arguments)

    monkeypatch.setattr(world.state, step, at_times)
    world.start()
    world.send(1.0)
    world.run(1)
    broken = True
    world.send(2.0)
    world.run(1)
    broken = False
    assert world.pipeline.counters.failed_batches > 0
    assert any("a bug in the flow" in line for line in log)
    world.send(3.0)
    world.run(70)
    assert world.cache.newest[BTC].price == 3.0
    assert world.archive.rows[MINUTE].close == 3.0


# What is counted


def test_delay_of_the_newest_tick_to_the_cache_is_counted_once() -> None:
    world = World()
    write = world.cache.put_newest

    def slow(newest: dict[Series, Tick]) -> bool:
        world.scheduler._clock = world.seconds + 1.0  # the worker blocks for a second
        return write(newest)

    world.cache.put_newest = slow  # type: ignore[method-assign]
    world.start()
    world.send(1.0)
    world.send(2.0)
    world.send(3.0)
    world.run(10)
    delays = world.pipeline.counters.tick_to_cache.so_far()
    assert [written[BTC].price for written in world.cache.newest_writes] == [3.0, 3.0]
    assert sum(delays.counts) == 1
    assert delays.total == pytest.approx(1.0, abs=0.01)


def test_refill_counts_no_delays(world: World) -> None:
    world.send(1.0)
    world.run(100)
    world.cache.empty()
    world.run(2)
    assert len(world.cache.newest_writes) == 2
    delays = world.pipeline.counters.tick_to_cache.so_far()
    assert sum(delays.counts) == 1
    assert delays.total == pytest.approx(0.0, abs=0.01)


def test_failed_write_counts_an_error_and_no_delay(world: World) -> None:
    world.cache.down = True
    world.send(1.0)
    world.run(0.01)
    assert world.pipeline.counters.cache_errors == 1
    assert sum(world.pipeline.counters.tick_to_cache.so_far().counts) == 0


def test_rows_that_the_archive_refuses_are_not_counted_as_written(world: World) -> None:
    world.archive.refuses = {ETH}
    world.send(1.0, series=BTC)
    world.send(1.0, series=ETH)
    world.run_until_ms(70_000)
    counts = world.pipeline.counters
    assert (counts.rows_written, counts.rows_refused) == (1, 1)


# Days


def test_rollup_steps_do_not_delay_minutes(world: World) -> None:
    world.days.steps = 400
    for _ in range(70):
        world.send(1.0)
        world.run(1)
    assert world.days.steps == 0
    assert world.archive.written_at[MINUTE][0] <= START_MS + MINUTE_MS + 5000
    asked = len(world.days.asked_at)
    world.run(60)
    assert len(world.days.asked_at) - asked <= 6


def test_failing_rollup_is_logged_and_retried_with_backoff(world: World, log: list[str]) -> None:
    world.days.down = True
    world.send(1.0)
    world.run(600)
    assert any("rolled up" in line for line in log)
    assert len(world.days.asked_at) < 45  # every 16 to 20 s in the end
    assert_same(world.archive.rows, expected_minutes(world))
    world.days.down, world.days.steps = False, 5
    world.run(70)
    assert world.days.steps == 0


@pytest.mark.parametrize("down", [False, True])
def test_the_end_does_not_wait_for_days(world: World, down: bool) -> None:
    world.days.steps, world.days.down = 10**6, down
    world.send(1.0)
    world.run(30)
    world.stop()
    world.run(0.1)
    assert world.completed
    assert_same(world.archive.rows, expected_minutes(world))
    asked = len(world.days.asked_at)
    world.run(100)
    assert len(world.days.asked_at) == asked


def test_days_wait_until_the_archive_has_answered() -> None:
    world = World()
    world.archive.down = True
    world.start()
    world.run(60)
    assert not world.days.asked_at
    world.archive.down = False
    world.run(20)
    assert world.days.asked_at


# Clocks of venues


def test_clocks_are_measured_every_ten_minutes_in_the_mode_that_runs(world: World) -> None:
    generated, live = world.feeds[Mode.TEST][0], world.feeds[Mode.LIVE][0]
    world.run(4)
    assert (generated.clock_measurements, live.clock_measurements) == (1, 0)
    world.run(600)
    assert generated.clock_measurements == 2
    world.modes.switch(Mode.LIVE)
    world.run(4)
    assert (generated.clock_measurements, live.clock_measurements) == (2, 1)


def test_failed_measurement_of_a_clock_ends_nothing(world: World) -> None:
    def fail() -> None:
        world.feed.clock_measurements += 1
        raise RuntimeError("a bug")

    world.feed.measure_clock = fail  # type: ignore[method-assign]
    world.run(604)
    assert world.feed.clock_measurements == 2
    assert not world.completed


# Failures of feeds


def test_last_failure_of_a_feed_is_kept_with_its_next_attempt(world: World) -> None:
    world.run(1)
    world.feed.fail(OSError("no way to wss://someone:swordfish@example.com/ws?key=swordfish now"))
    failure = world.pipeline.counters.failures[world.feed]
    assert failure.text == "no way to wss://example.com/ws now"
    assert failure.at == world.now_ms
    assert 0 < failure.next_try_at - failure.at <= 2000


def test_next_attempt_waits_for_the_pause_of_the_venue(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.feed, "pause_seconds", 300.0)
    world.run(1)
    world.feed.fail(OSError("451"))
    failure = world.pipeline.counters.failures[world.feed]
    assert failure.next_try_at - failure.at == 300_000
