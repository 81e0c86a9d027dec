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

MOST_WAITED = 0.75
"""Share of measured seconds that may be waits. On a machine that is so busy some process always waits, and which one
holds up what is measured is not known: four times the limit is too long however busy it is."""


class CoreWaits:
    """Samples how long processes wait for a core while it is entered.

    Of each group of processes, a moment counts in which any thread waited, once however many did.

    Args:
        groups: of process ids; what is measured passes through one group after the other.
    """

    def __init__(self, *groups: Iterable[int]) -> None:
        self._groups = [list(group) for group in groups]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._one_at_a_time = threading.Lock()
        self._threads: dict[str, int] = {}
        self._times: list[float] = []
        self._waited: list[list[float]] = []  # of each group since the sample before (s)

    @classmethod
    def of_tests(cls) -> Self:
        """Those of this process, which sends, asks and looks at the clock, and of all that it has started by now."""
        this = psutil.Process()
        return cls([this.pid, *(each.pid for each in this.children(recursive=True))])

    def sample(self) -> tuple[float, list[float]]:
        """Note when it is, and the longest wait of each group that has ended since the last sample (s); return both."""
        with self._one_at_a_time:
            last, self._threads = self._threads, {}
            longest = []
            for group in self._groups:
                found = _waits(group)
                longest.append(max((ns - last.get(thread, ns) for thread, ns in found.items()), default=0) / 1e9)
                self._threads |= found
            now = time.monotonic()
            self.note(now, longest)
            return now, longest

    def note(self, at: float, longest: list[float]) -> None:
        """Note a sample, which another process may have taken.

        The kernel counts a wait when it ends: one that is longer than the time since the last sample was there before.
        """
        self._times.append(at)
        self._waited.append([0.0] * len(longest))
        for group, left in enumerate(longest):
            for sample in range(len(self._times) - 1, 0, -1):
                if left <= 0:
                    break
                seconds = self._times[sample] - self._times[sample - 1]
                waited = self._waited[sample]
                waited[group] = max(waited[group], min(left, seconds))
                left -= seconds

    def between(self, begin: float, end: float) -> float:
        """How long the processes have waited between two moments of the monotonic clock, by the samples around."""
        first = max(bisect_right(self._times, begin) - 1, 0)
        last = min(bisect_left(self._times, end), len(self._times) - 1)
        waited = 0.0
        for sample in range(first + 1, last + 1):
            waited += min(sum(self._waited[sample]), self._times[sample] - self._times[sample - 1])
        return min(waited, end - begin)

    def seconds_since(self, begin: float) -> float:
        """How long it is since a moment, without the waits, up to MOST_WAITED of it."""
        end, _ = self.sample()
        return end - begin - min(self.between(begin, end), MOST_WAITED * (end - begin))

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
