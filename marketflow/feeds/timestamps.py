"""Event time of ticks: the timestamp of the exchange, in milliseconds, or the time of receipt if its clock is wrong.

A tick whose timestamp is off by more than the allowed skew is rejected: exchanges repeat old trades on connecting. Time
that a tick has waited in this machine before it was read does not count as skew.
If all ticks of a feed are off, by a wrong clock or another unit, they are kept. A venue's clock counts as right: up to
OWN_TIME_MS apart, its trades keep their own time, since the venue makes its candles by that.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Literal

from marketflow.model import SECOND_MS

WRONG_TICKS = 20
"""Number of ticks in a row, off by the same amount, after which the clock of a feed counts as wrong."""

WRONG_MS = 2 * SECOND_MS
"""Time that these ticks must span at least (ms): old trades arrive all at once."""

OWN_TIME_MS = 50 * SECOND_MS
"""How far this machine's clock may be off while trades of a venue keep their time; minutes ahead are not closed."""


class Unit(StrEnum):
    """Unit of the timestamps of a feed."""

    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"


OffTime = Literal["stale", "ahead", "bad_time"]
"""Why a timestamp is rejected: too far behind the clock of this machine, ahead of it, or in another unit than the
protocol's."""


def unit_of(timestamp: float) -> Unit | None:
    """Return the unit of a Unix time between 1973 and 5138 by its magnitude, None for other numbers."""
    if 1e8 <= timestamp < 1e11:
        return Unit.SECONDS
    if 1e11 <= timestamp < 1e14:
        return Unit.MILLISECONDS
    if 1e14 <= timestamp < 1e17:
        return Unit.MICROSECONDS
    return Unit.NANOSECONDS if 1e17 <= timestamp < 1e20 else None


def in_milliseconds(timestamp: float, unit: Unit | None) -> int:
    """Convert a timestamp to whole Unix ms, truncated."""
    match unit:
        case Unit.SECONDS:
            # A float has a resolution of 0.2 us here, so that .123 may be .12299999.
            return int(round(timestamp * 1000, 2))
        case Unit.MICROSECONDS:
            return int(timestamp) // 1000
        case Unit.NANOSECONDS:
            return int(timestamp) // 1_000_000
    return int(timestamp)


