"""How long processes have waited for a core: a limit in seconds is a promise about a machine that has one for them.

Tests run several at a time on few cores. The kernel counts how long each thread was ready to run without a core; what a
thread waits for by itself, a lock, a socket or a clock, is not in it. So seconds less these waits still fail a product
that is slow, however busy the machine, and are the seconds themselves on a machine that is not.
"""

import os
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

SAMPLE_SECONDS = 0.05
"""Between two samples."""


class CoreWaits:
    """Samples how long processes wait for a core while it is entered.

    Of each group of processes, the thread counts that has waited longest since the last sample.

    Args:
        groups: of process ids; what is measured passes through one group after the other.
    """

    def __init__(self, *groups: Iterable[int]) -> None:
        self._groups = [list(group) for group in groups]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._one_at_a_time = threading.Lock()
        self._threads: dict[str, int] = {}
        self._waited = 0.0
        self._times: list[float] = []
        self._totals: list[float] = []

    @classmethod
    def of_tests(cls) -> Self:
        """Those of this process, which sends, asks and looks at the clock, and of all that it has started by now."""
        this = psutil.Process()
        return cls([this.pid, *(each.pid for each in this.children(recursive=True))])

    def sample(self) -> tuple[float, float]:
        """Note when it is, and how long the processes have waited since the first sample (s); return both."""
        with self._one_at_a_time:
            last, self._threads = self._threads, {}
            for group in self._groups:
                found = _waits(group)
                self._waited += max((ns - last.get(thread, ns) for thread, ns in found.items()), default=0) / 1e9
                self._threads |= found
            self.note(time.monotonic(), self._waited)
            return self._times[-1], self._totals[-1]

    def note(self, at: float, total: float) -> None:
        """Note a sample that another process has taken."""
        self._times.append(at)
        self._totals.append(total)

    def between(self, begin: float, end: float) -> float:
        """How long the processes have waited between two moments of the monotonic clock, by the samples around."""
        first = self._totals[max(bisect_right(self._times, begin) - 1, 0)]
        last = self._totals[min(bisect_left(self._times, end), len(self._times) - 1)]
        return min(last - first, end - begin)

    def seconds_since(self, begin: float) -> float:
        """How long it is since a moment, without the waits."""
        end, _ = self.sample()
        return end - begin - self.between(begin, end)

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(5)

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_SECONDS):
            self.sample()


def _waits(pids: Iterable[int]) -> dict[str, int]:
    """How long each present thread of some processes has waited for a core in all (ns)."""
    found = {}
    for pid in pids:
        with suppress(FileNotFoundError):  # the process has ended
            for task in os.listdir(f"/proc/{pid}/task"):
                with suppress(OSError):  # the thread has ended; and not every kernel counts this
                    found[task] = int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text().split()[1])
    return found
