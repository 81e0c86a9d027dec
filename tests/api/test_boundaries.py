"""Boundaries of periods: whatever the stores hold, each tick of the period counts exactly once."""

import asyncio
from dataclasses import dataclass
from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import horizon, split_between
from marketflow.api.queries.prices import PeriodSummary, PriceQueries
from marketflow.clock import NANOSECONDS_PER_MS
from marketflow.model import (
    MINUTE_MS,
    SLICE_MS,
    Candle,
    Mode,
    Series,
    Slot,
    Tick,
    candle_of,
    merge,
    minute_start,
    slice_start,
)
from marketflow.stores.cache_limits import RECENT_MS
from tests.api.world import EXCHANGES, NOW, MemoryArchive, MemoryCache

ALL_SERIES = [Series(Mode.TEST, exchange, "BTCUSDT") for exchange in EXCHANGES]
HORIZON_MS = 3 * RECENT_MS

LATER = horizon(NOW)

nows = st.integers(NOW, NOW + 2 * MINUTE_MS)
periods = st.one_of(
    st.none(),
    st.integers(1, RECENT_MS + 2 * MINUTE_MS),
    st.sampled_from([1_000, MINUTE_MS, RECENT_MS, RECENT_MS + 1, HORIZON_MS]),
    st.integers(RECENT_MS, HORIZON_MS),
)
# More ages in the last seconds and near the retention of slices.
ages = st.one_of(
    st.integers(0, 5_000),
    st.integers(0, HORIZON_MS),
    st.integers(RECENT_MS - 2 * MINUTE_MS, RECENT_MS + 2 * MINUTE_MS),
)
# Whole prices, so that totals are exact; few of them, so that extremes are often tied.
trades = st.tuples(st.sampled_from(ALL_SERIES), ages, st.integers(1, 5))


@dataclass
class Market:
    """Ticks by series, at most one a slice, and what the stores hold of them."""

    now: int
    ticks: dict[Series, list[Tick]]
    cache: MemoryCache
    archive: MemoryArchive

    def summary(self, period: int | None) -> PeriodSummary | None:
        prices = PriceQueries(self.cache, self.archive, lambda: self.now * NANOSECONDS_PER_MS)
        try:
            return asyncio.run(prices.summary(ALL_SERIES, period))
        except NoData:
            return None

    def since(self, since: int) -> dict[Series, list[Tick]]:
        kept = {one: [tick for tick in ticks if tick.at >= since] for one, ticks in self.ticks.items()}
        return {one: ticks for one, ticks in kept.items() if ticks}


@st.composite
def markets(draw: st.DrawFn) -> Market:
    now = draw(nows)
    market = Market(now, {}, MemoryCache(), MemoryArchive())
    by_slice = {
        Slot(one, slice_start(now - age)): Tick(float(price), now - age, sequence)
        for sequence, (one, age, price) in enumerate(draw(st.lists(trades, max_size=40)))
    }
    for slot, tick in by_slice.items():
        market.ticks.setdefault(slot.series, []).append(tick)
    for one, ticks in market.ticks.items():
        ticks.sort(key=lambda tick: tick.order)
        store(draw, market, one, ticks)
    return market


def store(draw: st.DrawFn, market: Market, one: Series, ticks: list[Tick]) -> None:
    """Fill the stores with any state that the pipeline may have reached with these ticks."""
    split = split_between(market.now)
    if draw(st.booleans()) or ticks[-1].at >= split:
        market.cache.newest_ticks[one] = ticks[-1]
    if ticks[-1].at >= split and draw(st.booleans()):
        ticks = ticks[:-1]  # visible already, but its slice is not written yet
    slices_since = draw(st.integers(market.now - HORIZON_MS, market.now - RECENT_MS))
    minutes: dict[int, list[Tick]] = {}
    for tick in ticks:
        minutes.setdefault(minute_start(tick.at), []).append(tick)
        if slice_start(tick.at) + SLICE_MS > slices_since:
            market.cache.slices[Slot(one, slice_start(tick.at))] = candle_of(tick)
    for start, inside in minutes.items():
        store_minute(draw, market, Slot(one, start), inside, must=start < split)


def store_minute(draw: st.DrawFn, market: Market, slot: Slot, ticks: list[Tick], *, must: bool) -> None:
    if must:
        market.archive.minutes[slot] = folded(ticks)
        market.cache.minutes[slot] = folded(ticks)
        return
    # The last minutes may be closed or open, and closed as they were before the last ticks came in late.
    for minutes in (market.archive.minutes, market.cache.minutes):
        if known := draw(st.integers(0, len(ticks))):
            minutes[slot] = folded(ticks[:known])


def folded(ticks: list[Tick]) -> Candle:
    return reduce(merge, map(candle_of, ticks))


def edge_of(period: int | None, now: int) -> int:
    if period is None:
        return 0
    return now - period if period <= RECENT_MS else minute_start(now - period)


@given(markets(), periods)
def test_period_counts_each_tick_exactly_once(market: Market, period: int | None) -> None:
    expected = market.since(edge_of(period, market.now))
    summary = market.summary(period)
    assert (summary.candles if summary else {}) == {one: folded(ticks) for one, ticks in expected.items()}


@given(markets(), periods)
def test_average_and_extremes_equal_those_of_the_ticks(market: Market, period: int | None) -> None:
    summary = market.summary(period)
    if summary is None:
        return
    expected = market.since(edge_of(period, market.now))
    ticks = [(one, tick) for one in ALL_SERIES for tick in expected.get(one, ())]
    prices = [tick.price for _, tick in ticks]
    assert summary.whole().ticks == len(ticks)
    assert summary.whole().average == sum(prices) / len(prices)
    high, low = max(prices), min(prices)
    assert summary.highest() == min(
        ((one, tick.price, tick.at) for one, tick in ticks if tick.price == high), key=lambda quote: quote[2]
    )
    assert summary.lowest() == min(
        ((one, tick.price, tick.at) for one, tick in ticks if tick.price == low), key=lambda quote: quote[2]
    )


@given(markets(), periods)
def test_summary_has_boundaries_of_its_period(market: Market, period: int | None) -> None:
    summary = market.summary(period)
    if summary is None:
        return
    first = min(tick.at for ticks in market.ticks.values() for tick in ticks)
    assert summary.since == (first if period is None else edge_of(period, market.now))
    assert summary.until == market.now


@given(st.integers(0, 10**13))
def test_split_is_first_whole_minute_of_slices(now: int) -> None:
    split = split_between(now)
    assert split % MINUTE_MS == 0
    assert 0 <= split - (now - RECENT_MS) < MINUTE_MS
