"""Circuit breaker of a store: an outage costs one timeout now and then instead of one per call."""

import threading
import time
from collections.abc import Callable

from marketflow.errors import Unavailable

BREAK_SECONDS = 0.5
"""How long the circuit stays open after a failure."""


class CircuitBreaker:
    """Rejects calls for a while after a failure; thread-safe.

    Args:
        seconds: how long it stays open; then it lets one caller try.
        monotonic: the time, in seconds.
    """

    def __init__(self, seconds: float = BREAK_SECONDS, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._open_until: float | None = None

    def check(self) -> None:
        """Reject the call while the circuit is open.

        Raises:
            Unavailable: the last call failed a moment ago.
        """
        with self._lock:
            if self._open_until is None:
                return
            if self._monotonic() < self._open_until:
                raise Unavailable("unavailable a moment ago, not tried again yet")
            self._open_until = self._monotonic() + self._seconds

    def failed(self) -> None:
        """Open it."""
        with self._lock:
            self._open_until = self._monotonic() + self._seconds

    def succeeded(self) -> None:
        """Close it."""
        with self._lock:
            self._open_until = None
