"""Feeds that are added to a running pipeline and removed from it."""

from marketflow.model import Mode, Series
from tests.pipeline.world import BTC, ScriptedFeed, World

OTHER = Series(Mode.TEST, "exchange2", "BTCUSDT")


def test_added_feed_begins_and_others_are_not_interrupted() -> None:
    world = World().start()
    world.send(100.0)
    added = ScriptedFeed(Mode.TEST, "exchange2")
    world.feed_set.replace({**world.feeds, Mode.TEST: [world.feed, added]})
    world.send(101.0)
    world.send(7.0, series=OTHER, feed=added)
    world.run(1)
    assert (world.feed.subscriptions, world.feed.open, added.subscriptions, added.open) == (1, 1, 1, 1)
    assert world.cache.newest[BTC].price == 101.0
    assert world.cache.newest[OTHER].price == 7.0


def test_removed_feed_is_stopped_and_its_ticks_are_rows() -> None:
    removed = ScriptedFeed(Mode.TEST, "exchange2")
    stays = ScriptedFeed(Mode.TEST)
    world = World(feeds={Mode.TEST: [stays, removed], Mode.LIVE: []}).start()
    world.send(100.0)
    world.send(7.0, 9.0, series=OTHER, feed=removed)
    world.feed_set.replace({Mode.TEST: [stays], Mode.LIVE: []})
    assert (stays.subscriptions, stays.open, removed.open) == (1, 1, 0)
    world.send(102.0)
    world.run(65)
    rows = {slot.series: candle for slot, candle in world.archive.rows.items()}
    assert (rows[OTHER].low, rows[OTHER].close, rows[OTHER].ticks) == (7.0, 9.0, 2)
    assert (rows[BTC].close, rows[BTC].ticks) == (102.0, 2)
    world.run(60)
    assert removed.subscriptions == 1


def test_feed_removed_during_a_pause_does_not_reconnect() -> None:
    removed = ScriptedFeed(Mode.TEST, "exchange2")
    stays = ScriptedFeed(Mode.TEST)
    world = World(feeds={Mode.TEST: [stays, removed], Mode.LIVE: []}).start()
    removed.fail(OSError("lost"))
    world.feed_set.replace({Mode.TEST: [stays], Mode.LIVE: []})
    world.run(60)
    assert (removed.subscriptions, stays.subscriptions, stays.open) == (1, 1, 1)


def test_blocked_removed_feed_is_cut_off_after_a_second() -> None:
    removed = ScriptedFeed(Mode.TEST, "exchange2")
    world = World(feeds={Mode.TEST: [removed], Mode.LIVE: []}).start()
    removed.stop = lambda: None  # type: ignore[method-assign]
    world.feed_set.replace({mode: [] for mode in Mode})
    assert removed.open == 1
    world.run(1.5)
    assert removed.open == 0


def test_feeds_changed_in_the_other_mode_begin_with_the_switch() -> None:
    world = World().start()
    added = ScriptedFeed(Mode.LIVE, "exchange2")
    world.feed_set.replace({Mode.TEST: world.feeds[Mode.TEST], Mode.LIVE: [added]})
    assert (added.subscriptions, world.feed.open) == (0, 1)
    world.modes.switch(Mode.LIVE)
    assert (added.open, world.feed.open) == (1, 0)
    world.modes.switch(Mode.TEST)
    assert (added.open, world.feed.open, world.feed.subscriptions) == (0, 1, 2)


def test_pipeline_ends_after_its_feeds_were_changed() -> None:
    world = World().start()
    added = ScriptedFeed(Mode.TEST, "exchange2")
    world.feed_set.replace({**world.feeds, Mode.TEST: [world.feed, added]})
    world.send(7.0, series=OTHER, feed=added)
    added.stop()
    world.stop()
    world.run(0.5)
    assert world.completed
    assert [candle.close for slot, candle in world.archive.rows.items() if slot.series == OTHER] == [7.0]
