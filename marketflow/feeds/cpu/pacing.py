"""Pacing of feeds that lag behind, so that an event loop in the same process answers its requests meanwhile.

Decoding and the event loop share Python's lock. A feed that floods takes as much of it as it can, and requests would
get the half of what they get without it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOOP_TIME = 4.0
"""Rest of the feeds that lag, in parts of the CPU time that the event loop used since the last rest.

More than 1, for the loop hardly runs while a chunk is decoded: with 0.75, requests got 45 % of what they get without a
flood. Not far more, for a loop that only follows Redis takes some CPU, too.
"""

LONGEST_REST = 6.0
"""Longest rest, in parts of the CPU time of the decoding before it: feeds keep a seventh of a core at least."""


class Pacing:
    """Rests for the feeds that lag behind, shared by all of them: the more the event loop does, the longer.

    Without requests there is next to no rest, and a feed that keeps up is not affected.

    Args:
        loop_seconds: returns the CPU time of the event loop's thread.
        own_seconds: returns the CPU time of the calling thread.
        monotonic: measures the rests, in seconds.
        sleep: rests.
    """

    def __init__(
        self,
        loop_seconds: Callable[[], float],
        own_seconds: Callable[[], float] = time.thread_time,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._loop_seconds = loop_seconds
        self._own_seconds = own_seconds
        self._monotonic = monotonic
        self._sleep = sleep
        self._lock = threading.Lock()
        self._loop_at = loop_seconds()
        self._rest_until = 0.0

    @classmethod
    def of_event_loop(cls) -> "Pacing | None":
        """Pacing for the event loop of this thread, which must not end before; None where its CPU time is unknown."""
        clock_of = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
        if clock_of is None:
            return None
        clock = clock_of(threading.get_ident())
        return cls(lambda: time.clock_gettime(clock))

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Decode a chunk within the context, by a feed that lags: begin when the rest that is due has ended."""
        if (seconds := self._rest_until - self._monotonic()) > 0:
            self._sleep(seconds)
        began = self._own_seconds()
        yield
        self._worked(self._own_seconds() - began)

    def _worked(self, seconds: float) -> None:
        with self._lock:
            loop_at = self._loop_seconds()
            due = min((loop_at - self._loop_at) * LOOP_TIME, seconds * LONGEST_REST)
            self._loop_at = loop_at
            self._rest_until = max(self._rest_until, self._monotonic()) + due
