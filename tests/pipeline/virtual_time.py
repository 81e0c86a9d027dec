"""Schedulers in virtual time, for hours that pass in a second: timers, and a pool whose workers may block."""

import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Any, TypeVar

from reactivex import abc, typing
from reactivex.internal.constants import UTC_ZERO
from reactivex.scheduler.periodicscheduler import PeriodicScheduler
from reactivex.scheduler.scheduleditem import ScheduledItem
from reactivex.scheduler.scheduler import Scheduler

_S = TypeVar("_S")


class VirtualTime(PeriodicScheduler):
    """Heap of due actions, by whole microseconds, then in the order of scheduling. Cheaper than Rx's own."""

    def __init__(self, now_us: int = 0) -> None:
        super().__init__()
        self.now_us = now_us
        self._queue: list[tuple[int, int, ScheduledItem]] = []
        self._numbers = count()

    @property
    def now(self) -> datetime:
        return UTC_ZERO + timedelta(microseconds=self.now_us)

    def schedule(self, action: typing.ScheduledAction[_S], state: _S | None = None) -> abc.DisposableBase:
        return self._at(self.now_us, action, state)

    def schedule_relative(
        self, duetime: typing.RelativeTime, action: typing.ScheduledAction[_S], state: _S | None = None
    ) -> abc.DisposableBase:
        return self._at(self.now_us + round(self.to_seconds(duetime) * 1_000_000), action, state)

    def schedule_absolute(
        self, duetime: typing.AbsoluteTime, action: typing.ScheduledAction[_S], state: _S | None = None
    ) -> abc.DisposableBase:
        return self._at(round(self.to_seconds(duetime) * 1_000_000), action, state)

    def _at(self, due_us: int, action: typing.ScheduledAction[_S], state: _S | None) -> abc.DisposableBase:
        due_us = max(due_us, self.now_us)
        item = ScheduledItem(self, state, action, UTC_ZERO)  # its own time is not looked at
        heappush(self._queue, (due_us, next(self._numbers), item))
        return item.disposable

    def advance_to(self, until_us: int) -> None:
        """Run all actions that are due until then."""
        queue = self._queue
        while queue and queue[0][0] <= until_us:
            self.now_us, _, item = heappop(queue)
            if not item.is_cancelled():
                item.invoke()
        self.now_us = until_us


class VirtualPool(Scheduler):
    """Workers in virtual time: a task begins after a moment, and while `blocking` it may `sleep`.

    A task that may sleep has a thread of its own, of which one at a time runs, in the order that the virtual time
    says: as deterministic as no threads at all, and what happens meanwhile happens between the lines of the task.
    """

    def __init__(self, time: VirtualTime, random: Random, blocking: Callable[[], bool]) -> None:
        self._time = time
        self._random = random
        self._blocking = blocking
        self._running: _Worker | None = None
        self._asleep: dict[_Worker, None] = {}  # in order

    @property
    def now(self) -> datetime:
        return self._time.now

    def schedule(self, action: typing.ScheduledAction[_S], state: _S | None = None) -> abc.DisposableBase:
        def begin(_: abc.SchedulerBase, __: Any) -> None:
            if self._blocking():
                self._run(_Worker(lambda: self.invoke_action(action, state)))
            else:
                self.invoke_action(action, state)

        return self._time.schedule_relative(self._random.random() * 0.003, begin)

    def schedule_relative(
        self, duetime: typing.RelativeTime, action: typing.ScheduledAction[_S], state: _S | None = None
    ) -> abc.DisposableBase:
        raise AssertionError("a timer on the pool would hold a worker")

    def schedule_absolute(
        self, duetime: typing.AbsoluteTime, action: typing.ScheduledAction[_S], state: _S | None = None
    ) -> abc.DisposableBase:
        raise AssertionError("a timer on the pool would hold a worker")

    def sleep(self, seconds: float) -> None:
        """Block the task that runs, if it may block; everything else goes on."""
        worker = self._running
        if worker is not None:
            self._time.schedule_relative(seconds, lambda *_: self._run(worker))
            self._asleep[worker] = None
            worker.pause()

    def _run(self, worker: "_Worker") -> None:
        self._asleep.pop(worker, None)
        self._running = worker
        worker.resume()
        self._running = None

    def kill(self) -> None:
        """End all tasks where they are."""
        for worker in list(self._asleep):
            worker.killed = True
            worker.resume()
        self._asleep.clear()


class _Killed(BaseException):
    """Ends a task that sleeps; no Exception, so that no handler treats it as a failure."""


class _Worker:
    """A task on a thread that runs only between `resume` and the next `pause`."""

    def __init__(self, task: Callable[[], object]) -> None:
        self._task = task
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._error: BaseException | None = None
        self.killed = False
        threading.Thread(target=self._work, daemon=True).start()

    def resume(self) -> None:
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self.killed:
            raise _Killed

    def _work(self) -> None:
        self._go.acquire()
        try:
            self._task()
        except _Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again by resume
            self._error = error
        self._stopped.release()
