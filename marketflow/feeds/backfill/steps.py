"""Work on the records of venues, step by step: each step is one call or less, on a pool of its own, then a pause.

Steps of one work never overlap. So what a step emits is taken by the pipeline before the next one begins, and nothing
queues up between them.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.subject import BehaviorSubject

from marketflow.feeds.feed import each_while_present
from marketflow.logs import RateLimit
from marketflow.model import Candles

if TYPE_CHECKING:
    from marketflow.feeds.backfill.rest_client import RestClient

FAILED_PAUSE_SECONDS = 10.0
"""Pause after a step that raised, which is a bug."""

HELD_PAUSE_SECONDS = 1.0
"""Pause while nothing may be done."""

BUDGET_PAUSE_SECONDS = 0.5
"""Pause of what leaves the rest of the budget to more urgent calls."""

_NOTHING: Candles = {}


class Step(NamedTuple):
    """What a step has found, and the pause in seconds before the next one."""

    minutes: Candles
    pause_seconds: float


class SteppedWork(Protocol):
    """Work in steps that makes authoritative minutes."""

    def note(self, closed: Candles) -> None:
        """Take notice of minutes that the pipeline has closed, or that other work has made; must not block or raise."""
        ...

    def step(self) -> Step:
        """Do the next step; may block for one call."""
        ...


class SteppedCorrections:
    """The minutes that some work makes, in steps.

    Args:
        work: each runs beside the others; may change.
        loop: scheduler of the pauses.
        pool: scheduler of the steps.
        may_run: whether there is anything to do now; the records of venues belong to live mode.
    """

    def __init__(
        self,
        work: Sequence[SteppedWork],
        loop: abc.SchedulerBase,
        pool: abc.SchedulerBase,
        may_run: Callable[[], bool] = lambda: True,
    ) -> None:
        self._work = BehaviorSubject(work)
        self._loop, self._pool, self._may_run = loop, pool, may_run
        self._limit = RateLimit(60.0)

    def take_work(self, work: Sequence[SteppedWork]) -> None:
        """Replace the work: what is new begins, and what is left out does no further step."""
        self._work.on_next(work)

    def minutes(self, closed: Observable[Candles], ended: Observable[Any]) -> Observable[Candles]:
        """Emit the minutes of all work, until `ended` emits."""
        noted: Observable[Candles] = closed.pipe(ops.do_action(self._note), ops.ignore_elements())
        # The pipeline closes only those again that are still in memory.
        work: Observable[Sequence[SteppedWork]] = self._work
        made = each_while_present(self._repeated)(work).pipe(ops.do_action(self._note))
        return rx.merge(noted, made).pipe(ops.take_until(ended))

    def _note(self, closed: Candles) -> None:
        for each in self._work.value:
            each.note(closed)

    def _repeated(self, work: SteppedWork, removed: Observable[Any]) -> Observable[Candles]:
        def step() -> Step:
            if not self._may_run():
                return Step({}, HELD_PAUSE_SECONDS)
            try:
                return work.step()
            except Exception as error:  # noqa: BLE001 - else this work would end, and all other work with it
                self._limit.log_bug("a step on the records of a venue failed", error, key=type(work))
                return Step({}, FAILED_PAUSE_SECONDS)

        def then_pause(done: Step) -> Observable[Candles]:
            pause = rx.timer(done.pause_seconds, scheduler=self._loop).pipe(ops.map(lambda _: _NOTHING))
            return rx.just(done.minutes).pipe(ops.concat(pause))

        repeated: Observable[Candles] = rx.from_callable(step, scheduler=self._pool).pipe(
            ops.flat_map(then_pause), ops.repeat(), ops.filter(bool)
        )
        return repeated.pipe(ops.take_until(removed))


def has_spare_budget(client: "RestClient") -> bool:
    """Whether less than half of the budget is used: the other half is for what cannot wait."""
    return 2 * client.used < client.limit
