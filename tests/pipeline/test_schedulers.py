"""The event loop of timers and the pool of blocking calls."""

import threading
import time
from typing import Any

import pytest
import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.subject import Subject
from reactivex.testing import TestScheduler

from marketflow.pipeline.schedulers import GridScheduler, NamedPool, TimingLoop


def test_an_action_that_goes_on_while_its_loop_is_disposed_of_ends_quietly() -> None:
    loop, under_way, disposed, over = TimingLoop("timing"), threading.Event(), threading.Event(), threading.Event()

    def act(scheduler: abc.SchedulerBase, _: object) -> None:
        under_way.set()
        assert disposed.wait(5)
        scheduler.schedule(lambda *_: never.set())
        over.set()  # without an exception

    never = threading.Event()
    loop.schedule(act)
    assert under_way.wait(5)
    loop.dispose()
    disposed.set()
    assert over.wait(5)
    assert not never.is_set()


def test_loop_reports_the_action_that_ended_its_thread() -> None:
    failures: list[Exception] = []
    failed = threading.Event()

    def failure(error: Exception) -> None:
        failures.append(error)
        failed.set()

    def raises(*_: object) -> None:
        raise ValueError("a bug")

    TimingLoop("timing", failure).schedule(raises)
    assert failed.wait(5)
    assert [str(error) for error in failures] == ["a bug"]


# The pool


class NoThreads(threading.Thread):
    """A thread that the system cannot start."""

    def start(self) -> None:
        raise RuntimeError("can't start new thread")


