"""The operators that Rx lacks, each a plain function of a source.

Rx has no backpressure: whatever waits before a slow consumer would wait in an unbounded list. Here nothing waits in a
list. `conflate_map` has one item under way and one that waits, into which everything that arrives is merged, so what
waits is bounded by the number of series, and a consumer that falls behind does less, larger work.
"""

import random
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.disposable import CompositeDisposable, SerialDisposable, SingleAssignmentDisposable
from reactivex.subject import Subject

from marketflow.pipeline.branches import Branch

_T = TypeVar("_T")
_R = TypeVar("_R")
_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

Operator = Callable[[Observable[_T]], Observable[_R]]


def _unwatched() -> Branch:
    return Branch("")


def conflate_map(
    mapper: Callable[[_T], Observable[_R]],
    merge: Callable[[_T, _T], _T],
    branch: Callable[[], Branch] = _unwatched,
) -> Operator[_T, _R]:
    """Like flat_map, but with one inner Observable at a time; what arrives meanwhile is merged into one waiting item.

    An item that finds nothing under way is mapped at once. Capacity: one item. Policy: merge. When the source
    completes, the waiting item is still mapped before the result completes.

    Args:
        mapper: gives the work for an item; its end calls for the next.
        merge: makes one item of the waiting and the next, in this order. It must not change its arguments.
        branch: gives what says of a subscription whether it has work, and how much it has finished.
    """

    def operator(source: Observable[_T]) -> Observable[_R]:
        def subscribe(observer: abc.ObserverBase[_R], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
            return _Conflation(mapper, merge, observer, branch()).subscribe(source)

        return rx.create(subscribe)

    return operator


class _Conflation:
    """The state of one subscription of conflate_map."""

    def __init__(
        self,
        mapper: Callable[[Any], Observable[Any]],
        merge: Callable[[Any, Any], Any],
        observer: abc.ObserverBase[Any],
        branch: Branch,
    ) -> None:
        self._mapper = mapper
        self._merge = merge
        self._observer = observer
        self._lock = threading.Lock()
        self._waiting: list[Any] = []  # empty, or the one item that waits
        self._branch = branch
        self._completed = False
        self._inner = SerialDisposable()

    def subscribe(self, source: Observable[Any]) -> abc.DisposableBase:
        outer = source.subscribe(self._on_next, self._observer.on_error, self._on_completed)
        return CompositeDisposable(outer, self._inner)

    def _on_next(self, item: Any) -> None:
        with self._lock:
            if self._branch.busy:
                self._waiting = [self._merge(self._waiting[0], item) if self._waiting else item]
                return
            self._branch.busy = True
        self._begin(item)

    def _begin(self, item: Any) -> None:
        try:
            inner = self._mapper(item)
        except Exception as error:  # noqa: BLE001 - handed on
            self._observer.on_error(error)
            return
        # Set before subscribing: the inner may complete on another thread, which then begins the next one, before
        # `subscribe` returns here. Assigned afterwards, this subscription would dispose of that of the next one.
        subscription = SingleAssignmentDisposable()
        self._inner.disposable = subscription
        subscription.disposable = inner.subscribe(self._inner_emitted, self._observer.on_error, self._inner_completed)

    def _inner_emitted(self, item: Any) -> None:
        self._branch.finished += 1  # of work in many steps, one
        self._observer.on_next(item)

    def _inner_completed(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._branch.busy = bool(waiting)
            self._branch.finished += 1
            finished = self._completed and not waiting
        if waiting:
            self._begin(waiting[0])
        elif finished:
            self._observer.on_completed()

    def _on_completed(self) -> None:
        with self._lock:
            self._completed = True
            finished = not self._branch.busy
        if finished:
            self._observer.on_completed()


def conflate_through(
    stage: Operator[_T, _R], merge: Callable[[_T, _T], _T], branch: Callable[[], Branch] = _unwatched
) -> Operator[_T, _R]:
    """Let one item at a time through a stage; what arrives meanwhile is merged into one waiting item.

    Like conflate_map, with one subscription for all items instead of one for each: for many small ones, whose cost
    would be the subscribing. Capacity: one item. Policy: merge. When the source completes, the waiting item still goes
    through.

    Args:
        stage: must give one item for each that enters; that lets the next one in.
        merge: makes one item of the waiting and the next, in this order. It must not change its arguments.
        branch: gives what says of a subscription whether it has work, and how much it has finished.
    """

    def operator(source: Observable[_T]) -> Observable[_R]:
        def subscribe(observer: abc.ObserverBase[_R], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
            return _Turnstile(stage, merge, observer, branch()).subscribe(source)

        return rx.create(subscribe)

    return operator


class _Turnstile:
    """The state of one subscription of conflate_through."""

    def __init__(
        self,
        stage: Operator[Any, Any],
        merge: Callable[[Any, Any], Any],
        observer: abc.ObserverBase[Any],
        branch: Branch,
    ) -> None:
        self._merge = merge
        self._observer = observer
        self._entrance: Subject[Any] = Subject()
        self._staged = stage(self._entrance)
        self._lock = threading.Lock()
        self._waiting: list[Any] = []  # empty, or the one item that waits
        self._branch = branch
        self._completed = False

    def subscribe(self, source: Observable[Any]) -> abc.DisposableBase:
        leaving = self._staged.subscribe(self._left, self._observer.on_error, self._observer.on_completed)
        entering = source.subscribe(self._arrived, self._entrance.on_error, self._on_completed)
        return CompositeDisposable(entering, leaving)

    def _arrived(self, item: Any) -> None:
        with self._lock:
            if self._branch.busy:
                self._waiting = [self._merge(self._waiting[0], item) if self._waiting else item]
                return
            self._branch.busy = True
        self._entrance.on_next(item)

    def _left(self, item: Any) -> None:
        self._observer.on_next(item)
        with self._lock:
            waiting, self._waiting = self._waiting, []
            self._branch.busy = bool(waiting)
            self._branch.finished += 1
            finished = self._completed and not waiting
        if waiting:
            self._entrance.on_next(waiting[0])
        elif finished:
            self._entrance.on_completed()

    def _on_completed(self) -> None:
        with self._lock:
            self._completed = True
            finished = not self._branch.busy
        if finished:
            self._entrance.on_completed()


def isolated(work: Callable[[_T], Any], on_failure: Callable[[Exception], None]) -> Callable[[_T], _T]:
    """Work on an item and give it on; an exception is told and ends no stream.

    Args:
        work: what is done with an item.
        on_failure: told of what it raised.
    """

    def worked(item: _T) -> _T:
        try:
            work(item)
        except Exception as error:  # noqa: BLE001 - told
            on_failure(error)
        return item

    return worked


def fan_out(*branches: Operator[_T, Any]) -> Operator[_T, Any]:
    """Share one subscription of the source among branches and merge what comes out of them."""

    def operator(source: Observable[_T]) -> Observable[Any]:
        def merged(shared: Observable[Any]) -> Observable[Any]:
            return rx.merge(*(branch(shared) for branch in branches))

        return source.pipe(ops.publish(merged))

    return operator


def partitions(
    names: Sequence[Hashable],
    partition_of: Callable[[_K], Hashable],
    partition: Operator[dict[_K, _V], Any],
) -> Operator[dict[_K, _V], Any]:
    """Fan-out by key: split each dict into partitions that go on side by side, each in its own order.

    Args:
        names: all partitions there are; what belongs to none of them is left out.
        partition_of: the partition of a key.
        partition: what a partition does with its part; a dict without a part for a partition does not reach it.
    """

    def split(item: dict[_K, _V]) -> dict[Hashable, dict[_K, _V]]:
        parts: dict[Hashable, dict[_K, _V]] = {}
        for key, value in item.items():
            parts.setdefault(partition_of(key), {})[key] = value
        return parts

    def operator(source: Observable[dict[_K, _V]]) -> Observable[Any]:
        def subscribe(observer: abc.ObserverBase[Any], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
            # An entrance for each partition, as group_by has: to ask every partition of every item whether it has a
            # part costs more than the parts do.
            entrances: dict[Hashable, Subject[dict[_K, _V]]] = {name: Subject() for name in names}

            def on_next(item: dict[_K, _V]) -> None:
                for name, part in split(item).items():
                    if name in entrances:
                        entrances[name].on_next(part)

            def on_error(error: Exception) -> None:
                for entrance in entrances.values():
                    entrance.on_error(error)

            def on_completed() -> None:
                for entrance in entrances.values():
                    entrance.on_completed()

            leaving = rx.merge(*map(partition, entrances.values())).subscribe(observer)
            return CompositeDisposable(source.subscribe(on_next, on_error, on_completed), leaving)

        return rx.create(subscribe)

    return operator


class Backoff:
    """Pauses between attempts: doubled from `first` to `cap` seconds, each cut by up to `jitter` of itself.

    Args:
        first: seconds after the first failure.
        cap: seconds at most.
        jitter: part that chance may take off, so that many do not come back at the same moment.
        uniform: a number in [0, 1).
    """

    def __init__(
        self,
        first: float = 1.0,
        cap: float = 30.0,
        jitter: float = 0.2,
        uniform: Callable[[], float] = random.random,
    ) -> None:
        self._first, self._cap, self._jitter, self._uniform = first, cap, jitter, uniform

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row (at least one)."""
        doublings = min(failures - 1, 60)  # beyond, a float could overflow
        return min(self._cap, self._first * 2.0**doublings) * (1 - self._jitter * self._uniform())


def retry_with_backoff(
    backoff: Backoff,
    scheduler: abc.SchedulerBase,
    until: Observable[Any],
    on_failure: Callable[[Exception, float], None] = lambda error, pause: None,
) -> Operator[_T, _T]:
    """Subscribe again when the source fails, for ever, after a pause that grows until an item comes.

    Runs at constant depth however often it fails. `until` ends a pause, and with it the result.

    Args:
        backoff: the pauses; they begin anew once an item has come.
        scheduler: waits for them.
        until: its first item completes the result if it waits; a running attempt ends by itself.
        on_failure: told of each failure and the seconds until the next attempt.
    """

    def attempts(source: Observable[_T]) -> Iterator[Observable[_T]]:
        failures = 0
        pause = 0.0

        def came(_: _T) -> None:
            nonlocal failures
            failures = 0

        def failed(error: Exception) -> None:
            nonlocal failures, pause
            failures += 1
            pause = backoff.pause(failures)
            on_failure(error, pause)

        attempt = source.pipe(ops.do_action(on_next=came, on_error=failed))
        yield attempt
        while True:
            yield rx.timer(pause, scheduler=scheduler).pipe(ops.take_until(until), ops.flat_map(lambda _: attempt))

    return lambda source: rx.defer(lambda _: rx.catch_with_iterable(attempts(source)))
