"""Wall-clock time; passed as an argument, so that tests run in virtual time."""

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns the current time in nanoseconds since the Unix epoch."""

NANOSECONDS_PER_MS = 1_000_000


def system_clock() -> int:
    """The clock of this machine, in Unix nanoseconds."""
    return time.time_ns()


def milliseconds(nanoseconds: int) -> int:
    """Whole Unix milliseconds of a time in Unix nanoseconds."""
    return nanoseconds // NANOSECONDS_PER_MS
