"""Pauses between refills of the cache, in virtual time."""

from itertools import pairwise

import reactivex as rx
from reactivex.testing import TestScheduler

from marketflow.model import SECOND_MS
from marketflow.pipeline.branches import Branch, Refills
from marketflow.pipeline.instrumentation import Instrumentation
from marketflow.pipeline.recovery import MISSED_PROBES, MOST_PAUSED_PROBES, PROBE_SECONDS, cache_losses
from marketflow.pipeline.schedulers import GridScheduler
from tests.pipeline.world import FakeCache

MOST_SECONDS = MOST_PAUSED_PROBES * PROBE_SECONDS


class Refilled(FakeCache):
    """A cache whose refills take a while, and fail while `failing`."""

    def __init__(self, refill_seconds: float, may_rest: bool = False) -> None:
        super().__init__()
        self.refill_seconds = refill_seconds
        self.failing = True
        self.lacking = True
        self.time = TestScheduler()
        self.branch = Branch("slices")
        self.refilled_at: list[float] = []
        self.probed_at: list[float] = []
        self.grid = GridScheduler(self.time, lambda: round(float(self.time.clock) * 1000), lambda: SECOND_MS)
        refills, grid = Refills([self.branch]), self.grid if may_rest else None
        losses = cache_losses(
            self, refills, lambda: Branch("probe"), self.time, self.time, rx.never(), Instrumentation(), grid
        )
        losses.subscribe(self._refill)

    def _refill(self, _: object) -> None:
        assert not self.branch.busy, "a refill begins while another one is under way"
        self.refilled_at.append(float(self.time.clock))
        self.branch.busy = True
        self.time.schedule_relative(self.refill_seconds, self._end)

    def _end(self, *_: object) -> None:
        self.branch.busy = False
        self.branch.finished += 1
        self.lacking |= self.failing

    def lacks(self, _: object) -> bool:
        return True

    def needs_refill(self) -> bool:
        self.probed_at.append(float(self.time.clock))
        return super().needs_refill()

    def run(self, seconds: float) -> None:
        self.time.advance_by(seconds)

    @property
    def gaps(self) -> list[float]:
        return [round(later - earlier, 3) for earlier, later in pairwise(self.refilled_at)]


def test_pause_between_failed_refills_grows_to_a_limit() -> None:
    cache = Refilled(refill_seconds=1.2)
    cache.run(200)
    assert cache.gaps[:4] == [1.5, 2.5, 3.5, 4.5]
    assert cache.gaps[-3:] == [MOST_SECONDS + 1.5] * 3


def test_short_refills_are_repeated_at_each_probe_however_often_they_fail() -> None:
    cache = Refilled(refill_seconds=0.1)
    cache.run(60)
    assert set(cache.gaps) == {PROBE_SECONDS}
    cache.failing = False
    cache.run(2 * PROBE_SECONDS)
    assert cache.complete


def test_pause_starts_over_after_a_refill_that_succeeded() -> None:
    cache = Refilled(refill_seconds=1.2)
    cache.run(40)
    cache.failing = False
    cache.run(30)
    assert cache.complete
    cache.empty()
    began = float(cache.time.clock)
    cache.run(10)
    assert cache.refilled_at[-1] - began <= PROBE_SECONDS


def test_outage_ends_the_pause_after_failed_refills() -> None:
    cache = Refilled(refill_seconds=1.2)
    cache.run(60)
    cache.down = True
    cache.run(MOST_SECONDS + 2 + MISSED_PROBES * PROBE_SECONDS)
    cache.down, returned = False, float(cache.time.clock)
    cache.run(5)
    cache.refilled_at = [at for at in cache.refilled_at if at >= returned]
    assert cache.refilled_at[0] - returned <= PROBE_SECONDS
    assert cache.gaps[0] == 1.5


def test_complete_cache_is_probed_less_while_nothing_arrives() -> None:
    cache = Refilled(refill_seconds=0.1, may_rest=True)
    cache.failing = cache.lacking = False
    cache.run(2.1)
    cache.probed_at.clear()
    cache.run(3)
    assert cache.probed_at == [3.0, 4.0, 5.0]
    cache.grid.wake()  # something arrives
    cache.run(1)
    assert cache.probed_at[3:] == [5.5, 6.0]


def test_cache_that_is_down_is_probed_as_often_as_while_ticks_arrive() -> None:
    cache = Refilled(refill_seconds=0.1, may_rest=True)
    cache.failing = cache.lacking = False
    cache.run(2.1)
    cache.down = cache.lacking = True
    cache.run(2)
    cache.down, returned = False, float(cache.time.clock)
    cache.run(1)
    assert cache.probed_at[-4:] == [3.5, 4.0, 4.5, 5.0]
    assert cache.refilled_at[0] - returned <= PROBE_SECONDS
