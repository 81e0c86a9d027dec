"""Slices of all processes for alerts, while Redis cannot be read."""

from collections.abc import Collection, Mapping
from typing import Any, cast

from marketflow.alerts.slice_follower import LATEST, SliceFollower
from marketflow.cluster.shared_slices import SharedSlices
from marketflow.model import SLICE_MS, Candle, Candles, Mode, Series, Slot, Tick, candle_of
from marketflow.pipeline.state import WindowState

BTC = Series(Mode.LIVE, "exchange1", "BTCUSDT")
START = 1_795_262_400_000


def slice_with(price: float, number: int) -> Candles:
    """One tick in the slice of this number."""
    at = START + number * SLICE_MS
    return {Slot(BTC, at): candle_of(Tick(price, at, at))}


class Cache:
    """What the owner has written, as long as it can be read."""

    def __init__(self) -> None:
        self.slices: Candles = {}
        self.is_up = True

    def slices_since(self, starts: Mapping[Series, int], until: int) -> tuple[Candles, Collection[Series]]:
        if not self.is_up:
            return {}, starts.keys()
        return {slot: each for slot, each in self.slices.items() if starts.get(slot.series, LATEST) <= slot.start}, ()

    def last_before(self, series: Collection[Series], before: int) -> tuple[Candles, Collection[Series]]:
        last = sorted(slot for slot in self.slices if slot.series in series)[-1:]
        return {slot: self.slices[slot] for slot in last}, ()


class Owners:
    """Say whether Redis has all again."""

    def __init__(self) -> None:
        self.written = False

    def have_written(self) -> bool:
        return self.written

    def reset_reports(self) -> None:
        pass


class World:
    """A process that leads, and follows a series of which the first slice was read from Redis before an outage."""

    def __init__(self) -> None:
        self.cache, self.memory, self.owners = Cache(), WindowState(0), Owners()
        slices = SharedSlices(cast("Any", self.cache), self.memory, cast("Any", self.owners))
        self.follower = SliceFollower(slices)

    def receive(self, slices: Candles) -> None:
        self.memory.observe(slices)
        self.memory.absorb(slices, START)

    def news(self) -> list[Candle]:
        return [candle for _, of in self.follower.news([BTC], LATEST) for candle in of.values()]

    def begin(self) -> None:
        self.cache.slices |= slice_with(100, 0)
        assert [candle.close for candle in self.news()] == [100]
        self.cache.is_up = False


def test_what_was_received_all_along_is_evaluated_in_an_outage() -> None:
    world = World()
    world.receive(slice_with(100, 0))
    world.begin()
    world.receive(slice_with(101, 1))
    assert [candle.close for candle in world.news()] == [101]
    assert not world.follower.is_behind


def test_process_that_receives_a_series_anew_waits_for_what_came_before() -> None:
    world = World()
    world.begin()
    world.receive(slice_with(102, 2))  # it became the standby after slice 1, which its owner will write
    assert world.news() == []
    assert world.follower.is_behind
    world.cache.slices |= slice_with(101, 1) | slice_with(102, 2)
    world.cache.is_up = world.owners.written = True
    assert [candle.close for candle in world.news()] == [101, 102]
