"""Limits of the system; those that are refused at a start: tests/runtime/test_application.py."""

import threading
from collections.abc import Callable

import pytest

from marketflow.server.system_limits import blocking_threads, refuse_low_limits
from tests.support.servers import wait_until


@pytest.mark.timeout(20)
@pytest.mark.parametrize("started", [0, 1, 5])
@pytest.mark.parametrize("begin", [refuse_low_limits, blocking_threads])
def test_signal_while_threads_are_started_leaves_none_waiting(
    begin: Callable[[], object], started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, start = threading.active_count(), threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if threading.active_count() == before + started:
            raise KeyboardInterrupt
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        begin()
    wait_until(lambda: threading.active_count() == before)
