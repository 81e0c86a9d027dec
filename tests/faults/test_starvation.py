"""Ingest processes that get no CPU for a while: what the exchanges sent meanwhile counts in full."""

import signal
from collections.abc import Callable

import pytest

from tests.faults.conftest import RATE, WINDOW_MS, wait_for_windows, wait_until_warm
from tests.support.application import ScriptedExchange, Traffic, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.roles import Roles, stop_all
from tests.support.servers import wait_until

SUSPENDED_SECONDS = 8.0
"""Longer than flow.max_clock_skew_seconds, at which a tick counts as stale, by more than a clock proves wrong in."""


@pytest.mark.parametrize("number", [1, 2])
def test_suspended_processes_drop_no_tick_as_stale(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows], number: int
) -> None:
    """All of them are, so that nobody takes over: the ticks wait in their sockets."""
    processes = [roles.ingest() for _ in range(number)]
    wait_until_warm(broadcasting, number)
    with Traffic(broadcasting, rate=RATE) as traffic:
        wait_for_windows(1)
        for process in processes:
            process.process.send_signal(signal.SIGSTOP)
        resumed_at = now_ms() + SUSPENDED_SECONDS * 1000
        wait_until(lambda: now_ms() >= resumed_at, SUSPENDED_SECONDS + 1)
        for process in processes:
            process.process.send_signal(signal.SIGCONT)
        wait_for_windows(4)
    stop_all(*processes)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)
    assert not [process.log for process in processes if "stale" in process.log or "clock" in process.log]
