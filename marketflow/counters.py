"""What the process that takes ticks has counted since its start, in the form in which other processes read it."""

import threading
from bisect import bisect_left
from collections.abc import Iterable

import msgspec

DELAY_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""In seconds: from what a partition takes with nothing to do up to an outage."""


class Delays(msgspec.Struct, frozen=True):
    """A histogram: how many delays were at most each of `bounds` (seconds) and above the one before.

    One more count than bounds is for what was longer than all of them; `total` is the sum in seconds.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class ExchangeCounters(msgspec.Struct, frozen=True):
    """One exchange, in both modes together. `last_tick_at` is the Unix ms of receipt, in the mode that runs alone."""

    ticks: int
    rejected: dict[str, int]
    timestamps_replaced: int
    reconnects: int
    last_tick_at: int | None


class IngestCounters(msgspec.Struct, frozen=True):
    """All of it; `exchanges` is by exchange name."""

    exchanges: dict[str, ExchangeCounters]
    tick_to_cache: Delays
    ticks_too_late: int
    cache_errors: int
    archive_errors: int
    rows_written: int
    rows_refused: int
    rows_pending: int
    rows_dropped: int
    given_up: int
    stalls: dict[str, int] = {}
    """How often branches of the flow have stalled, by name."""


class DelayCounter:
    """Counts delays, for any number of threads."""

    def __init__(self, bounds: tuple[float, ...] = DELAY_BOUNDS) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0
        self._lock = threading.Lock()

    def count(self, delays: Iterable[float]) -> None:
        """Count delays (seconds); one that is negative, by a clock that was set back, was none."""
        with self._lock:
            for delay in delays:
                self._counts[bisect_left(self._bounds, delay)] += 1
                self._total += max(delay, 0.0)

    def so_far(self) -> Delays:
        """The histogram."""
        with self._lock:
            return Delays(self._bounds, tuple(self._counts), self._total)
