"""The scheduler of all timing: one thread, and a clock that never jumps."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, TypeVar

from reactivex import abc
from reactivex.disposable import Disposable
from reactivex.internal.exceptions import DisposedException
from reactivex.scheduler import EventLoopScheduler, ThreadPoolScheduler
from reactivex.typing import AbsoluteTime, StartableTarget

from marketflow.logs import RateLimit

_TState = TypeVar("_TState")


class TimingLoop(EventLoopScheduler):
    """An event loop on one named thread for every timer of the flow.

    Rx's own one takes its timers' due times from the wall clock: set back by an hour, it would sleep for an hour.

    Args:
        name: of the thread.
        on_failure: called with what an action raised; the thread has ended then, and no timer runs any more.
    """

    def __init__(self, name: str, on_failure: Callable[[Exception], None] | None = None) -> None:
        self._on_failure = on_failure

        def thread(target: StartableTarget) -> threading.Thread:
            return threading.Thread(target=target, name=name, daemon=True)

        super().__init__(thread_factory=thread)
        self._offset = super().now - timedelta(seconds=time.monotonic())

    @property
    def now(self) -> datetime:
        """Now, as it would be had nobody touched the wall clock since the start."""
        offset: datetime | None = getattr(self, "_offset", None)
        return super().now if offset is None else offset + timedelta(seconds=time.monotonic())

    def schedule_absolute(
        self, duetime: AbsoluteTime, action: abc.ScheduledAction[_TState], state: _TState | None = None
    ) -> abc.DisposableBase:
        """Run at a time; once the loop is disposed of, never. Rx's own raises: in an action that is just under way."""
        try:
            return super().schedule_absolute(duetime, action, state)
        except DisposedException:
            return Disposable()

    def run(self) -> None:
        """Run what is due, until disposed of."""
        try:
            super().run()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)

    def _ensure_thread(self) -> None:
        """Start the thread, unless it runs. Where the system has no room for one, the next action tries again."""
        try:
            super()._ensure_thread()
        except RuntimeError:
            self._thread = None
            raise


class _Worker(threading.local):
    """What a thread of the pool is running, and whether it is to run it once more."""

    action: Any = None
    again = False


class NamedPool(ThreadPoolScheduler):
    """A pool of named threads for blocking calls, never for timers: each of those would hold a worker for life.

    One thread starts at once. Should the system have no room for a further one, those that run do its work.
    """

    def __init__(self, name: str, max_workers: int) -> None:
        super().__init__(max_workers)
        self.executor = ThreadPoolExecutor(max_workers, thread_name_prefix=name)
        self._worker = _Worker()
        self._limit = RateLimit(60.0)
        self._closed = False
        self.executor.submit(int)

    def schedule(self, action: abc.ScheduledAction[_TState], state: _TState | None = None) -> abc.DisposableBase:
        """Run on the next free thread. Rx's own would first build an event loop for that one action.

        An action that schedules itself goes on on its own thread: observe_on does so after every item, and to wake
        another thread would cost more than most items.
        """
        if action == self._worker.action:
            self._worker.again = True
            return Disposable()
        if self._closed:
            return Disposable()
        try:
            future = self.executor.submit(self._run, action, state)
        except RuntimeError as error:
            # The executor queues work before it starts a thread for it, so a thread that runs will do it. Raised, this
            # would leave the partition that waits for it without one, and end the thread that emitted the item.
            if not self._closed:
                self._limit.log("threads", "WARNING", f"no thread can be started for blocking calls: {error}")
            return Disposable()

        def cancel() -> None:
            future.cancel()

        return Disposable(cancel)

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
        """Take no more work and do not wait for what blocks."""
        self._closed = True
        self.executor.shutdown(wait=False, cancel_futures=True)
