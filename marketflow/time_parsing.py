"""Parses times and durations: RFC 3339, a date, Unix ms, `now`, `-24h`; `1m30s`."""

import re
from datetime import UTC, date, datetime, timedelta

_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_TERM = re.compile(r"0*([0-9]{1,9})([smhd])")

# The bounds limit the work of int() on long digits.
UNIX_MS = r"[0-9]{1,19}"
RFC_3339 = r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
DAY = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
RELATIVE = r"now|-([0-9]{1,9}[smhd]){1,4}"
PATTERN = f"({RELATIVE}|{DAY}|{RFC_3339}|{UNIX_MS})"
"""Pattern of a time; whether the day exists is checked apart."""

ALLOWED = (
    "must be a time such as 2026-11-01T09:30:00Z, a date (its midnight, UTC), now, -24h (a sum of s, m, h, d),"
    " or Unix milliseconds"
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)

_YEAR_1 = (datetime(1, 1, 1, tzinfo=UTC) - _EPOCH) // _MILLISECOND

_SECONDS, _MILLISECONDS, _MICROSECONDS = 10**8, 10**11, 10**14
"""From these numbers on a Unix time is one in seconds (1973), in ms (1973) and in microseconds (5138)."""


def duration_ms(text: str) -> int:
    """Return a sum of whole `s`, `m`, `h` and `d` in ms; whether the text is such a sum is checked apart."""
    return sum(int(number) * _UNIT_MS[unit] for number, unit in _TERM.findall(text))


def is_relative(text: str) -> bool:
    """Return whether a time is relative to now."""
    return re.fullmatch(RELATIVE, text) is not None


def parse_time_ms(text: str, now_ms: int) -> int:
    """Parse a time to Unix ms, rounded up.

    Args:
        text: the time.
        now_ms: the current time (Unix ms).

    Raises:
        ValueError: it is not a time; the message says what is allowed or what was probably meant.
    """
    try:
        found = _time_ms(text, now_ms)
    except (ValueError, OverflowError):  # the day does not exist, or lies before the year 1
        raise ValueError(ALLOWED) from None
    if found is None:
        raise ValueError(_in_another_unit(text))
    if found < _YEAR_1:
        raise ValueError(ALLOWED)
    return found


def _time_ms(text: str, now_ms: int) -> int | None:
    """Return the time, or None for a number in another unit."""
    if is_relative(text):
        return now_ms - duration_ms(text)
    if re.fullmatch(UNIX_MS, text) and not re.fullmatch("(19|20)[0-9]{6}", text):  # eight such digits are a date
        number = int(text)
        return number if number < _SECONDS or _MILLISECONDS <= number < _MICROSECONDS else None
    if re.fullmatch(DAY, text):
        day = date.fromisoformat(text)
        return _unix_ms(datetime(day.year, day.month, day.day, tzinfo=UTC))
    if re.fullmatch(RFC_3339, text):
        # Python cuts off digits beyond microseconds.
        return _unix_ms(datetime.fromisoformat(text.upper()))
    raise ValueError


def _in_another_unit(text: str) -> str:
    number = int(text)
    if number < _MILLISECONDS:
        unit, meant = "seconds", number * 1000
    elif number < _MICROSECONDS * 1000:
        unit, meant = "microseconds", number // 1000
    else:
        unit, meant = "nanoseconds", number // 1_000_000
    return f"is in milliseconds, and {number} looks like Unix {unit}: {meant} is meant"


def _unix_ms(time: datetime) -> int:
    """Return Unix ms, rounded up."""
    return -((_EPOCH - time) // _MILLISECOND)
