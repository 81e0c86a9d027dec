"""Stalled branches are detected, and a cache is complete only once it has confirmed its refill."""

from collections.abc import Callable
from random import Random

import pytest
import reactivex as rx
from reactivex import Observable
from reactivex.subject import Subject
from reactivex.testing import TestScheduler

from marketflow.clock import system_clock
from marketflow.model import Candles, Mode, Slot, Tick, candle_of, slice_start
from marketflow.pipeline.assembly import ROLLUP_SECONDS
from marketflow.pipeline.backlog import Backlog
from marketflow.pipeline.branches import CHECK_SECONDS, STALLED_SECONDS, Branch, Branches, Refills
from marketflow.pipeline.fan_in import FeedSet, ModeSwitch
from marketflow.pipeline.graph import Pipeline
from marketflow.pipeline.instrumentation import Instrumentation
from marketflow.pipeline.operators import conflate_map, union
from marketflow.pipeline.recovery import PROBE_SECONDS, cache_losses
from marketflow.pipeline.state import WindowState
from marketflow.resources import resource
from marketflow.runtime.engine import Engine
from marketflow.settings import Settings
from marketflow.stores.ports import RowsWritten
from tests.pipeline.virtual_time import VirtualPool, VirtualTime
from tests.pipeline.world import BTC, START_MS, FakeArchive, FakeCache, FakeDays, ScriptedFeed


class Watch:
    """Checks branches each second."""

    def __init__(self) -> None:
        self.branches = Branches()
        self.seconds = 0.0

    def run(self, seconds: float) -> None:
        until = self.seconds + seconds
        while self.seconds < until:
            self.seconds += CHECK_SECONDS
            self.branches.check(self.seconds)


@pytest.fixture
def watch() -> Watch:
    return Watch()


def hanging(watch: Watch) -> tuple[Subject[int], Subject[int]]:
    """A branch whose work ends when the second one completes."""
    source: Subject[int] = Subject()
    work: Subject[int] = Subject()

    def begin(_: int) -> Observable[int]:
        return work

    source.pipe(conflate_map(begin, lambda _, newer: newer, lambda: watch.branches.add("archive"))).subscribe()
    return source, work


def test_branch_that_finishes_nothing_is_reported_once(watch: Watch, log: list[str]) -> None:
    source, work = hanging(watch)
    watch.run(100)
    assert (watch.branches.stalled, watch.branches.stalls) == ([], {"archive": 0})
    source.on_next(1)
    watch.run(STALLED_SECONDS - 1)
    assert watch.branches.stalled == []
    watch.run(60)
    assert (watch.branches.stalled, watch.branches.stalls) == (["archive"], {"archive": 1})
    work.on_completed()
    watch.run(1)
    assert (watch.branches.stalled, watch.branches.stalls) == ([], {"archive": 1})
    assert [line.partition(" branch=archive")[0] for line in log if "branch=archive" in line] == [
        "a branch has stalled: work has waited for 30 s",
        "a branch goes on after 90 s",
    ]


def test_branch_that_is_busy_but_finishes_work_has_not_stalled(watch: Watch) -> None:
    source, work = hanging(watch)
    source.on_next(1)
    for number in range(10):
        watch.run(STALLED_SECONDS - 1)
        work.on_next(number)
    assert watch.branches.stalls == {"archive": 0}


def test_branch_of_a_frozen_process_has_not_stalled(watch: Watch) -> None:
    source, _ = hanging(watch)
    source.on_next(1)
    watch.run(2)
    watch.seconds += 1000
    watch.run(2)
    assert watch.branches.stalled == []


def test_one_of_several_partitions_that_stalls_is_reported(watch: Watch) -> None:
    partitions = [watch.branches.add("slices") for _ in range(3)]
    for branch in partitions:
        branch.busy = True
    for second in range(40):
        watch.run(1)
        partitions[0].finished = partitions[1].finished = second + 1
    assert watch.branches.stalled == ["slices"]


class SlowCache(FakeCache):
    """Each write takes its seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.sleep: Callable[[float], None] = lambda _: None

    def put_slices(self, slices: Candles) -> None:
        self.sleep(self.seconds)
        super().put_slices(slices)


class HangingArchive(FakeArchive):
    """Never answers while `hangs`."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        super().__init__(now_ms)
        self.hangs = False
        self.sleep: Callable[[float], None] = lambda _: None

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        if self.hangs:
            self.sleep(1e6)
        return super().write(minutes, on_written)


