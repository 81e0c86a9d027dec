"""Work on the records of venues, step by step: each step is one call or less, on a pool of its own, then a pause.

Steps of one work never overlap. So what a step emits is taken by the pipeline before the next one begins, and nothing
queues up between them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import reactivex as rx
from loguru import logger
from reactivex import Observable, abc
from reactivex import operators as ops

from marketflow.feeds.backfill.rest_client import RestClient
from marketflow.logs import RateLimit
from marketflow.model import Candles

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
        work: each runs beside the others.
        loop: scheduler of the pauses.
        pool: scheduler of the steps, with a thread for each work.
        may_run: whether there is anything to do now; the records of venues belong to live mode.
    """

    def __init__(
        self,
        work: Sequence[SteppedWork],
        loop: abc.SchedulerBase,
        pool: abc.SchedulerBase,
        may_run: Callable[[], bool] = lambda: True,
    ) -> None:
        self._work, self._loop, self._pool, self._may_run = work, loop, pool, may_run
        self._limit = RateLimit(60.0)

    def minutes(self, closed: Observable[Candles], ended: Observable[Any]) -> Observable[Candles]:
        """Emit the minutes of all work, until `ended` emits."""
        noted: Observable[Candles] = closed.pipe(ops.do_action(self._note), ops.ignore_elements())
        # The pipeline closes only those again that are still in memory.
        made = rx.merge(*map(self._repeated, self._work)).pipe(ops.do_action(self._note))
        return rx.merge(noted, made).pipe(ops.take_until(ended))

    def _note(self, closed: Candles) -> None:
        for each in self._work:
            each.note(closed)

    def _repeated(self, work: SteppedWork) -> Observable[Candles]:
        def step() -> Step:
            if not self._may_run():
                return Step({}, HELD_PAUSE_SECONDS)
            try:
                return work.step()
            except Exception as error:  # noqa: BLE001 - else this work would end, and all other work with it
                if self._limit.admit(type(work)) is not None:
                    logger.opt(exception=error).error("a step on the records of a venue failed, which is a bug")
                return Step({}, FAILED_PAUSE_SECONDS)

        def then_pause(done: Step) -> Observable[Candles]:
            pause = rx.timer(done.pause_seconds, scheduler=self._loop).pipe(ops.map(lambda _: _NOTHING))
            return rx.just(done.minutes).pipe(ops.concat(pause))

        return rx.from_callable(step, scheduler=self._pool).pipe(
            ops.flat_map(then_pause), ops.repeat(), ops.filter(bool)
        )


def has_spare_budget(client: RestClient) -> bool:
    """Whether less than half of the budget is used: the other half is for what cannot wait."""
    return 2 * client.used < client.limit