def test_pool_works_on_when_no_further_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise an observer would wait for ever, and the exception would end the thread of the emitter."""
    pool = NamedPool("worker", 8)
    monkeypatch.setattr(threading, "Thread", NoThreads)
    source: Subject[int] = Subject()
    got: list[int] = []
    all_came = threading.Event()

    def take(item: int) -> None:
        got.append(item)
        if len(got) == 100:
            all_came.set()

    rx.merge(*(source.pipe(ops.observe_on(pool)) for _ in range(4))).subscribe(take)
    for number in range(25):
        source.on_next(number)
    assert all_came.wait(5)
    pool.close()


def test_pool_that_is_closed_takes_no_work_and_raises_nothing() -> None:
    pool = NamedPool("worker", 1)
    pool.close()
    ran: list[Any] = []
    pool.schedule(lambda *_: ran.append(1))
    assert not ran


def test_loop_whose_thread_cannot_start_begins_with_the_next_action(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = TimingLoop("timing")
    ran = threading.Event()
    with monkeypatch.context() as patched:
        patched.setattr(threading, "Thread", NoThreads)
        with pytest.raises(RuntimeError):
            loop.schedule(lambda *_: None)
    loop.schedule(lambda *_: ran.set())
    assert ran.wait(5)
    loop.dispose()


# The grid


class Buffers:
    """Records what buffer_with_time emits on a grid of 0.1 s, from 0.25 s on; the clock is stepped at 1 s."""

    def __init__(self, step_ms: float = 0.0, consumer_seconds: float = 0.0, idle_ms: int = 0) -> None:
        self.time = TestScheduler()
        self.time.advance_to(0.25)
        self.step_ms = step_ms
        self.consumer_seconds = consumer_seconds
        self.emitted: list[tuple[float, list[int]]] = []
        self.completed = False
        self.source: Subject[int] = Subject()
        self.idle_ms = idle_ms
        self.grid = GridScheduler(self.time, self.now_ms, lambda: self.idle_ms)
        buffers = self.source.pipe(ops.do_action(self.grid.wake), ops.buffer_with_time(0.1, scheduler=self.grid))
        self.subscription = buffers.subscribe(self.take, on_completed=self.complete)

    @property
    def seconds(self) -> float:
        return round(float(self.time.clock), 3)

    def now_ms(self) -> int:
        return round(float(self.time.clock) * 1000 + (self.step_ms if self.seconds >= 1 else 0))

    def take(self, buffer: list[int]) -> None:
        self.emitted.append((self.seconds, buffer))
        self.time.sleep(self.consumer_seconds)

    def complete(self) -> None:
        self.completed = True

    def run_until(self, seconds: float) -> None:
        self.time.advance_to(seconds)

    def send_at(self, seconds: float, item: int) -> None:
        self.run_until(seconds)
        self.source.on_next(item)


def test_buffers_end_on_full_periods_of_the_clock() -> None:
    buffers = Buffers()
    for seconds, item in ((0.26, 1), (0.299, 2), (0.301, 3), (0.55, 4)):
        buffers.send_at(seconds, item)
    buffers.run_until(0.65)
    assert buffers.emitted == [(0.3, [1, 2]), (0.4, [3]), (0.5, []), (0.6, [4])]


def test_buffers_do_not_drift_with_a_slow_consumer() -> None:
    buffers = Buffers(consumer_seconds=0.03)
    buffers.run_until(2.05)
    assert [seconds for seconds, _ in buffers.emitted] == [round(0.3 + number / 10, 1) for number in range(18)]


def test_buffers_follow_the_grid_of_a_stepped_clock() -> None:
    buffers = Buffers(step_ms=30.0)
    buffers.run_until(2)
    times = [seconds for seconds, _ in buffers.emitted]
    assert times[:4] == [0.3, 0.4, 0.5, 0.6]
    assert times[-3:] == [1.77, 1.87, 1.97]


@pytest.mark.parametrize("step_ms", [3_600_000.0, -3_600_000.0])
def test_clock_step_of_an_hour_delays_no_buffer(step_ms: float) -> None:
    buffers = Buffers(step_ms)
    buffers.run_until(2.05)
    assert len(buffers.emitted) == 18


def test_timer_that_was_early_waits_for_the_next_full_period() -> None:
    buffers = Buffers(step_ms=-2.0)  # what is due at 1.1 s by the clock fires at 1.102 s, and all after it
    buffers.run_until(1.35)
    assert [seconds for seconds, _ in buffers.emitted][-4:] == [1.0, 1.102, 1.202, 1.302]


def test_completion_emits_the_rest_of_a_buffer() -> None:
    buffers = Buffers()
    buffers.send_at(0.26, 1)
    buffers.source.on_completed()
    buffers.run_until(1)
    assert buffers.emitted == [(0.26, [1])]
    assert buffers.completed


def test_idle_buffers_end_at_full_seconds() -> None:
    buffers = Buffers(idle_ms=1000)
    buffers.run_until(3.05)
    assert buffers.emitted == [(0.3, []), (1.0, []), (2.0, []), (3.0, [])]


def test_item_that_ends_an_idle_time_is_emitted_at_the_next_full_period() -> None:
    buffers = Buffers(idle_ms=1000)
    buffers.send_at(1.43, 1)
    buffers.send_at(1.44, 2)
    buffers.send_at(1.55, 3)
    buffers.send_at(2.95, 4)
    buffers.run_until(4.5)
    assert buffers.emitted == [
        (0.3, []),
        (1.0, []),
        (1.5, [1, 2]),
        (1.6, [3]),
        (1.7, []),
        (2.0, []),
        (3.0, [4]),
        (3.1, []),
        (4.0, []),
    ]


def test_interval_of_idle_buffers_follows_what_is_due() -> None:
    buffers = Buffers(idle_ms=5000)
    buffers.send_at(5.05, 1)
    buffers.idle_ms = 1000
    buffers.run_until(7.05)
    buffers.idle_ms = 5000
    buffers.run_until(15.5)
    assert [seconds for seconds, _ in buffers.emitted] == [0.3, 5.0, 5.1, 5.2, 6.0, 7.0, 8.0, 10.0, 15.0]


def test_disposed_idle_timer_is_not_set_again() -> None:
    buffers = Buffers(idle_ms=1000)
    buffers.run_until(1.2)
    buffers.subscription.dispose()
    buffers.grid.wake()
    buffers.run_until(3)
    assert buffers.emitted == [(0.3, []), (1.0, [])]


def test_periodic_timer_runs_at_full_multiples_of_its_period() -> None:
    time = TestScheduler()
    time.advance_to(0.25)
    grid = GridScheduler(time, lambda: round(float(time.clock) * 1000), lambda: 1000)
    ran: list[tuple[float, int]] = []
    periodic = rx.interval(0.5, scheduler=grid).subscribe(lambda number: ran.append((float(time.clock), number)))
    time.advance_to(2.1)
    grid.wake()
    time.advance_to(3.2)
    assert ran == [(0.5, 0), (1.0, 1), (2.0, 2), (2.5, 3), (3.0, 4)]
    periodic.dispose()
    time.advance_to(10)
    assert len(ran) == 5


@pytest.mark.parametrize("pause_seconds", [0.0, 0.0005])
def test_buffers_by_the_grid_lose_nothing_of_another_thread(pause_seconds: float) -> None:
    """With pauses, most items end an idle time, in a race with the timer that they set anew."""
    loop, count, done = TimingLoop("test"), 2_000 if pause_seconds else 20_000, threading.Event()
    got: list[int] = []
    source: Subject[int] = Subject()
    grid = GridScheduler(loop, lambda: time.time_ns() // 100_000, lambda: 2)
    buffers: Observable[list[int]] = source.pipe(ops.do_action(grid.wake), ops.buffer_with_time(0.001, scheduler=grid))
    buffers.subscribe(got.extend, on_completed=done.set)
    for number in range(count):
        source.on_next(number)
        if pause_seconds:
            time.sleep(pause_seconds)
    source.on_completed()
    assert done.wait(10)
    loop.dispose()
    assert got == list(range(count))
