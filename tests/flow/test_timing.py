"""The loop of all timers."""

import threading

from reactivex import abc

from marketflow.flow.timing import TimingLoop


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
