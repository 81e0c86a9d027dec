from datetime import UTC, datetime

import pytest

from marketflow import time_parsing

NOW_MS = 1_795_262_400_123


def parsed(text: str) -> int:
    return time_parsing.parse_time_ms(text, NOW_MS)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-01", datetime(2026, 11, 1, tzinfo=UTC)),
        ("2026-11-01T09:30:00Z", datetime(2026, 11, 1, 9, 30, tzinfo=UTC)),
        ("2026-11-01t09:30:00z", datetime(2026, 11, 1, 9, 30, tzinfo=UTC)),
        ("2026-11-01 09:30:00.123+02:00", datetime(2026, 11, 1, 7, 30, 0, 123_000, tzinfo=UTC)),
        ("1969-12-31T23:59:59.5Z", datetime(1969, 12, 31, 23, 59, 59, 500_000, tzinfo=UTC)),
        ("9999-12-31", datetime(9999, 12, 31, tzinfo=UTC)),
    ],
)
def test_time_with_zone_or_date_is_parsed(text: str, time: datetime) -> None:
    assert parsed(text) == round(time.timestamp() * 1000)


@pytest.mark.parametrize(
    ("text", "ago_ms"),
    [("now", 0), ("-24h", 86_400_000), ("-1h30m", 5_400_000), ("-1d1s", 86_401_000), ("-0s", 0)],
)
def test_relative_time_counts_back_from_now(text: str, ago_ms: int) -> None:
    assert parsed(text) == NOW_MS - ago_ms


@pytest.mark.parametrize(
    "text",
    [
        *("", "24h", "-24", "-1w", "- 1h", "-1h ", "-99999999d", "+1h", "yesterday", "1e3", "1.5"),
        *("2026-02-30", "2026-11-01T09:30:00", "2026-11-01T25:00:00Z", "0001-01-01T00:00:00+01:00", "20261101"),
        *("٢٠٢٦-11-01", "2026-11-01T09:30:00Z\n"),
    ],
)
def test_invalid_time_is_rejected_with_allowed_forms(text: str) -> None:
    with pytest.raises(ValueError, match="must be a time such as 2026-11-01T09:30:00Z, a date"):
        parsed(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1795262400", "1795262400 looks like Unix seconds: 1795262400000 is meant"),
        ("1795262400123456", "looks like Unix microseconds: 1795262400123 is meant"),
        ("1795262400123456789", "looks like Unix nanoseconds: 1795262400123 is meant"),
    ],
)
def test_unix_time_in_another_unit_suggests_milliseconds(text: str, meant: str) -> None:
    with pytest.raises(ValueError, match=meant):
        parsed(text)


@pytest.mark.parametrize(("text", "at"), [("1795262400123", 1795262400123), ("0", 0), ("00001", 1)])
def test_unix_milliseconds_are_parsed(text: str, at: int) -> None:
    assert parsed(text) == at


@pytest.mark.parametrize("text", ["0" * 4400 + "1", "9" * 5000, "-" + "1s" * 5000, "-" + "9" * 5000 + "s"])
def test_overlong_times_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match="must be a time such as"):
        parsed(text)
