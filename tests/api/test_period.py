import pytest

from marketflow.api.queries.period import InvalidPeriod, parse_period

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("1s", 1_000), ("3s", 3_000), ("5s", 5_000), ("10s", 10_000), ("30s", 30_000),
        ("1m", MINUTE), ("3m", 3 * MINUTE), ("5m", 5 * MINUTE),
        ("1m30s", 90_000), ("30s1m", 90_000), ("1m1m", 2 * MINUTE),
        ("24h", DAY), ("1d2h3m4s", DAY + 2 * HOUR + 184_000),
        ("366d", 366 * DAY), ("31622400s", 366 * DAY), ("0m1s", 1_000), ("007s", 7_000),
    ],
)  # fmt: skip
def test_sum_of_whole_units_is_a_period(text: str, length: int) -> None:
    assert parse_period(text) == length


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "s", "1", "0s", "0d", "-1s", "+1s", "1.5m", "1M", "1S", "1ms", "1w", "1 m", " 1m", "1m ", "1m\n",
        "1m30", "all", "\u0663s", "\uff11m", "\u00b2s", "1e3s", "366d1s", "367d", "31622401s", "1_0s", "\x00",
        "9" * 5_000 + "s", "0" * 50_000,
    ],
)  # fmt: skip
def test_invalid_period_is_rejected(text: str) -> None:
    with pytest.raises(InvalidPeriod, match="1s to 366d"):
        parse_period(text)
