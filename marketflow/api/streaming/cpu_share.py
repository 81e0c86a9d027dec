"""Rests that hold the passes of the stream to a share of a core."""

import time
from collections.abc import Callable

SHARE = 0.3
"""CPU time of all passes at most, in cores: with what 300 ticks/s and 100 requests a second cost, one process stays
below half a core. More rarely served, each client receives the newest prices all the same."""

BURST_SECONDS = 0.01
"""What passes may be ahead of their share, as time in which it is earned. So the passes to a hundred clients, a
millisecond each, never rest at 300 ticks/s, and a tick does not wait for the rest after the one before."""


class CpuShare:
    """The rest after each pass; none while all passes together take less than SHARE.

    Args:
        monotonic: the clock of the rests, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._earned_at = 0.0  # when the share of all passes so far is earned

    def rest_after(self, cpu_seconds: float) -> float:
        """Return the seconds to rest after a pass that took this CPU time and ends now."""
        now = self._monotonic()
        self._earned_at = max(self._earned_at, now - cpu_seconds - BURST_SECONDS) + cpu_seconds / SHARE
        return max(0.0, self._earned_at - now)
