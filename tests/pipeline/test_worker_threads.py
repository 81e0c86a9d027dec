"""Threads for blocking calls: one wakes for each call, and a call that fails ends none of them."""

import threading
from collections.abc import Iterable, Iterator
from functools import partial

import pytest

from marketflow.pipeline.schedulers import WorkerThreads
from tests.support.process_counters import thread_switches
from tests.support.servers import wait_until

THREADS = 4
CALLS = 100


@pytest.fixture
def threads() -> Iterator[WorkerThreads]:
    """Threads that are all idle."""
    pool = WorkerThreads("idle-worker", THREADS)
    all_run = threading.Barrier(THREADS + 1)
    for _ in range(THREADS):
        pool.submit(partial(all_run.wait, 5))
    all_run.wait(5)
    wait_until(lambda: len(pool._idle) == THREADS)
    yield pool
    pool.close()


def waits(threads: Iterable[int]) -> int:
    """Return how often threads have waited."""
    return sum(thread_switches(each).voluntary for each in threads)


def test_each_call_wakes_one_thread(threads: WorkerThreads) -> None:
    """The quietest of three times counts: on a busy machine a thread also waits for Python's lock."""
    ids = [each.native_id or 0 for each in threading.enumerate() if each.name.startswith("idle-worker")]
    waited = []
    for _ in range(3):
        before, done = waits(ids), threading.Semaphore(0)
        for _ in range(CALLS):
            threads.submit(done.release)
            assert done.acquire(timeout=5)
            wait_until(lambda: len(threads._idle) == THREADS)
        waited.append(waits(ids) - before)
    assert min(waited) < 1.7 * CALLS


def test_more_calls_than_threads_wait_for_their_turn(threads: WorkerThreads) -> None:
    may_end, ran = threading.Event(), threading.Semaphore(0)

    def call() -> None:
        assert may_end.wait(5)
        ran.release()

    for _ in range(3 * THREADS):
        threads.submit(call)
    assert sum(each.name.startswith("idle-worker") for each in threading.enumerate()) == THREADS
    may_end.set()
    for _ in range(3 * THREADS):
        assert ran.acquire(timeout=5)


def test_withdrawn_call_does_not_run(threads: WorkerThreads) -> None:
    may_end = threading.Event()
    ran: list[str] = []
    for _ in range(THREADS):
        threads.submit(partial(may_end.wait, 5))
    withdrawn = partial(ran.append, "withdrawn")
    threads.submit(withdrawn)
    threads.submit(partial(ran.append, "other"))
    threads.withdraw(withdrawn)
    may_end.set()
    wait_until(lambda: ran)
    wait_until(lambda: len(threads._idle) == THREADS)
    assert ran == ["other"]


def test_call_that_fails_is_logged_and_ends_no_thread(threads: WorkerThreads, log: list[str]) -> None:
    def fail() -> None:
        raise ValueError("a bug")

    for _ in range(2 * THREADS):
        threads.submit(fail)
    done = threading.Event()
    threads.submit(done.set)
    assert done.wait(5)
    wait_until(lambda: log)
    assert "a blocking call failed" in log[0]


def test_closed_threads_end_without_the_calls_that_wait(threads: WorkerThreads) -> None:
    may_end = threading.Event()
    ran: list[str] = []
    for _ in range(THREADS - 1):
        threads.submit(partial(may_end.wait, 5))
    threads.submit(partial(may_end.wait, 5))
    threads.submit(partial(ran.append, "waited"))
    threads.close()
    threads.submit(partial(ran.append, "late"))
    may_end.set()
    wait_until(lambda: not any(each.name.startswith("idle-worker") for each in threading.enumerate()))
    assert not ran
