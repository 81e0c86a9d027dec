"""The moments between which rows are asked for, as a person types them."""

import re
from datetime import UTC, date, datetime, timedelta

from marketflow.clock import milliseconds, system_clock

_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_TERM = r"([0-9]{1,9})([smhd])"
_AGO = re.compile(f"-(?:{_TERM})+")
_DAY = re.compile(r"\d{4}-\d\d-\d\d", re.ASCII)
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

ALLOWED = "must be a time such as 2026-11-01T09:30:00Z, a date (its midnight, UTC), now, or -24h (a sum of s, m, h, d)"


def moment_ms(text: str) -> int:
    """A moment in Unix ms.

    Raises:
        ValueError: it is none; the text says what is allowed.
    """
    try:
        return _moment_ms(text)
    except (ValueError, OverflowError):  # no such day, or one before the year 1
        raise ValueError(ALLOWED) from None


def _moment_ms(text: str) -> int:
    if text == "now" or _AGO.fullmatch(text):
        ago = sum(int(number) * _UNIT_MS[unit] for number, unit in re.findall(_TERM, text))
        return _unix_ms(_EPOCH + timedelta(milliseconds=milliseconds(system_clock()) - ago))
    if _DAY.fullmatch(text):
        day = date.fromisoformat(text)
        return _unix_ms(datetime(day.year, day.month, day.day, tzinfo=UTC))
    if _RFC3339.fullmatch(text):
        return _unix_ms(datetime.fromisoformat(text.upper()).astimezone(UTC))
    raise ValueError


def _unix_ms(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(milliseconds=1)
