"""Counting delays."""

from concurrent.futures import ThreadPoolExecutor

from marketflow.counters import DelayCounter


def test_a_delay_is_counted_at_the_first_bound_that_it_does_not_exceed() -> None:
    counter = DelayCounter((0.1, 1.0))
    counter.count([0.05, 0.1, 0.100001, 1.0, 7.0])
    delays = counter.so_far()
    assert delays.counts == (2, 2, 1)
    assert delays.total == 0.05 + 0.1 + 0.100001 + 1.0 + 7.0


def test_a_clock_that_was_set_back_makes_no_negative_delay() -> None:
    counter = DelayCounter((0.1,))
    counter.count([-3600.0])
    assert counter.so_far().counts == (1, 0)
    assert counter.so_far().total == 0.0


def test_several_threads_lose_no_count() -> None:
    counter = DelayCounter((0.1,))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(2000):
            pool.submit(counter.count, [0.25, 0.0625])
    assert counter.so_far().counts == (2000, 2000)
    assert counter.so_far().total == 2000 * 0.3125
