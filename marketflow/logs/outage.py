"""Log lines of an outage."""

import math
import threading
import time
from collections.abc import Callable

from loguru import logger

from marketflow.logs.rate_limit import omitted_text


class Outage:
    """Logs the beginning of an outage, reminders while it lasts, and its end with its duration.

    Several users of a store may fail; the outage ends when none of them fails any more. Of repeated outages one is
    logged per interval, and the others are counted. Thread-safe.

    Args:
        began: the text at its beginning, "X cannot be used".
        ended: the text at its end.
        reminder_seconds: interval of the reminders.
        repeat_seconds: least time between a line and the beginning of another outage.
        monotonic: clock of the duration, in seconds.
    """

    def __init__(
        self,
        began: str,
        ended: str,
        reminder_seconds: float = 600.0,
        monotonic: Callable[[], float] = time.monotonic,
        repeat_seconds: float = 10.0,
    ) -> None:
        self._texts = began, ended
        self._repeat_seconds = repeat_seconds
        self._reminder_seconds = reminder_seconds
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._failing: set[str] = set()
        self._began = 0.0
        self._logged = -math.inf
        self._is_logged = False  # whether this outage has a line in the log
        self._omitted = 0  # outages since the last line

    def failed(self, by: str, text: str) -> bool:
        """Record a failure of the user `by`, and log `text` unless it is omitted. Returns whether it was logged."""
        now = self._monotonic()
        with self._lock:
            if not self._failing:
                self._began, self._is_logged = now, False
                self._omitted += 1
            self._failing.add(by)
            if now - self._logged < (self._reminder_seconds if self._is_logged else self._repeat_seconds):
                return False
            omitted = 0 if self._is_logged else self._omitted - 1
            self._logged, self._is_logged, self._omitted = now, True, 0
            lasted = now - self._began
        since = f" (for {lasted:.0f} s now)" if lasted else ""
        logger.opt(depth=1).warning(f"{self._texts[0]}{since}, {text}{omitted_text(omitted)}")
        return True

    def over(self, by: str, for_all: bool = False) -> None:
        """Record a success of the user `by`, or of all users with `for_all`."""
        if not self._failing:  # nearly always
            return
        with self._lock:
            if by not in self._failing and not for_all:
                return
            self._failing = set() if for_all else self._failing - {by}
            if self._failing or not self._is_logged:
                return
            lasted = self._monotonic() - self._began
        logger.opt(depth=1).info(f"{self._texts[1]}, after {lasted:.1f} s")
