"""Schedulers: an event loop on a monotonic clock for timers, timers on a grid, and a pool for blocking calls."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from reactivex import abc
from reactivex.disposable import Disposable, MultipleAssignmentDisposable, SerialDisposable
from reactivex.internal.exceptions import DisposedException
from reactivex.scheduler import EventLoopScheduler, ThreadPoolScheduler
from reactivex.scheduler.periodicscheduler import PeriodicScheduler
from reactivex.typing import AbsoluteTime, RelativeTime, ScheduledPeriodicAction, StartableTarget

from marketflow.logs import RateLimit

_TState = TypeVar("_TState")

SHORTEST_WAIT_MS = 10
"""A timer by the grid that would wait for less than this waits for one interval more."""


class TimingLoop(EventLoopScheduler):
    """Event loop on one named thread, for all timers of the pipeline.

    RxPY's own takes due times from the wall clock: if that is set back by an hour, timers stop for an hour.

    Args:
        name: of the thread.
        on_failure: called with what an action raised; its thread has ended, and no timer runs any more.
    """

    def __init__(self, name: str, on_failure: Callable[[Exception], None] | None = None) -> None:
        self._on_failure = on_failure

        def thread(target: StartableTarget) -> threading.Thread:
            return threading.Thread(target=target, name=name, daemon=True)

        super().__init__(thread_factory=thread)
        self._offset = super().now - timedelta(seconds=time.monotonic())

    @property
    def now(self) -> datetime:
        """Time by the monotonic clock, counted from the wall clock at the start."""
        offset: datetime | None = getattr(self, "_offset", None)
        return super().now if offset is None else offset + timedelta(seconds=time.monotonic())

    def schedule_absolute(
        self, duetime: AbsoluteTime, action: abc.ScheduledAction[_TState], state: _TState | None = None
    ) -> abc.DisposableBase:
        """Schedule at a time; do nothing once the loop is disposed, where RxPY raises within a running action."""
        try:
            return super().schedule_absolute(duetime, action, state)
        except DisposedException:
            return Disposable()

    def run(self) -> None:
        """Run due actions until disposed."""
        try:
            super().run()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def _ensure_thread(self) -> None:
        """Start the thread unless it runs. If the system cannot start one, the next action tries again."""
        try:
            super()._ensure_thread()
        except RuntimeError:
            self._thread = None
            raise


class GridScheduler(PeriodicScheduler):
    """Runs timers at full multiples of their due time on the clock: one of 0.1 s at the next full 0.1 s.

    Passed to `buffer_with_time`, it ends the buffers on the grid of the slices, so that a slice whose ticks are in time
    is in one buffer instead of two. It does not drift either: after a slow consumer, or a step of the clock, the next
    buffer ends on the grid again.

    While nothing arrives, which `wake` would report, the timers run at the multiples of `idle_ms` instead: ten empty
    buffers a second cost half as much CPU as all else in an idle process.

    Args:
        scheduler: runs everything.
        now_ms: the clock (Unix ms).
        idle_ms: returns the interval of a timer while nothing arrives; 0 for its due time.
    """

    def __init__(
        self, scheduler: abc.SchedulerBase, now_ms: Callable[[], int], idle_ms: Callable[[], int] = lambda: 0
    ) -> None:
        self._scheduler = scheduler
        self._now_ms = now_ms
        self._idle_ms = idle_ms
        self._lock = threading.Lock()
        self._arrived = True
        """Whether something has arrived since the last timer was set."""
        self._idle: list[Callable[[], None]] = []
        """What makes idle timers run at the multiples of their due times again."""

    @property
    def now(self) -> datetime:
        """Time of the underlying scheduler."""
        return self._scheduler.now

    def wake(self, _: object = None) -> None:
        """Note that something arrives; for any thread. To be called before the timer's subscriber gets it."""
        if self._arrived:
            return
        with self._lock:
            self._arrived = True
            waking, self._idle = self._idle, []
        for wake in waking:
            wake()

    def schedule(self, action: abc.ScheduledAction[_TState], state: _TState | None = None) -> abc.DisposableBase:
        """Run at once."""
        return self._scheduler.schedule(action, state)

    def schedule_relative(
        self, duetime: RelativeTime, action: abc.ScheduledAction[_TState], state: _TState | None = None
    ) -> abc.DisposableBase:
        """Run when the clock is at the next full multiple of the due time, or of `idle_ms`."""
        period_ms = round(self.to_seconds(duetime) * 1000)
        if period_ms <= 0:
            return self._scheduler.schedule_relative(duetime, action, state)
        timer = _GridTimer(self._scheduler, action, state)
        with self._lock:
            idle_ms = 0 if self._arrived else self._idle_ms()
            self._arrived = False
            if idle_ms:
                self._idle = [lambda: timer.set(self._wait_ms(period_ms))]
        timer.set(self._wait_ms(idle_ms or period_ms))
        return timer

    def schedule_periodic(
        self, period: RelativeTime, action: ScheduledPeriodicAction[_TState], state: _TState | None = None
    ) -> abc.DisposableBase:
        """Run at each full multiple of the period, or of `idle_ms`."""
        timer = MultipleAssignmentDisposable()

        def run(_: abc.SchedulerBase, state: _TState | None = None) -> None:
            state = action(state)
            timer.disposable = self.schedule_relative(period, run, state)

        timer.disposable = self.schedule_relative(period, run, state)
        return timer

    def _wait_ms(self, period_ms: int) -> int:
        wait_ms = period_ms - self._now_ms() % period_ms
        # The last timer was early if the clock was slowed down meanwhile; it would run twice for one multiple.
        return wait_ms + period_ms if wait_ms < SHORTEST_WAIT_MS else wait_ms

    def schedule_absolute(
        self, duetime: AbsoluteTime, action: abc.ScheduledAction[_TState], state: _TState | None = None
    ) -> abc.DisposableBase:
        """Run at a time."""
        return self._scheduler.schedule_absolute(duetime, action, state)


