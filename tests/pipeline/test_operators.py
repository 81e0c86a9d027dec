"""The operators that Rx lacks, in virtual time."""

import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given
from hypothesis import strategies as st
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.disposable import Disposable
from reactivex.notification import OnCompleted, OnNext
from reactivex.subject import Subject
from reactivex.testing import ReactiveTest, Recorded, TestScheduler
from reactivex.testing.mockobserver import MockObserver

from marketflow.model import Mode, Series, Slot
from marketflow.pipeline.operators import (
    Operator,
    conflate_map,
    conflate_through,
    connect,
    isolated,
    retry_with_backoff,
    split_by_series,
    union,
)
from marketflow.pipeline.schedulers import TimingLoop
from marketflow.tasks import Backoff

on_next, on_completed, on_error = ReactiveTest.on_next, ReactiveTest.on_completed, ReactiveTest.on_error


def working(scheduler: TestScheduler, seconds: float) -> Callable[[Any], Observable[Any]]:
    """A slow consumer, which emits each item after a while."""
    return lambda item: rx.timer(seconds, scheduler=scheduler).pipe(ops.map(lambda _: item))


def values(result: MockObserver[Any]) -> list[Any]:
    return [message.value.value for message in recorded(result) if isinstance(message.value, OnNext)]


def recorded(result: MockObserver[Any]) -> list[Recorded[Any]]:
    """Return the notifications of a mock observer, whose type allows predicates as well."""
    return list(result.messages)


def add(a: int, b: int) -> int:
    return a + b


# conflate_map, conflate_through

Conflate = Callable[[Callable[[Any], Observable[Any]], Callable[[Any, Any], Any]], Operator[Any, Any]]


@pytest.fixture(scope="module", params=[conflate_map, lambda work, merge: conflate_through(ops.flat_map(work), merge)])
def conflate(request: pytest.FixtureRequest) -> Conflate:
    """One of the two conflation operators, given the work and the merge."""
    operator: Conflate = request.param
    return operator


def test_item_that_arrives_when_idle_is_emitted_at_once(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1), on_next(300, 2))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 5), add)))
    assert result.messages == [on_next(215, 1), on_next(305, 2)]


def test_items_during_work_are_merged_into_one(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(*(on_next(210 + i, 10**i) for i in range(6)))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 50), add)))
    assert result.messages == [on_next(260, 1), on_next(310, 111110)]


def test_union_keeps_the_newest_and_changes_no_item(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    items = [{"a": 1}, {"a": 2, "b": 2}, {"a": 3}, {"b": 4, "c": 4}, {"a": 5}, {"c": 6}]
    arrived = [*map(dict, items)]
    source = scheduler.create_hot_observable(*(on_next(210 + i, item) for i, item in enumerate(arrived)))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 50), union)))
    assert result.messages == [on_next(260, {"a": 1}), on_next(310, {"a": 5, "b": 4, "c": 6})]
    assert arrived == items


def test_waiting_item_is_emitted_after_the_source_completes(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1), on_next(220, 2), on_completed(230))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 50), add)))
    assert result.messages == [on_next(260, 1), on_next(310, 2), on_completed(310)]


def test_an_idle_conflation_completes_with_its_source(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1), on_completed(300))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 5), add)))
    assert result.messages == [on_next(215, 1), on_completed(300)]


def test_an_error_of_the_work_and_one_of_the_source_end_it(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    error = ValueError()
    source = scheduler.create_hot_observable(on_next(210, 1))
    result = scheduler.start(lambda: source.pipe(conflate(lambda _: rx.throw(error), add)))
    assert result.messages == [on_error(210, error)]
    failing = scheduler.create_hot_observable(on_error(1210, error))
    result = scheduler.start(
        lambda: failing.pipe(conflate(working(scheduler, 5), add)), created=1100, subscribed=1200, disposed=2000
    )
    assert result.messages == [on_error(1210, error)]


def test_disposing_ends_the_work_under_way(conflate: Conflate) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1), on_next(215, 2))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, 50), add)), disposed=240)
    assert result.messages == []


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 100)), max_size=30), st.integers(1, 100))
def test_conflation_loses_nothing_and_doubles_nothing(
    conflate: Conflate, items: list[tuple[int, int]], seconds: int
) -> None:
    scheduler = TestScheduler()
    at = 200
    messages = []
    for pause, value in items:
        at += pause
        messages.append(on_next(at, value))
    source = scheduler.create_hot_observable(*messages, on_completed(at + 1))
    result = scheduler.start(lambda: source.pipe(conflate(working(scheduler, seconds), add)), disposed=100_000)
    assert sum(values(result)) == sum(value for _, value in items)
    assert isinstance(recorded(result)[-1].value, OnCompleted)


