"""Rate limit of a repeated log record."""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from loguru import logger


class RateLimit:
    """Logs a repeated fault at most once per interval and key.

    Lives as long as its source of faults. Thread-safe. Keeps the 1,024 keys that were logged last, so that keys from
    clients cannot make it grow.
    """

    KEYS = 1024

    def __init__(self, seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen: OrderedDict[Hashable, tuple[float, int]] = OrderedDict()  # time of the last record, omitted since

    def log(self, key: Hashable, level: str, message: str, /, **extra: object) -> bool:
        """Log, unless `key` was logged within the interval. Returns whether it was logged.

        The text has the number of records omitted since the last one: `... (3 more in the meantime)`.
        """
        omitted = self.admit(key)
        if omitted is None:
            return False
        logger.opt(depth=1).bind(**extra).log(level, message + omitted_text(omitted))
        return True

    def log_bug(self, event: str, error: Exception, key: Hashable = None) -> None:
        """Log an exception that is a bug, with its traceback, unless `key`, or else the event, was logged just now."""
        if (omitted := self.admit(key or event)) is not None:
            logger.opt(depth=1, exception=error).error(f"{event}, which is a bug{omitted_text(omitted)}")

    def admit(self, key: Hashable) -> int | None:
        """Return the number of records omitted since the last one; None if this one is to be omitted, too."""
        now = self._monotonic()
        with self._lock:
            logged_at, omitted = self._seen.get(key, (-math.inf, 0))
            if now - logged_at < self._seconds:
                self._seen[key] = (logged_at, omitted + 1)
                return None
            self._seen[key] = (now, 0)
            self._seen.move_to_end(key)
            if len(self._seen) > self.KEYS:
                self._seen.popitem(last=False)
        return omitted


def omitted_text(count: int) -> str:
    """Return the end of a message that stands for omitted ones; empty for none."""
    return f" ({count} more in the meantime)" if count else ""
