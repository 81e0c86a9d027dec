"""What a venue allows to this address: how many connections may be begun, and what its refusals ask for."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

_MEANINGS: dict[int, tuple[str, float]] = {
    403: ("refused by the venue for this address or location", 300.0),
    418: ("this address is banned by the venue for asking too often", 120.0),
    429: ("the venue is asked too often from this address", 30.0),
    451: ("refused by the venue for this location", 300.0),
}
"""By status: in words, and the seconds before the next attempt where the venue does not say them."""

MAX_PAUSE_SECONDS = 3600.0


class VenueRefusal(OSError):
    """The venue answered with a status that means no.

    Args:
        status: the HTTP status.
        text: what it means.
        pause_seconds: how long to wait before the next attempt; 0 where the usual pause will do.
    """

    def __init__(self, status: int, text: str, pause_seconds: float) -> None:
        super().__init__(f"{status}: {text}")
        self.status = status
        self.text = text
        self.pause_seconds = pause_seconds


def refusal_of(
    status: int, headers: Mapping[str, str], said: str = "", now: Callable[[], float] = time.time
) -> VenueRefusal:
    """The refusal that a status and its headers are, with the venue's words; Retry-After is obeyed up to an hour.

    Args:
        status: of HTTP.
        headers: of the answer, found in any case.
        said: by the venue.
        now: Unix seconds, where the answer does not say the venue's time.
    """
    text, pause = _MEANINGS.get(status, ("the venue cannot answer" if status >= 500 else "refused by the venue", 0.0))
    if (asked := _retry_after(headers, now)) is not None:
        pause = max(pause if status == 418 else 0.0, min(asked, MAX_PAUSE_SECONDS))
    return VenueRefusal(status, f"{text}: {said}" if said else text, pause)


def http_date(text: str) -> float | None:
    """A date in one of the three forms of HTTP as Unix seconds; None if it is none."""
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _retry_after(headers: Mapping[str, str], now: Callable[[], float]) -> float | None:
    """The seconds to wait: said as such, or as the date until when."""
    asked = headers.get("Retry-After", "")
    if asked.isascii() and asked.isdigit():
        return float(asked)
    if (until := http_date(asked)) is None:
        return None
    began = http_date(headers.get("Date", ""))
    return max(0.0, until - (now() if began is None else began))


class AttemptBudget:
    """At most `attempts` in any `seconds`; shared by all feeds of a venue, safe between threads.

    Args:
        attempts, seconds: the limit; attempts, or the weight of calls.
        monotonic: the time in seconds.
    """

    def __init__(self, attempts: int, seconds: float, monotonic: Callable[[], float]) -> None:
        self._attempts, self._seconds, self._monotonic = attempts, seconds, monotonic
        self._begun: deque[float] = deque()
        self._lock = threading.Lock()

    @property
    def limit(self) -> int:
        """How many attempts may be begun in `seconds`."""
        return self._attempts

    @property
    def seconds(self) -> float:
        """The length of the window."""
        return self._seconds

    @property
    def used(self) -> int:
        """How many were begun in the last `seconds`."""
        with self._lock:
            now = self._monotonic()
            return sum(now - self._seconds < begun <= now for begun in self._begun)

    def take(self, weight: int = 1) -> float:
        """Take attempts; gives the seconds to wait before them, 0 where they may begin now.

        Args:
            weight: how many; more than the limit count as the limit.
        """
        with self._lock:
            now = self._monotonic()
            while self._begun and self._begun[0] <= now - self._seconds:
                self._begun.popleft()
            weight = min(weight, self._attempts)
            others = self._attempts - weight + 1  # more than these taken before leave too few
            wait = max(0.0, self._begun[-others] + self._seconds - now) if len(self._begun) >= others else 0.0
            self._begun.extend([now + wait] * weight)
            return wait