def test_work_that_ends_at_once_does_not_deepen_the_stack() -> None:
    source: Subject[int] = Subject()
    got: list[int] = []

    def feed_back(item: int) -> Observable[int]:
        if item < 3 * sys.getrecursionlimit():
            source.on_next(item + 1)  # arrives while busy, so it waits
        return rx.just(item)

    source.pipe(conflate_map(feed_back, lambda _, newer: newer)).subscribe(got.append)
    source.on_next(0)
    assert len(got) == 3 * sys.getrecursionlimit() + 1


# Completions from other threads


def joined(end: Callable[[abc.ObserverBase[Any]], None]) -> Observable[Any]:
    """An Observable that another thread completes before `subscribe` returns."""

    def subscribe(observer: abc.ObserverBase[Any], _: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        thread = threading.Thread(target=end, args=(observer,))
        thread.start()
        thread.join(10)
        return Disposable()

    return rx.create(subscribe)


def test_conflate_map_survives_completion_on_another_thread() -> None:
    """The completion begins the pending item; assigned late, the first subscription would dispose the second."""
    source: Subject[int] = Subject()
    begun: list[int] = []
    disposed: list[int] = []
    got: list[int] = []
    second: Subject[int] = Subject()

    def work(item: int) -> Observable[int]:
        begun.append(item)
        if item == 1:
            source.on_next(2)  # waits
            return joined(lambda observer: observer.on_completed())
        return second.pipe(ops.finally_action(lambda: disposed.append(item)))

    source.pipe(conflate_map(work, add)).subscribe(got.append)
    source.on_next(1)
    assert (begun, disposed) == ([1, 2], [])
    source.on_next(3)
    second.on_next(20)
    second.on_completed()
    assert (begun, got) == ([1, 2, 3], [20])


def test_conflate_map_runs_on_when_each_completion_is_on_another_thread() -> None:
    source: Subject[int] = Subject()
    got: list[int] = []
    completed = threading.Event()

    def work(item: int) -> Observable[int]:
        if item < 50:
            source.on_next(item + 1)

        def end(observer: abc.ObserverBase[int]) -> None:
            observer.on_next(item)
            observer.on_completed()

        return joined(end)

    source.pipe(conflate_map(work, lambda _, newer: newer)).subscribe(got.append, on_completed=completed.set)
    source.on_next(0)
    assert got == list(range(51))
    source.on_completed()
    assert completed.is_set()


def test_retries_go_on_when_each_failure_is_on_another_thread() -> None:
    attempts: list[int] = []
    got: list[str] = []

    def attempt(_: object) -> Observable[str]:
        attempts.append(len(attempts))
        number = len(attempts)
        return joined(lambda observer: observer.on_error(OSError()) if number < 20 else observer.on_next("there"))

    loop = TimingLoop("timing")
    ended = threading.Event()
    retried = rx.defer(attempt).pipe(retry_with_backoff(Backoff(0.001, 0.002), loop, rx.never()))
    retried.pipe(ops.do_action(got.append)).subscribe(lambda _: ended.set())
    assert ended.wait(10)
    loop.dispose()
    assert (len(attempts), got) == (20, ["there"])


# isolated


def test_work_that_raises_is_reported_and_does_not_stop_the_next() -> None:
    scheduler = TestScheduler()
    failures: list[Exception] = []

    def work(item: int) -> None:
        if item == 2:
            raise ValueError("poison")

    source = scheduler.create_hot_observable(on_next(210, 1), on_next(220, 2), on_next(230, 3), on_completed(240))
    result = scheduler.start(lambda: source.pipe(ops.map(isolated(work, failures.append))))
    assert values(result) == [1, 2, 3]
    assert [str(failure) for failure in failures] == ["poison"]


# connect, split_by_series


def test_connect_subscribes_once_and_completes_after_all_branches() -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1), on_completed(220))

    def branches() -> Observable[int]:
        shared = source.pipe(ops.publish())
        return connect(
            rx.merge(shared.pipe(ops.map(lambda x: x)), shared.pipe(ops.delay(50, scheduler=scheduler))), shared
        )

    result = scheduler.start(branches)
    assert result.messages == [on_next(210, 1), on_next(260, 1), on_completed(270)]
    assert len(source.subscriptions) == 1


def test_connect_passes_what_sources_emit_at_once_to_all_branches() -> None:
    first = rx.of(1, 2).pipe(ops.publish())
    second = rx.merge(first, rx.just(3)).pipe(ops.publish())
    got: list[tuple[str, int]] = []
    branches = rx.merge(second.pipe(ops.map(lambda x: ("a", x))), second.pipe(ops.map(lambda x: ("b", x))))
    connect(branches, second, first).subscribe(got.append)
    assert sorted(got) == [(name, x) for name in "ab" for x in (1, 2, 3)]


