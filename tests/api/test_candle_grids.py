"""Grids of candles: weeks begin on Monday, months on the 1st, UTC."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marketflow.api.queries.boundaries import DAY_MS, INTERVALS
from marketflow.api.rendering import rfc3339
from marketflow.model import MINUTE_MS
from tests.api.world import World

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
times = st.integers(4 * DAY_MS, 7_258_118_400_000)


def utc(at: int) -> datetime:
    return EPOCH + timedelta(milliseconds=at)


@given(st.sampled_from([*INTERVALS]), times)
def test_each_time_lies_in_exactly_one_candle(interval: str, at: int) -> None:
    grid = INTERVALS[interval]
    start = grid.start_of(at)
    assert start <= at < grid.end_of(start)
    assert grid.start_of(grid.end_of(start) - 1) == grid.start_of(start) == start
    assert grid.start_of(grid.end_of(start)) == grid.end_of(start)
    assert start % grid.part_ms == 0
    assert (grid.end_of(start) - start) // grid.part_ms <= grid.parts


@given(st.sampled_from([*INTERVALS]), times)
def test_next_start_is_the_first_from_a_time_on(interval: str, at: int) -> None:
    grid = INTERVALS[interval]
    start = grid.at_or_after(at)
    assert grid.start_of(start) == start >= at
    assert grid.start_of(start - 1) < at


@given(st.sampled_from(["1w", "1M"]), times, st.integers(0, 2000))
def test_starts_follow_each_other(interval: str, at: int, days: int) -> None:
    grid = INTERVALS[interval]
    since, until = grid.start_of(at), at + days * DAY_MS
    starts = [*grid.starts(since, until)]
    assert starts == sorted({grid.start_of(day) for day in range(since, until, DAY_MS)})


@given(times)
def test_weeks_begin_on_monday_and_months_on_the_first(at: int) -> None:
    week, month = utc(INTERVALS["1w"].start_of(at)), utc(INTERVALS["1M"].start_of(at))
    assert (week.weekday(), week.time()) == (0, datetime.min.time())
    assert (month.day, month.month, month.year) == (1, utc(at).month, utc(at).year)


@pytest.mark.parametrize(
    ("interval", "times"),
    [
        ("3m", ["2025-11-21T01:57", "2025-11-21T02:00"]),
        ("30m", ["2025-11-21T01:30", "2025-11-21T02:00"]),
        ("1w", ["2025-10-27T00:00", "2025-11-10T00:00", "2025-11-17T00:00"]),
        ("1M", ["2025-10-01T00:00", "2025-11-01T00:00"]),
    ],
)
def test_candles_of_long_intervals_hold_all_their_ticks(interval: str, times: list[str]) -> None:
    world = World()
    ages = [0, 60_000, *(days * DAY_MS for days in (4, 5, 6, 20, 21, 22, 25))]
    for number, age in enumerate(reversed(ages), 1):
        world.trade(float(number), age)
    answer = world.ask(f"/candles/BTCUSDT?interval={interval}&limit=1000").json()
    found = answer["candles"]
    assert [each["time"][:16] for each in found][-len(times) :] == times
    assert sum(each["ticks"] for each in found) == len(ages)
    assert [found[0]["open"], found[-1]["close"], found[-1]["closed"]] == [1.0, float(len(ages)), False]
    for limit in range(1, len(found) + 1):
        last = world.ask(f"/candles/BTCUSDT?interval={interval}&limit={limit}").json()["candles"]
        first = world.ask(f"/candles/BTCUSDT?interval={interval}&limit={limit}&from=2020-01-01").json()["candles"]
        assert (last, first) == (found[-limit:], found[:limit])


def test_kline_of_a_month_closes_at_its_end() -> None:
    world = World()
    world.trade(1.0, 25 * DAY_MS)
    ((start, *_, end, _, _, _, _, _),) = world.ask("/klines/BTCUSDT?interval=1M").json()
    assert (rfc3339(start), rfc3339(end)) == ("2025-10-01T00:00:00.000Z", "2025-10-31T23:59:59.999Z")


@pytest.mark.parametrize("time", ["9999-12-31T23:59:59Z", "99999999999999"])
def test_months_far_ahead_are_empty(time: str) -> None:
    world = World()
    world.trade(1.0, 20 * MINUTE_MS)
    for interval in ("1w", "1M"):
        assert world.ask(f"/candles/BTCUSDT?interval={interval}&from={time}").json()["candles"] == []
        assert len(world.ask(f"/candles/BTCUSDT?interval={interval}&to={time}").json()["candles"]) == 1
