"""Work in steps: in order, on its pool, noted by the others, and not ended by a bug."""

from collections.abc import Callable

from reactivex import Observable
from reactivex.subject import Subject
from reactivex.testing import TestScheduler

from marketflow.feeds.backfill.steps import FAILED_PAUSE_SECONDS, HELD_PAUSE_SECONDS, Step, SteppedCorrections
from marketflow.model import Candle, Candles, Slot
from tests.support.market import BTC, MINUTE

CANDLE = Candle(1.0, 1.0, 1.0, 1.0, 1.0, 1, MINUTE, MINUTE, MINUTE, MINUTE, 0, 0)


def minute(number: int) -> Candles:
    return {Slot(BTC, MINUTE + number * 60_000): CANDLE}


class Script:
    """Work that does what a test says at each step."""

    def __init__(self, *steps: Step | Exception) -> None:
        self._steps = list(steps)
        self.noted: list[Candles] = []
        self.count = 0

    def note(self, closed: Candles) -> None:
        self.noted.append(closed)

    def step(self) -> Step:
        self.count += 1
        done = self._steps.pop(0) if self._steps else Step({}, 1000.0)
        if isinstance(done, Exception):
            raise done
        return done


class Flow:
    """The corrections of some work, in virtual time."""

    def __init__(self, *work: Script, may_run: Callable[[], bool] = lambda: True) -> None:
        self.time = TestScheduler()
        self.closed: Subject[Candles] = Subject()
        self.ended: Subject[None] = Subject()
        self.emitted: list[Candles] = []
        self.completed: list[bool] = []
        corrections = SteppedCorrections(work, self.time, self.time, may_run)
        minutes: Observable[Candles] = corrections.minutes(self.closed, self.ended)
        minutes.subscribe(self.emitted.append, on_completed=lambda: self.completed.append(True))

    def run(self, seconds: float) -> None:
        self.time.advance_to(self.time.clock + seconds)


def test_steps_follow_each_other_after_their_pauses() -> None:
    work = Script(Step(minute(1), 5.0), Step({}, 1.0), Step(minute(2), 5.0))
    flow = Flow(work)
    flow.run(4.0)
    assert (flow.emitted, work.count) == ([minute(1)], 1)
    flow.run(3.5)
    assert (flow.emitted, work.count) == ([minute(1), minute(2)], 3)


def test_work_runs_side_by_side_and_notes_what_others_make() -> None:
    one, other = Script(Step({}, 100.0)), Script(Step(minute(1), 0.5), Step(minute(2), 0.5))
    flow = Flow(one, other)
    flow.closed.on_next(minute(7))
    flow.run(3.0)
    assert flow.emitted == [minute(1), minute(2)]
    assert len(one.noted) == 3
    assert all(each in one.noted for each in (minute(7), minute(1), minute(2)))


def test_step_that_raises_is_logged_and_ends_nothing(log: list[str]) -> None:
    work = Script(RuntimeError("a bug"), Step(minute(1), 1.0))
    flow = Flow(work)
    flow.run(FAILED_PAUSE_SECONDS + 1.0)
    assert flow.emitted == [minute(1)]
    assert sum("a step on the records of a venue failed, which is a bug" in each for each in log) == 1


def test_nothing_is_done_outside_of_live_mode() -> None:
    live = False
    work = Script(Step(minute(1), 1.0))
    flow = Flow(work, may_run=lambda: live)
    flow.run(5.0)
    assert work.count == 0
    live = True
    flow.run(HELD_PAUSE_SECONDS + 0.5)
    assert flow.emitted == [minute(1)]


def test_end_of_the_pipeline_ends_all_work() -> None:
    work = Script(*(Step(minute(1), 1.0) for _ in range(10)))
    flow = Flow(work)
    flow.run(2.5)
    flow.ended.on_next(None)
    count = work.count
    flow.run(10.0)
    assert (flow.completed, work.count) == ([True], count)


def test_thousands_of_steps_need_no_deeper_stack() -> None:
    work = Script(*(Step(minute(1), 0.001) for _ in range(5_000)))
    flow = Flow(work)
    flow.run(50.0)
    assert len(flow.emitted) == 5_000
