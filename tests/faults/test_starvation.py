"""Ingest processes that get no CPU for a while: all ticks that the exchanges sent meanwhile count."""

import random
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Self

import pytest

from tests.faults.conftest import RATE, WINDOW_MS, wait_for_windows, wait_until_warm
from tests.support.application import Application, ScriptedExchange, Traffic, now_ms
from tests.support.oracle import Rows, assert_rows_equal
from tests.support.roles import Roles, stop_all
from tests.support.servers import wait_until

SUSPENDED_SECONDS = 8.0
"""Longer than flow.max_clock_skew_seconds, at which a tick counts as stale, by more than a clock proves wrong in."""

SEEDS = 2

STARVED_SECONDS, FED_SECONDS = (1.0, 10.0), (0.05, 0.5)
"""Shortest and longest time that a process is suspended, and that it runs in between."""


class Starvation:
    """Suspends each process again and again for random times, until it ends."""

    def __init__(self, processes: Sequence[Application], seed: int) -> None:
        self._processes = processes
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._starve, args=(process, random.Random(f"{seed} {number}")))
            for number, process in enumerate(processes)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(10)

    def _starve(self, process: Application, rng: random.Random) -> None:
        while not self._ended.wait(rng.uniform(*FED_SECONDS)):
            process.process.send_signal(signal.SIGSTOP)
            self._ended.wait(rng.uniform(*STARVED_SECONDS))
            process.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_three_owners_starved_at_random_lose_no_tick(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows], seed: int
) -> None:
    """Leases expire, and shards are taken over by processes that are suspended next."""
    processes = [roles.ingest(), roles.ingest()]
    wait_until_warm(broadcasting)
    with Traffic(broadcasting, rate=RATE) as traffic:
        processes.append(roles.ingest())
        wait_until(processes[2].takes_ticks, 10)
        with Starvation(processes, seed):
            wait_for_windows(20)
        wait_for_windows(4)
    stop_all(*processes)
    assert_rows_equal(rows(), traffic.sent, WINDOW_MS)


@pytest.mark.parametrize("number", [1, 2])
def test_suspended_processes_drop_no_tick_as_stale(
    roles: Roles, broadcasting: list[ScriptedExchange], rows: Callable[[], Rows], number: int
) -> None:
    """All processes are suspended, so that none takes over: the ticks wait in their sockets."""
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
