"""Which series a pipeline writes: standbys, promotion and demotion; two pipelines with random owners on one Redis.

More seeds, or the one that failed:

    SEEDS=200 pytest tests/pipeline/test_ownership.py
    SEED=17 pytest tests/pipeline/test_ownership.py
"""

from collections.abc import Iterator

import pytest
from loguru import logger

from marketflow.model import MINUTE_MS, SLICE_MS, Slot, Tick, candle_of
from marketflow.pipeline.shard_ownership import Ownership
from marketflow.settings.shards import LEAD, ShardMap
from tests.pipeline.shared_shards import Group
from tests.pipeline.world import BTC, EXCHANGE, START_MS, World
from tests.support.seeds import seeds


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Disable the log: faults log warnings."""
    logger.disable("marketflow")
    yield
    logger.enable("marketflow")


def standby() -> World:
    """A pipeline that owns nothing yet."""
    return World(ownership=Ownership(ShardMap({EXCHANGE: 1}), ())).start()


def test_standby_holds_ticks_and_writes_nothing() -> None:
    world = standby()
    world.send(100.0)
    world.run(70)
    assert world.state.newest_of([BTC])[BTC].price == 100.0
    assert (world.cache.newest, world.cache.slices, world.cache.minutes, world.archive.rows) == ({}, {}, {}, {})
    world.cache.lacking = True  # as after an outage
    world.run(5)
    assert (world.cache.newest, world.cache.slices, world.cache.minutes) == ({}, {}, {})
    world.send(101.0)
    world.stop()
    world.run(1)
    assert world.completed
    assert world.archive.rows == {}


def test_promoted_standby_writes_what_it_holds() -> None:
    world = standby()
    world.send(100.0)
    world.run(63)
    world.send(101.0, 102.0)
    world.run(1)
    world.pipeline.ownership.take({EXCHANGE})
    world.run(0.2)
    assert world.cache.newest[BTC].price == 102.0
    assert {slot.start: candle.ticks for slot, candle in world.cache.slices.items()} == {
        START_MS: 1,
        START_MS + 63_000: 2,
    }
    assert world.archive.rows[Slot(BTC, START_MS)].ticks == 1
    world.run(60)
    assert world.archive.rows[Slot(BTC, START_MS + MINUTE_MS)].ticks == 2


def test_promoted_standby_completes_its_minute_from_the_cache() -> None:
    """It was connected in mid-minute, and the previous owner has written the earlier ticks."""
    world = standby()
    earlier = Tick(90.0, START_MS + 5_000, 1)
    common = Tick(100.0, START_MS + 20_000, 2)
    world.run(20)
    world.send(100.0)
    world.cache.left_behind = {Slot(BTC, each.at - each.at % SLICE_MS): candle_of(each) for each in (earlier, common)}
    world.run(10)
    world.send(110.0)
    world.pipeline.ownership.take({EXCHANGE})
    world.run(60)
    row = world.archive.rows[Slot(BTC, START_MS)]
    assert (row.ticks, row.open, row.close) == (3, 90.0, 110.0)


def test_owner_that_lost_its_shard_writes_nothing_more() -> None:
    world = World(ownership=Ownership(ShardMap({EXCHANGE: 1}), {EXCHANGE})).start()
    world.send(100.0)
    world.run(1)
    world.pipeline.ownership.take(())
    world.run(0.5)
    world.send(101.0)
    world.run(70)
    assert world.cache.newest[BTC].price == 100.0
    assert world.archive.rows == {}


def test_owner_that_lags_writes_what_was_sent_before_its_loss() -> None:
    """The new owner has connected after the tick was sent; this one reads it after the loss of the shard."""
    world = World(ownership=Ownership(ShardMap({EXCHANGE: 1}), {EXCHANGE})).start()
    world.send(100.0)
    world.run(1)
    world.pipeline.ownership.take(())
    world.run(2)
    world.send(101.0)
    world.run(2)
    assert [candle.close for candle in world.cache.slices.values()] == [100.0, 101.0]
    world.send(102.0)
    world.run(10)
    assert len(world.cache.slices) == 2
    assert world.archive.rows == {}


def test_former_owner_writes_after_an_outage_what_came_before_its_loss() -> None:
    """The new owner was connected after the tick, which only the former one has received."""
    world = World(ownership=Ownership(ShardMap({EXCHANGE: 1}), {EXCHANGE})).start()
    world.cache.down = True
    world.send(100.0)
    world.run(1)
    world.pipeline.ownership.take(())
    world.run(5)
    world.send(101.0)
    world.cache.down = False
    world.run(2)
    assert [candle.close for candle in world.cache.slices.values()] == [100.0]
    world.run(70)
    world.cache.empty()
    world.run(2)
    assert world.cache.slices == {}


def test_former_owner_that_stops_writes_what_it_has_received() -> None:
    world = World(ownership=Ownership(ShardMap({EXCHANGE: 1}), {EXCHANGE})).start()
    world.pipeline.ownership.take(())
    world.run(1)
    world.send(101.0)
    world.run(0.2)
    assert world.cache.slices == {}
    world.stop()
    world.run(0.5)
    assert world.completed
    assert [candle.close for candle in world.cache.slices.values()] == [101.0]


def test_unarchived_minutes_become_pending_at_promotion() -> None:
    world = standby()
    left = Slot(BTC, START_MS - 20 * MINUTE_MS)
    world.cache.backlog = {left: candle_of(Tick(7.0, left.start, 1))}
    world.run(5)
    assert world.archive.rows == {}
    world.pipeline.ownership.take({EXCHANGE})
    world.run(1)
    assert world.archive.rows.keys() == {left}


def test_days_are_rolled_up_by_the_leader_only() -> None:
    world = standby()
    world.run(60)
    world.pipeline.ownership.take({EXCHANGE})
    world.run(60)
    assert world.days.asked_at == []
    world.pipeline.ownership.take({LEAD})
    world.run(30)
    assert world.days.asked_at


def test_roll_up_ends_when_another_process_leads() -> None:
    world = standby()
    world.pipeline.ownership.take({LEAD})
    world.days.steps = 10_000
    world.run(30)
    world.pipeline.ownership.take({EXCHANGE})
    world.run(1)
    count = len(world.days.asked_at)
    world.run(30)
    assert len(world.days.asked_at) == count > 10


@pytest.mark.long
@pytest.mark.parametrize("seed", seeds(4))
def test_changing_owners_lose_and_double_no_tick(seed: int) -> None:
    group = Group(seed, count=2 + seed % 2, seconds=100)
    try:
        group.play()
    except AssertionError:
        print(*group.trace, sep="\n")
        raise
    assert group.takeovers
    assert sum(map(len, group.sent.values())) > 400
