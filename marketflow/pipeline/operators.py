"""Operators that RxPY lacks.

RxPY has no backpressure: `observe_on` queues items without bound before a slow consumer. No operator here does.
`conflate_map` has one item under way and one that is pending, into which all that arrive are merged; so memory is
bounded by the number of series, and a consumer that falls behind gets fewer and larger items.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from operator import ior
from typing import Any, TypeVar
from zlib import crc32

import reactivex as rx
from reactivex import ConnectableObservable, Observable, abc
from reactivex import operators as ops
from reactivex.disposable import CompositeDisposable, SerialDisposable, SingleAssignmentDisposable
from reactivex.subject import Subject

from marketflow.model import Candles, Series
from marketflow.pipeline.branches import Branch
from marketflow.tasks import Backoff

_T = TypeVar("_T")
_R = TypeVar("_R")
_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")

Operator = Callable[[Observable[_T]], Observable[_R]]


def _unwatched() -> Branch:
    return Branch("")


def union(older: dict[_K, _V], newer: dict[_K, _V]) -> dict[_K, _V]:
    """Conflate dicts: the newer value of each key stays."""
    return older | newer


def keep_newer(older: Any, newer: Any) -> Any:
    """Conflate items that only trigger work: the newer one stays."""
    return newer


_IN_PLACE: dict[Callable[[Any, Any], Any], Callable[[Any, Any], Any]] = {union: ior}
"""What changes its first argument, for functions that merge two items into a new one."""


class _PendingItem:
    """No item, or one into which those that arrive are merged; for one thread at a time.

    The first merge makes a new item, later ones change that: a new one each time would take time by the square of the
    number of merges, an eighth of the CPU of 15,000 series.
    """

    def __init__(self, merge: Callable[[Any, Any], Any]) -> None:
        self._merge = merge
        self._merge_in_place = _IN_PLACE.get(merge, merge)
        self._items: list[Any] = []
        self._is_own = False

    def add(self, item: Any) -> None:
        """Merge an item into the pending one, if there is one."""
        if not self._items:
            self._items = [item]
        elif self._is_own:
            self._items[0] = self._merge_in_place(self._items[0], item)
        else:
            self._items, self._is_own = [self._merge(self._items[0], item)], True

    def take(self) -> list[Any]:
        """Remove and return the pending item, if there is one."""
        items, self._items, self._is_own = self._items, [], False
        return items


class _Conflation(ABC):
    """The state of one subscription: an item under way, and a pending one into which those that arrive are merged."""

    def __init__(
        self, merge: Callable[[Any, Any], Any], observer: abc.ObserverBase[Any], branch: Callable[[], Branch]
    ) -> None:
        self._observer = observer
        self._lock = threading.Lock()
        self._pending = _PendingItem(merge)
        self._branch = branch()
        self._completed = False

    @abstractmethod
    def _begin(self, item: Any) -> None:
        """Begin the work on an item, whose end calls `_item_done`."""

    @abstractmethod
    def _end(self) -> None:
        """Complete the result: the source has completed, and no item is left."""

    def _on_next(self, item: Any) -> None:
        with self._lock:
            if self._branch.busy:
                self._pending.add(item)
                return
            self._branch.busy = True
        self._begin(item)

    def _item_done(self) -> None:
        with self._lock:
            pending = self._pending.take()
            self._branch.busy = bool(pending)
            self._branch.finished += 1
            ended = self._completed and not pending
        if pending:
            self._begin(pending[0])
        elif ended:
            self._end()

    def _on_completed(self) -> None:
        with self._lock:
            self._completed = True
            ended = not self._branch.busy
        if ended:
            self._end()


def conflate_map(
    mapper: Callable[[_T], Observable[_R]],
    merge: Callable[[_T, _T], _T],
    branch: Callable[[], Branch] = _unwatched,
) -> Operator[_T, _R]:
    """Like flat_map with one inner Observable at a time; items that arrive meanwhile are merged into a pending one.

    An item that arrives when idle is mapped at once. Capacity: one item. Policy: merge. When the source completes, the
    pending item is still mapped before the result completes.

    Args:
        mapper: returns the work for an item, whose completion admits the next.
        merge: merges the pending item and the next, in this order, without changing them.
        branch: creates the progress record of a subscription.
    """

    def operator(source: Observable[_T]) -> Observable[_R]:
        def subscribe(observer: abc.ObserverBase[_R], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
            return _MapConflation(mapper, merge, observer, branch).subscribe(source)

        return rx.create(subscribe)

    return operator


class _MapConflation(_Conflation):
    """One subscription of conflate_map."""

    def __init__(
        self,
        mapper: Callable[[Any], Observable[Any]],
        merge: Callable[[Any, Any], Any],
        observer: abc.ObserverBase[Any],
        branch: Callable[[], Branch],
    ) -> None:
        super().__init__(merge, observer, branch)
        self._mapper = mapper
        self._inner = SerialDisposable()

    def subscribe(self, source: Observable[Any]) -> abc.DisposableBase:
        outer = source.subscribe(self._on_next, self._observer.on_error, self._on_completed)
        return CompositeDisposable(outer, self._inner)

    def _begin(self, item: Any) -> None:
        try:
            inner = self._mapper(item)
        except Exception as error:  # noqa: BLE001 - passed on
            self._observer.on_error(error)
            return
        # Assigned before subscribing: the inner may complete on another thread, which then begins the next one, before
        # `subscribe` returns here. Assigned afterwards, this subscription would dispose that of the next one.
        subscription = SingleAssignmentDisposable()
        self._inner.disposable = subscription
        subscription.disposable = inner.subscribe(self._inner_emitted, self._observer.on_error, self._item_done)

    def _inner_emitted(self, item: Any) -> None:
        self._branch.finished += 1  # one step
        self._observer.on_next(item)

    def _end(self) -> None:
        self._observer.on_completed()


def conflate_through(
    stage: Operator[_T, _R], merge: Callable[[_T, _T], _T], branch: Callable[[], Branch] = _unwatched
) -> Operator[_T, _R]:
    """Pass one item at a time through a stage; items that arrive meanwhile are merged into a pending one.

    Like conflate_map, with one subscription for all items instead of one for each, which would cost more than a small
    item. Capacity: one item. Policy: merge. When the source completes, the pending item still passes.

    Args:
        stage: must emit one item for each that it gets, which admits the next.
        merge: merges the pending item and the next, in this order, without changing them.
        branch: creates the progress record of a subscription.
    """

    def operator(source: Observable[_T]) -> Observable[_R]:
        def subscribe(observer: abc.ObserverBase[_R], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
            return _StageConflation(stage, merge, observer, branch).subscribe(source)

        return rx.create(subscribe)

    return operator


class _StageConflation(_Conflation):
    """One subscription of conflate_through."""

    def __init__(
        self,
        stage: Operator[Any, Any],
        merge: Callable[[Any, Any], Any],
        observer: abc.ObserverBase[Any],
        branch: Callable[[], Branch],
    ) -> None:
        super().__init__(merge, observer, branch)
        self._entrance: Subject[Any] = Subject()
        self._staged = stage(self._entrance)

    def subscribe(self, source: Observable[Any]) -> abc.DisposableBase:
        leaving = self._staged.subscribe(self._left, self._observer.on_error, self._observer.on_completed)
        entering = source.subscribe(self._on_next, self._entrance.on_error, self._on_completed)
        return CompositeDisposable(entering, leaving)

    def _begin(self, item: Any) -> None:
        self._entrance.on_next(item)

    def _left(self, item: Any) -> None:
        self._observer.on_next(item)
        self._item_done()

    def _end(self) -> None:
        self._entrance.on_completed()


def isolated(work: Callable[[_T], Any], on_failure: Callable[[Exception], None]) -> Callable[[_T], _T]:
    """Return a function that does `work` on an item and returns the item; its exceptions end no stream.

    Args:
        work: what is done with an item.
        on_failure: called with what it raised.
    """

    def worked(item: _T) -> _T:
        try:
            work(item)
        except Exception as error:  # noqa: BLE001 - passed to on_failure
            on_failure(error)
        return item

    return worked


def map_or_drop(
    mapper: Callable[[_T], dict[_K, _V]], on_failure: Callable[[Exception], None]
) -> Operator[_T, dict[_K, _V]]:
    """Like map, but an item for which `mapper` raises becomes an empty dict.

    Args:
        mapper: gives a dict for an item.
        on_failure: called with what it raised.
    """

    def mapped(item: _T) -> dict[_K, _V]:
        try:
            return mapper(item)
        except Exception as error:  # noqa: BLE001 - passed to on_failure
            on_failure(error)
            return {}

    return ops.map(mapped)


def tumbling_event_time(
    close_due: Operator[Candles, Candles], close_all: Callable[[], Candles]
) -> Operator[Candles, Candles]:
    """Emit closed tumbling windows of event time: at each item those that are due, at completion all the others.

    Args:
        close_due: gives the windows whose end and allowed lateness are over, and those that late ticks have changed.
        close_all: returns the windows that are still open.
    """

    def operator(source: Observable[Candles]) -> Observable[Candles]:
        return rx.concat(source.pipe(close_due), rx.defer(lambda _: rx.just(close_all()))).pipe(ops.filter(bool))

    return operator


def completion(source: Observable[Any]) -> Observable[None]:
    """Emit one item when the source completes."""
    return source.pipe(ops.ignore_elements(), ops.default_if_empty(None))


def connect(result: Observable[_T], *shared: ConnectableObservable[Any]) -> Observable[_T]:
    """Emit what `result` emits; connect the shared sources that it uses once all its subscriptions stand.

    Args:
        result: subscribes to the shared sources.
        shared: in the order to connect them, the one nearest to the result first: a source may emit at once.
    """

    def subscribe(observer: abc.ObserverBase[_T], scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        subscription = CompositeDisposable(result.subscribe(observer, scheduler=scheduler))
        for source in shared:
            if (connection := source.connect(scheduler)) is not None:
                subscription.add(connection)
        return subscription

    return rx.create(subscribe)


def split_by_series(
    item: dict[_K, _V], series_of: Callable[[_K], Series], per_exchange: int, whole_up_to: int
) -> list[dict[_K, _V]]:
    """Split a dict into partitions by series: the symbols of each exchange are hashed over `per_exchange` of them.

    Args:
        item: what is split.
        series_of: the series of a key.
        per_exchange: partitions of each exchange, at most.
        whole_up_to: number of entries up to which the dict stays whole.
    """
    if len(item) <= whole_up_to:
        return [item]
    names: dict[Series, Hashable] = {}
    parts: dict[Hashable, dict[_K, _V]] = {}
    for key, value in item.items():
        series = series_of(key)
        if (name := names.get(series)) is None:
            name = names[series] = (series.exchange, crc32(series.symbol.encode()) % per_exchange)
        parts.setdefault(name, {})[key] = value
    return list(parts.values())


def retry_with_backoff(
    backoff: Backoff,
    scheduler: abc.SchedulerBase,
    until: Observable[Any],
    on_failure: Callable[[Exception, float], None] = lambda error, pause: None,
    on_success: Callable[[], None] = lambda: None,
) -> Operator[_T, _T]:
    """Subscribe again when the source fails, without end, after a pause that grows until an item is emitted.

    Runs at constant stack depth however often the source fails.

    Args:
        backoff: the pauses, which start over after an attempt that emitted an item.
        scheduler: of the pauses.
        until: its first item completes the result during a pause; a running attempt goes on to its own end.
        on_failure: called with each failure and the seconds until the next attempt.
        on_success: called at the first item of each attempt.
    """

    def attempts(source: Observable[_T]) -> Iterator[Observable[_T]]:
        failures = 0
        pause = 0.0
        succeeded = False

        def emitted(_: _T) -> None:
            nonlocal failures, succeeded
            if not succeeded:
                failures, succeeded = 0, True
                on_success()

        def failed(error: Exception) -> None:
            nonlocal failures, pause, succeeded
            failures, succeeded = failures + 1, False
            pause = backoff.pause(failures)
            on_failure(error, pause)

        attempt = source.pipe(ops.do_action(on_next=emitted, on_error=failed))
        yield attempt
        while True:
            yield rx.timer(pause, scheduler=scheduler).pipe(ops.take_until(until), ops.flat_map(lambda _: attempt))

    return lambda source: rx.defer(lambda _: rx.catch_with_iterable(attempts(source)))
