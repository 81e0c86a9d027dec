"""How much of the machine's cores processes use."""

import time
from collections.abc import Mapping
from typing import Self

import psutil


class Cores:
    """CPU that groups of processes, children included, use within the block: `used` has it in cores by name.

    Args:
        processes: the first process of each group, by the name of the group.
    """

    def __init__(self, processes: Mapping[str, int]) -> None:
        self._processes = processes
        self.used: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._before = {name: _seconds(pid) for name, pid in self._processes.items()}
        return self

    def __exit__(self, *_: object) -> None:
        elapsed = time.monotonic() - self._began
        for name, pid in self._processes.items():
            self.used[name] = max(0.0, _seconds(pid) - self._before[name]) / elapsed


def _seconds(pid: int) -> float:
    first = psutil.Process(pid)
    total = 0.0
    for process in (first, *first.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
