"""Which candles are equal to the venue's own."""

from typing import Any

import msgspec
import pytest

from marketflow.feeds.backfill.comparison import difference_text, differences
from marketflow.feeds.backfill.minute_candle import minute_candle
from marketflow.feeds.backfill.venue_candles import venue_minute
from marketflow.feeds.venues.venue import Trade, VenueCandle
from marketflow.model import Amounts, Candle, VenueValues, candle_of, merge_all
from marketflow.model import Tick as TickOf
from tests.support.market import MINUTE

OURS = Candle(
    *(10.0, 12.0, 9.0, 11.0, 42.0, 4, MINUTE, MINUTE + 9, MINUTE + 1, MINUTE + 2, 1, 2),
    amounts=Amounts(3.25, 34.125, 1.0, 10.0),
)
THEIRS = VenueValues(10.0, 12.0, 9.0, 11.0, 3.25, 34.125, 4)


def changed(**values: Any) -> VenueValues:
    return msgspec.structs.replace(THEIRS, **values)


def test_equal_candles_do_not_differ() -> None:
    assert differences(OURS, THEIRS) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("open", 10.01), ("high", 12.01), ("low", 8.99), ("close", 11.01), ("close", 11.000000001)),
        *(("volume", 6.25), ("volume", 3.25000001), ("turnover", 34.2), ("ticks", 5)),
    ],
)
def test_each_difference_is_named(name: str, value: float) -> None:
    theirs = changed(**{name: value})
    assert differences(OURS, theirs) == [name]
    assert difference_text(OURS, theirs, [name]) == f"{name} {getattr(THEIRS, name)} instead of {value}"


def test_what_the_venue_does_not_say_is_not_compared() -> None:
    assert differences(OURS, changed(volume=None, turnover=None, ticks=None)) == []
    without = msgspec.structs.replace(OURS, amounts=None)
    assert differences(without, changed(volume=99.0)) == []
    unknown = msgspec.structs.replace(OURS, amounts=Amounts(3.25, None, None, None))
    assert differences(unknown, changed(turnover=99.0)) == []


def test_rounding_of_each_trade_is_no_difference() -> None:
    assert differences(OURS, changed(volume=3.250000004, turnover=34.12500002)) == []
    assert differences(OURS, changed(turnover=34.12500004)) == ["turnover"]


def test_large_sums_of_cheap_coins_are_equal_to_their_digits() -> None:
    trades = [Trade("SHIB", 0.000005123, 12_345_678.12345678, MINUTE + n, n, "buy") for n in range(5_000)]
    at_once = minute_candle(trades)
    parts = ({0: minute_candle([each])} for each in trades)
    one_by_one = merge_all(parts)[0]
    volume, turnover = at_once.amounts.volume, at_once.amounts.turnover  # type: ignore[union-attr]
    theirs = VenueValues(0.000005123, 0.000005123, 0.000005123, 0.000005123, volume, turnover, 5_000)
    assert differences(one_by_one, theirs) == []
    lost = merge_all({0: minute_candle([each])} for each in trades[1:])[0]
    assert differences(lost, msgspec.structs.replace(theirs, ticks=None)) == ["volume", "turnover"]


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ((9.5, 12.0, 9.0, 11.0), []),  # the close before lies within the prices of the minute
        ((13.0, 13.0, 9.0, 11.0), []),  # above them
        ((8.0, 12.0, 8.0, 11.0), []),  # below them
        ((13.0, 12.0, 9.0, 11.0), []),  # above them, and not counted as one of them
        ((13.0, 12.5, 9.0, 11.0), ["high"]),
        ((9.5, 12.5, 9.0, 11.0), ["high"]),
        ((9.5, 11.5, 9.0, 11.0), ["high"]),
        ((9.5, 12.0, 9.5, 11.0), ["low"]),
        ((9.5, 12.0, 9.0, 11.5), ["close"]),
    ],
)
def test_candle_that_opens_at_the_last_close_is_compared(
    theirs: tuple[float, float, float, float], expected: list[str]
) -> None:
    values = VenueValues(*theirs, 3.25, 34.125, None)
    assert differences(OURS, values, opens_at_last_close=True) == expected


def test_ticks_without_quantity_are_compared_by_price_and_count() -> None:
    tick = candle_of(TickOf(10.0, MINUTE, 1))
    assert differences(tick, VenueValues(10.0, 10.0, 10.0, 10.0, 5.0, 50.0, 1)) == []
    assert differences(tick, VenueValues(10.0, 10.0, 10.0, 10.0, 5.0, 50.0, 2)) == ["ticks"]


def test_minute_of_the_venue_is_a_valid_candle() -> None:
    minute = venue_minute(VenueCandle(MINUTE, VenueValues(13.0, 12.0, 9.0, 11.0, 3.0, 33.0, 4)))
    assert (minute.open, minute.high, minute.low, minute.close) == (12.0, 12.0, 9.0, 11.0)
    assert (minute.ticks, minute.average, minute.vwap, minute.source) == (4, 11.0, 11.0, "venue")
    assert venue_minute(VenueCandle(MINUTE, VenueValues(9.0, 12.0, 9.0, 11.0, None, None, 4))).ticks == 0