def test_disposing_of_connect_disconnects_the_shared_sources() -> None:
    scheduler = TestScheduler()
    source = scheduler.create_hot_observable(on_next(210, 1))
    shared = source.pipe(ops.publish())
    scheduler.start(lambda: connect(shared, shared), disposed=300)
    assert [subscription.unsubscribe for subscription in source.subscriptions] == [300]


def test_small_dict_stays_whole_and_a_larger_one_is_split() -> None:
    series = [Series(Mode.LIVE, f"exchange{n % 3}", f"S{n}") for n in range(60)]
    item = {Slot(each, start): start for each in series for start in (0, 100)}
    assert split_by_series(item, lambda slot: slot.series, 5, whole_up_to=120) == [item]
    parts = split_by_series(item, lambda slot: slot.series, 5, whole_up_to=119)
    assert len(parts) == 15
    assert {slot: value for part in parts for slot, value in part.items()} == item
    assert sum(map(len, parts)) == len(item)
    assert len({(number, slot.series) for number, part in enumerate(parts) for slot in part}) == len(series)
    assert all(len({slot.series.exchange for slot in part}) == 1 for part in parts)


# Backoff, retry_with_backoff


def test_pauses_double_up_to_the_cap() -> None:
    backoff = Backoff(1.0, 30.0, jitter=0.0)
    assert [backoff.pause(n) for n in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff.pause(10_000) == 30


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_jitter_only_shortens_and_never_by_more_than_its_part(failures: int, chance: float) -> None:
    plain = Backoff(jitter=0.0).pause(failures)
    assert 0.8 * plain <= Backoff(uniform=lambda: chance).pause(failures) <= plain


def attempts_at(
    scheduler: TestScheduler, source_of: Callable[[int], Observable[int]], until: int = 1000
) -> list[float]:
    """The virtual times at which a source was subscribed to."""
    times: list[float] = []

    def attempt(_: Any) -> Observable[int]:
        times.append(scheduler.clock)
        return source_of(len(times))

    retried = rx.defer(attempt).pipe(retry_with_backoff(Backoff(1, 30, jitter=0), scheduler, rx.never()))
    scheduler.start(lambda: retried, disposed=until)
    return times


def test_a_source_that_fails_is_tried_again_after_growing_pauses() -> None:
    times = attempts_at(TestScheduler(), lambda _: rx.throw(OSError()), until=310)
    assert [later - earlier for earlier, later in pairwise(times)] == [1, 2, 4, 8, 16, 30, 30]


def test_the_pauses_begin_anew_once_an_item_has_come() -> None:
    scheduler = TestScheduler()

    def source(attempt: int) -> Observable[int]:
        return rx.concat(rx.just(1), rx.throw(OSError())) if attempt == 4 else rx.throw(OSError())

    times = attempts_at(scheduler, source, until=215)
    assert [later - earlier for earlier, later in pairwise(times)] == [1, 2, 4, 1, 2, 4]


def test_thousands_of_failures_do_not_deepen_the_stack() -> None:
    times = attempts_at(TestScheduler(), lambda _: rx.throw(OSError()), until=30 * 5000)
    assert len(times) > 4000


def test_each_failure_is_reported_with_its_pause() -> None:
    scheduler = TestScheduler()
    reported: list[tuple[str, float]] = []

    def report(error: Exception, pause: float) -> None:
        reported.append((str(error), pause))

    retry: Operator[Any, Any] = retry_with_backoff(Backoff(1, 30, jitter=0), scheduler, rx.never(), report)
    scheduler.start(lambda: rx.throw(OSError("gone")).pipe(retry), disposed=205)
    assert reported == [("gone", 1), ("gone", 2), ("gone", 4)]


@pytest.mark.parametrize("ended_at", [202, 100])
def test_an_end_completes_the_pause_instead_of_waiting_for_it(ended_at: int) -> None:
    scheduler = TestScheduler()
    ended: Subject[None] = Subject()
    until = rx.defer(lambda _: rx.just(None) if scheduler.clock >= ended_at else ended)
    scheduler.schedule_absolute(ended_at, lambda *_: ended.on_next(None))
    result = scheduler.start(
        lambda: rx.throw(OSError()).pipe(retry_with_backoff(Backoff(10, 30, jitter=0), scheduler, until))
    )
    (message,) = recorded(result)
    assert isinstance(message.value, OnCompleted)
    assert float(message.time) <= max(ended_at, 201)


def test_a_source_that_completes_is_not_tried_again() -> None:
    assert len(attempts_at(TestScheduler(), lambda _: rx.just(1))) == 1
