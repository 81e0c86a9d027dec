"""The lock of the feeds goes round: a feed that floods does not keep it from the others."""

import threading
from functools import partial

import pytest

from marketflow.feeds.cpu.fair_lock import FairLock
from tests.support.servers import wait_until


def test_lock_is_handed_over_in_the_order_of_asking() -> None:
    lock = FairLock()
    order: list[str] = []

    def take(name: str) -> None:
        with lock:
            order.append(name)

    def waits(number: int) -> bool:
        return len(lock._waiting) == number

    threads = [threading.Thread(target=take, args=(name,)) for name in ("first", "second", "third")]
    with lock:
        for number, thread in enumerate(threads, 1):
            thread.start()
            wait_until(partial(waits, number))
        assert order == []
    take("the one that had it")
    for thread in threads:
        thread.join(5)
    assert order == ["first", "second", "third", "the one that had it"]


def test_lock_is_exclusive_under_contention() -> None:
    lock = FairLock()
    inside = 0
    most = 0
    taken = 0

    def take() -> None:
        nonlocal inside, most, taken
        for _ in range(2000):
            with lock:
                inside += 1
                most = max(most, inside)
                taken += 1
                inside -= 1

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (most, taken) == (1, 8000)
    with lock:
        assert not lock._waiting


def test_lock_is_released_by_an_error() -> None:
    lock = FairLock()
    with pytest.raises(ValueError, match="broken"), lock:
        raise ValueError("broken")
    with lock:
        pass
