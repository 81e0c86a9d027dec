"""Dates ticks: by the timestamp of the exchange, converted where its unit is another one, or by the time of receipt.

A timestamp further off than the allowed skew is dropped, since exchanges repeat old trades on connecting. Two things
that look like that are faults of the whole feed, and its ticks are kept: a clock that is wrong, and another unit.
"""

from collections.abc import Callable
from enum import StrEnum
from typing import Literal

from marketflow.model import SECOND_MS

WRONG_TICKS = 20
"""So many ticks in a row must be off by the same amount before the clock of their feed counts as wrong."""

WRONG_MS = 2 * SECOND_MS
"""And they must have taken so long: old trades come at once."""


class Unit(StrEnum):
    """What the timestamps of a feed count."""

    SECONDS = "seconds"
    MILLISECONDS = "milliseconds"
    MICROSECONDS = "microseconds"
    NANOSECONDS = "nanoseconds"


OffTime = Literal["stale", "ahead"]
"""Why a timestamp is dropped: too far behind the clock of this machine, or ahead of it."""


def unit_of(timestamp: float) -> Unit | None:
    """The unit of a Unix time between 1973 and 5138 by its magnitude, None where it is no such time."""
    if 1e8 <= timestamp < 1e11:
        return Unit.SECONDS
    if 1e11 <= timestamp < 1e14:
        return Unit.MILLISECONDS
    if 1e14 <= timestamp < 1e17:
        return Unit.MICROSECONDS
    return Unit.NANOSECONDS if 1e17 <= timestamp < 1e20 else None


def in_milliseconds(timestamp: float, unit: Unit | None) -> int:
    """A timestamp in whole Unix ms; fractions of a millisecond are cut."""
    match unit:
        case Unit.SECONDS:
            # A float holds such a time to 0.2 us, so that .123 may have become .12299999.
            return int(round(timestamp * 1000, 2))
        case Unit.MICROSECONDS:
            return int(timestamp) // 1000
        case Unit.NANOSECONDS:
            return int(timestamp) // 1_000_000
    return int(timestamp)


class TimestampCheck:
    """Decides at which event time the ticks of one feed are dated.

    Used by one thread at a time; `offset_ms` may be read by any.

    Args:
        max_skew_ms: how far a timestamp may be from the clock of this machine.
        on_change: gets a sentence when the unit or the clock of the feed turns out to be another.
    """

    def __init__(self, max_skew_ms: int, on_change: Callable[[str], None]) -> None:
        self._max_skew_ms = max_skew_ms
        self._on_change = on_change
        self._unit: Unit | None = None  # unknown
        self._converted: set[Unit] = set()
        self._run: _Run | None = None
        self.offset_ms = 0
        """How far the clock of the feed is ahead of that of this machine, 0 while it is within the allowed skew."""

    @property
    def usual(self) -> bool:
        """Whether timestamps within the allowed skew are all that is to be expected, in milliseconds."""
        return not self.offset_ms and (self._unit is None or self._unit is Unit.MILLISECONDS)

    @property
    def settled(self) -> bool:
        """Whether `confirm` would change nothing."""
        return self._unit is Unit.MILLISECONDS and self._run is None and not self.offset_ms

    def confirm(self) -> None:
        """Take notice that timestamps came that are right, in milliseconds."""
        self._accept(Unit.MILLISECONDS, 0)

    def date(self, timestamp: float, received_at: int) -> int | OffTime:
        """The event time (Unix ms) of a tick, or why it is dropped. To be called in the order of arrival.

        Args:
            timestamp: as the exchange sent it.
            received_at: the time of receipt (Unix ms).
        """
        at = int(timestamp)
        if abs(at - received_at) <= self._max_skew_ms:
            self.confirm()
            return at
        unit = unit_of(timestamp) or Unit.MILLISECONDS
        at = in_milliseconds(timestamp, unit)
        offset = at - received_at
        if self._unit is None or unit is self._unit:
            if abs(offset) <= self._max_skew_ms:
                self._accept(unit, 0)
                return at
            if self.offset_ms and self._is_expected(offset):
                self._run = None
                return received_at
        if self._is_wrong(unit, at, received_at):
            self._accept(unit, offset)
            return received_at if self.offset_ms else at
        expected = in_milliseconds(timestamp, self._unit or unit) - self.offset_ms
        return "stale" if expected < received_at else "ahead"

    def _is_expected(self, offset: int) -> bool:
        """Whether an offset is that of the wrong clock; follows a clock that drifts."""
        if abs(offset - self.offset_ms) > self._max_skew_ms:
            return False
        if abs(offset - self.offset_ms) > self._max_skew_ms / 2:
            self.offset_ms = offset
        return True

    def _is_wrong(self, unit: Unit, at: int, received_at: int) -> bool:
        """Whether this tick is the last of so many in a row that the clock or the unit of the feed must be wrong."""
        run = self._run
        if run is None or not run.take(unit, at, received_at, self._max_skew_ms):
            run = self._run = _Run(unit, at, received_at)
        return run.is_conclusive

    def _accept(self, unit: Unit, offset: int) -> None:
        self._run = None
        offset = offset if abs(offset) > self._max_skew_ms else 0
        if unit is not self._unit:
            self._unit = unit
            if unit is not Unit.MILLISECONDS and unit not in self._converted:
                self._converted.add(unit)
                self._on_change(f"timestamps are in {unit}, they are converted to milliseconds")
        if offset != self.offset_ms:
            self.offset_ms = offset
            self._on_change(_clock_text(offset))


def _clock_text(offset_ms: int) -> str:
    if not offset_ms:
        return "the clock of the exchange is right again"
    side = "ahead of" if offset_ms > 0 else "behind"
    seconds = abs(offset_ms) / SECOND_MS
    return f"the clock of the exchange is {seconds:.1f} s {side} this machine's, its ticks are dated by receipt"


class _Run:
    """Ticks in a row that are all too far off, by the same amount as far as the allowed skew allows."""

    def __init__(self, unit: Unit, at: int, received_at: int) -> None:
        self._unit = unit
        self._ticks = 1
        self._began = self._last = received_at
        self._oldest = self._newest = at
        self._least = self._greatest = at - received_at

    def take(self, unit: Unit, at: int, received_at: int, max_skew_ms: int) -> bool:
        """Add a tick, unless it is off by another amount."""
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
        """Whether there are enough of them, for long enough.

        A clock that is wrong goes on all the same. A price that is repeated with the timestamp of its last trade, in a
        quiet market, says nothing about the clock.
        """
        took = self._last - self._began
        return self._ticks >= WRONG_TICKS and took >= WRONG_MS and 2 * (self._newest - self._oldest) >= took
