"""Stops asking a store that has just failed, so that a store that is away costs one timeout now and then."""

import threading
import time
from collections.abc import Callable

from marketflow.errors import Unavailable

BREAK_SECONDS = 0.5


class CircuitBreaker:
    """Says no for a while after a failure, instead of waiting for the next timeout.

    Args:
        seconds: how long it stays open; then one caller may try again.
        monotonic: the time, in seconds.
    """

    def __init__(self, seconds: float = BREAK_SECONDS, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._open_until: float | None = None

    def check(self) -> None:
        """Let the caller pass, or not.

        Raises:
            Unavailable: the last call failed, and it is too early for the next.
        """
        with self._lock:
            if self._open_until is None:
                return
            if self._monotonic() < self._open_until:
                raise Unavailable("away a moment ago, not asked again yet")
            self._open_until = self._monotonic() + self._seconds

    def failed(self) -> None:
        """Open it."""
        with self._lock:
            self._open_until = self._monotonic() + self._seconds

    def succeeded(self) -> None:
        """Close it."""
        with self._lock:
            self._open_until = None