class _GridTimer(SerialDisposable):
    """A timer that can be set anew, from another thread, until its action runs, which it does once."""

    def __init__(self, scheduler: abc.SchedulerBase, action: abc.ScheduledAction[Any], state: Any) -> None:
        super().__init__()
        self._scheduler, self._action, self._state = scheduler, action, state
        self._begun = threading.Lock()

    def set(self, wait_ms: int) -> None:
        self.disposable = self._scheduler.schedule_relative(wait_ms / 1000, self._run, self._state)

    def _run(self, scheduler: abc.SchedulerBase, state: Any = None) -> abc.DisposableBase | None:
        # Not released: a timer that was set anew in this moment runs in vain.
        return self._action(scheduler, state) if self._begun.acquire(blocking=False) else None


class WorkerThreads:
    """Up to `max_workers` daemon threads, each started when all others are busy; `submit` is for any thread.

    Those of ThreadPoolExecutor wait on one queue, where each call wakes a second thread in vain: a tenth of the context
    switches of 300 ticks/s. Here each waits on a lock of its own. The one that became idle last is woken first.
    """

    def __init__(self, name: str, max_workers: int) -> None:
        self._name = name
        self._max_workers = max_workers
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], object]] = deque()
        self._idle: list[threading.Lock] = []
        self._started = 0
        self._closed = False
        self._limit = RateLimit(60.0)

    def submit(self, call: Callable[[], object]) -> None:
        """Run a call on the next idle thread; ignored once closed.

        Raises:
            RuntimeError: the system cannot start another thread; a running one will run the call.
        """
        with self._lock:
            if self._closed:
                return
            self._calls.append(call)
            if self._idle:
                self._idle.pop().release()
                return
            if self._started == self._max_workers:
                return
            self._started += 1
            name = f"{self._name}_{self._started}"
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError:
            with self._lock:
                self._started -= 1
            raise

    def withdraw(self, call: Callable[[], object]) -> None:
        """Do not run a call that no thread has begun."""
        with self._lock, suppress(ValueError):
            self._calls.remove(call)

    def close(self) -> None:
        """Drop the calls that no thread has begun, and end the threads; do not wait for calls that block."""
        with self._lock:
            self._closed = True
            self._calls.clear()
            for wake in self._idle:
                wake.release()
            self._idle.clear()

    def _run(self) -> None:
        wake = threading.Lock()
        wake.acquire()
        while True:
            with self._lock:
                if self._closed:
                    return
                call = self._calls.popleft() if self._calls else None
                if call is None:
                    self._idle.append(wake)
            if call is None:
                wake.acquire()
                continue
            try:
                call()
            except Exception as error:  # noqa: BLE001 - the thread goes on
                self._limit.log_bug("a blocking call failed", error)
            del call  # it may hold much memory until the next one arrives


class _Worker(threading.local):
    """The action that a thread of the pool runs, and whether to run it again."""

    action: Any = None
    again = False


class NamedPool(ThreadPoolScheduler):
    """Pool of named threads for blocking calls, not for timers, each of which would occupy a thread for good.

    One thread starts at once. If the system cannot start another one, the running ones do its work.
    """

    def __init__(self, name: str, max_workers: int) -> None:
        super().__init__(max_workers)
        self.threads = WorkerThreads(name, max_workers)
        self.executor = self.threads  # type: ignore[assignment]  # in place of RxPY's, which would have other threads
        self._worker = _Worker()
        self._limit = RateLimit(60.0)
        self.threads.submit(int)

    def schedule(self, action: abc.ScheduledAction[_TState], state: _TState | None = None) -> abc.DisposableBase:
        """Run on the next free thread. RxPY would first create an event loop for each action.

        An action that schedules itself continues on its thread: observe_on does so after every item, and waking
        another thread would cost more than most items.
        """
        if action == self._worker.action:
            self._worker.again = True
            return Disposable()
        call = partial(self._run, action, state)
        try:
            self.threads.submit(call)
        except RuntimeError as error:
            # If this were raised, the partition would stall for ever and the thread that emitted the item would end.
            self._limit.log("threads", "WARNING", f"no thread can be started for blocking calls: {error}")
        return Disposable(partial(self.threads.withdraw, call))

    def _run(self, action: abc.ScheduledAction[_TState], state: _TState | None) -> None:
        worker = self._worker
        worker.action, worker.again = action, True
        try:
            while worker.again:
                worker.again = False
                self.invoke_action(action, state)
        finally:
            worker.action = None

    def close(self) -> None:
        """Reject further work; do not wait for calls that block."""
        self.threads.close()