class TimestampCheck:
    """Determines the event time of the ticks of one feed.

    For one thread at a time; any may read `offset_ms`.

    Args:
        max_skew_ms: how far a timestamp may be from the clock of this machine.
        on_change: called with a sentence when the unit or the clock of the feed changes.
        milliseconds_only: whether the protocol says milliseconds, so that another unit is an error of the feed.
    """

    def __init__(self, max_skew_ms: int, on_change: Callable[[str], None], milliseconds_only: bool = False) -> None:
        self._max_skew_ms = max_skew_ms
        self._milliseconds_only = milliseconds_only
        self._on_change = on_change
        self._unit: Unit | None = None  # unknown
        self._converted: set[Unit] = set()
        self._streak: _Streak | None = None
        self.offset_ms = 0
        """How far the clock of the feed is ahead of this machine's, 0 within the allowed skew."""

    @property
    def usual(self) -> bool:
        """Whether timestamps are expected in milliseconds and within the allowed skew."""
        return not self.offset_ms and (self._unit is None or self._unit is Unit.MILLISECONDS)

    @property
    def by_receipt(self) -> bool:
        """Whether ticks are dated by receipt, because the clock of the feed is wrong."""
        return self.offset_ms != 0 and not (self._milliseconds_only and abs(self.offset_ms) <= OWN_TIME_MS)

    @property
    def settled(self) -> bool:
        """Whether `confirm` would change nothing."""
        return self._unit is Unit.MILLISECONDS and self._streak is None and not self.offset_ms

    def confirm(self) -> None:
        """Note that a timestamp was right, in milliseconds."""
        self._accept(Unit.MILLISECONDS, 0)

    def date(self, timestamp: float, received_at: int, waited_ms: int = 0) -> int | OffTime:
        """Return the event time (Unix ms) of a tick, or why it is rejected. Call in the order of arrival.

        Args:
            timestamp: as the exchange sent it.
            received_at: the time of receipt (Unix ms).
            waited_ms: how long before that it has waited in this machine.
        """
        at = int(timestamp)
        if abs(at - received_at) <= self._max_skew_ms:
            self.confirm()
            return at
        if self._milliseconds_only and unit_of(timestamp) is not Unit.MILLISECONDS:
            return "bad_time"
        unit = unit_of(timestamp) or Unit.MILLISECONDS
        at = in_milliseconds(timestamp, unit)
        offset = at - received_at
        if self._unit is None or unit is self._unit:
            if abs(offset) <= self._max_skew_ms:
                self._accept(unit, 0)
                return at
            if self.offset_ms and self._is_expected(offset):
                self._streak = None
                return received_at if self.by_receipt else at
            if not self.offset_ms and -waited_ms - self._max_skew_ms <= offset < 0:
                return at  # it proves nothing about the clock
        if self._is_wrong(unit, at, received_at):
            self._accept(unit, offset)
            return received_at if self.by_receipt else at
        expected = in_milliseconds(timestamp, self._unit or unit) - self.offset_ms
        return "stale" if expected < received_at else "ahead"

    def _is_expected(self, offset: int) -> bool:
        """Whether an offset is that of the wrong clock; adapts to a clock that drifts."""
        if abs(offset - self.offset_ms) > self._max_skew_ms:
            return False
        if abs(offset - self.offset_ms) > self._max_skew_ms / 2:
            self.offset_ms = offset
        return True

    def _is_wrong(self, unit: Unit, at: int, received_at: int) -> bool:
        """Whether, with this tick, enough in a row are off for the clock or the unit of the feed to be wrong."""
        streak = self._streak
        if streak is None or not streak.add(unit, at, received_at, self._max_skew_ms):
            streak = self._streak = _Streak(unit, at, received_at)
        return streak.is_conclusive

    def _accept(self, unit: Unit, offset: int) -> None:
        self._streak = None
        offset = offset if abs(offset) > self._max_skew_ms else 0
        if unit is not self._unit:
            self._unit = unit
            if unit is not Unit.MILLISECONDS and unit not in self._converted:
                self._converted.add(unit)
                self._on_change(f"timestamps are in {unit}, they are converted to milliseconds")
        if offset != self.offset_ms:
            self.offset_ms = offset
            self._on_change(_clock_text(offset, self.by_receipt))


def _clock_text(offset_ms: int, by_receipt: bool) -> str:
    if not offset_ms:
        return "the clock of the exchange is right again"
    side = "ahead of" if offset_ms > 0 else "behind"
    seconds = abs(offset_ms) / SECOND_MS
    dated = "dated by receipt" if by_receipt else "dated by it"
    return f"the clock of the exchange is {seconds:.1f} s {side} this machine's, its ticks are {dated}"


class _Streak:
    """Ticks in a row that are off by the same amount, to within the allowed skew."""

    def __init__(self, unit: Unit, at: int, received_at: int) -> None:
        self._unit = unit
        self._ticks = 1
        self._began = self._last = received_at
        self._oldest = self._newest = at
        self._least = self._greatest = at - received_at

    def add(self, unit: Unit, at: int, received_at: int, max_skew_ms: int) -> bool:
        """Add a tick; return False if it is off by another amount."""
        offset = at - received_at
        least, greatest = min(self._least, offset), max(self._greatest, offset)
        if unit is not self._unit or greatest - least > max_skew_ms:
            return False
        self._least, self._greatest = least, greatest
        self._oldest, self._newest = min(self._oldest, at), max(self._newest, at)
        self._last = received_at
        self._ticks += 1
        return True

    @property
    def is_conclusive(self) -> bool:
        """Whether these ticks prove that the clock is wrong: enough of them, over enough time.

        Their timestamps must advance, as those of a wrong clock do. In a quiet market an exchange may repeat a price
        with the timestamp of its last trade, which proves nothing.
        """
        took = self._last - self._began
        return self._ticks >= WRONG_TICKS and took >= WRONG_MS and 2 * (self._newest - self._oldest) >= took
