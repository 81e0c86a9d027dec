"""MarketFlow with a system clock that the test sets: python -m tests.faults.stepped_clock FILE [ARGUMENTS]."""

import mmap
import struct
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import reactivex.scheduler.scheduler as rx_scheduler

from marketflow.cli.main import main


class Step:
    """How far a clock is off, in a file that the process with that clock and the one that sets it share."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 8)

    @property
    def seconds(self) -> int:
        """Seconds that the clock is ahead of the true time."""
        return int(struct.unpack("q", self._shared)[0])

    @seconds.setter
    def seconds(self, value: int) -> None:
        self._shared[:] = struct.pack("q", value)


def run(step: Step, arguments: list[str]) -> int:
    """Run MarketFlow, all of whose clocks that can be set are off by `step`; the monotonic one cannot be."""
    true_ns = time.time_ns

    def now() -> datetime:
        return datetime.fromtimestamp(time.time(), UTC)

    time.time_ns = lambda: true_ns() + step.seconds * 1_000_000_000
    time.time = lambda: time.time_ns() / 1e9
    rx_scheduler.default_now = now  # type: ignore[attr-defined]
    return main(arguments)


if __name__ == "__main__":
    sys.exit(run(Step(Path(sys.argv[1])), sys.argv[2:]))