class SlowWorld:
    """The pipeline in virtual time, on a pool whose calls may take their time."""

    def __init__(self) -> None:
        self.time = VirtualTime()
        pool = VirtualPool(self.time, Random(1), lambda: True)
        self.cache, self.archive = SlowCache(), HangingArchive(lambda: self.now_ms)
        self.days = FakeDays()
        self.cache.sleep = self.archive.sleep = pool.sleep
        self.feed = ScriptedFeed(Mode.TEST)
        self.pipeline = Pipeline(
            modes=ModeSwitch(Mode.TEST).changes,
            feeds=FeedSet({Mode.TEST: [self.feed], Mode.LIVE: []}),
            state=WindowState(2000),
            backlog=Backlog(),
            cache=self.cache,
            archive=self.archive,
            rollups=self.days,
            workers_per_exchange=2,
            loop=self.time,
            pool=pool,
            clock=lambda: self.now_ms * 1_000_000,
        )
        self.pool = pool
        self.pipeline.observable().subscribe()
        rx.interval(CHECK_SECONDS, scheduler=self.time).subscribe(
            lambda _: self.pipeline.branches.check(self.time.now_us / 1e6)
        )
        self.run(0.1)

    @property
    def now_ms(self) -> int:
        return START_MS + self.time.now_us // 1000

    def run(self, seconds: float) -> None:
        self.time.advance_to(self.time.now_us + round(seconds * 1_000_000))

    def send(self, price: float) -> None:
        self.feed.send({Slot(BTC, slice_start(self.now_ms)): candle_of(Tick(price, self.now_ms, self.now_ms))})

    def trade(self, seconds: int) -> None:
        for number in range(10 * seconds):
            self.send(float(number))
            self.run(0.1)


def test_cache_is_complete_only_when_it_has_confirmed_its_refill() -> None:
    world = SlowWorld()
    world.trade(20)
    assert world.pipeline.cache_confirmed
    held = dict(world.cache.slices)
    assert len(held) == 200
    world.cache.seconds = 3.0
    world.cache.empty()
    incomplete = 0
    for _ in range(100):
        world.send(1.0)
        world.run(0.1)
        if world.pipeline.cache_confirmed and not world.cache.lacking:
            assert held.keys() <= world.cache.slices.keys(), "said to be complete in the middle of a refill"
        else:
            incomplete += 1
    assert world.pipeline.cache_confirmed
    assert incomplete > 25
    world.pool.kill()


def test_refill_is_under_way_until_written_though_other_writes_end_first() -> None:
    """Other threads write meanwhile: what was under way, and what was pending, ends while a refill is put together."""
    time, cache, branch = TestScheduler(), FakeCache(), Branch("slices")
    source: Subject[dict[str, int]] = Subject()
    writes: list[tuple[dict[str, int], Subject[int]]] = []

    def begin(item: dict[str, int]) -> Observable[int]:
        writes.append((item, Subject()))
        return writes[-1][1]

    def refill(_: object) -> None:
        writes[0][1].on_completed()
        source.on_next({"refill": 1})

    source.pipe(conflate_map(begin, union, lambda: branch)).subscribe()
    refills = Refills([branch])
    losses = cache_losses(cache, refills, lambda: Branch("probe"), time, time, rx.never(), Instrumentation())
    losses.subscribe(refill)
    source.on_next({"under way": 1})
    source.on_next({"pending": 1})
    cache.lacking = True
    time.advance_by(PROBE_SECONDS)
    assert [item for item, _ in writes] == [{"under way": 1}, {"pending": 1}]
    writes[1][1].on_completed()
    assert writes[2][0] == {"refill": 1}
    assert not refills.confirmed
    writes[2][1].on_completed()
    assert refills.confirmed


def test_branch_whose_store_never_answers_is_reported() -> None:
    world = SlowWorld()
    world.trade(5)
    world.archive.hangs = True
    world.run(60 + STALLED_SECONDS + 5)
    assert world.pipeline.branches.stalled == ["archive"]
    assert world.pipeline.branches.stalls["archive"] == 1
    world.pool.kill()


@pytest.mark.parametrize("down", ["archive", "days"])
def test_store_that_refuses_is_an_outage_and_no_stall(down: str) -> None:
    world = SlowWorld()
    world.trade(5)
    world.run(60)
    assert world.archive.rows
    store = world.archive if down == "archive" else world.days
    store.down, world.days.steps = True, 1
    world.trade(1)
    world.run(ROLLUP_SECONDS + 180)
    assert world.pipeline.branches.busy().get(down) == 1, "it is repeated"
    assert world.pipeline.branches.stalls[down] == 0
    store.down = False
    world.run(60)
    assert down not in world.pipeline.branches.busy()
    world.pool.kill()


def test_stop_names_branches_that_still_write(log: list[str]) -> None:
    """They hold slices, which are lost."""
    engine = Engine(Settings(), {}, {}, resource("ddl"), system_clock, Mode.TEST, lambda: None)
    try:
        for _ in range(3):
            engine.pipeline.branches.add("slices").busy = True
        engine.pipeline.branches.add("archive").busy = True
        engine.pipeline.branches.add("newest").busy = False
        engine._stop_wait.set()
        engine._drain()
    finally:
        engine._close()
    (line,) = [line for line in log if "did not end in time" in line]
    assert "archive 1, slices 3" in line
    assert "newest" not in line
