"""The event loop of timers and the pool of blocking calls."""

import threading
from typing import Any

import pytest
import reactivex as rx
from reactivex import abc
from reactivex import operators as ops
from reactivex.subject import Subject

from marketflow.pipeline.schedulers import NamedPool, TimingLoop


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
    """What was observed on it would else wait for ever, and the exception end the thread that emitted it."""
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
