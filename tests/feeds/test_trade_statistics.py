"""Rates and delays of series: right over the last minute, forgotten after it, small in memory."""

import random
import tracemalloc
from statistics import quantiles

import pytest

from marketflow.feeds.trade_statistics import BOUNDS_MS, NO_TICKS, PERIOD_MS, TradeStatistics
from marketflow.model import NANOSECONDS_PER_MS, Candles, Mode, Series, Slot, Tick, candle_of, merge
from tests.support.market import BTC, ETH, MINUTE


def batch(received_ms: int, delay_ms: float = 0.0, ticks: int = 1, series: Series = BTC) -> Candles:
    """One candle whose ticks were received at a time, `delay_ms` after their event."""
    at = received_ms - round(delay_ms)
    candle = candle_of(Tick(5.0, at, received_ms * NANOSECONDS_PER_MS))
    for _ in range(ticks - 1):
        candle = merge(candle, candle_of(Tick(5.0, at, received_ms * NANOSECONDS_PER_MS)))
    return {Slot(series, at // 100 * 100): candle}


def test_percentiles_are_those_of_the_samples() -> None:
    statistics, numbers = TradeStatistics(), random.Random(7)
    delays = [numbers.lognormvariate(4.5, 0.6) for _ in range(500)]
    for number, delay in enumerate(delays):
        now = MINUTE + 100 * number
        statistics.observe(batch(now, delay), now)
    found = statistics.of(BTC, MINUTE + 50_000)
    exact = quantiles([round(delay) for delay in delays], n=100)
    assert found.delay_p50_ms == pytest.approx(exact[49], rel=0.05)
    assert found.delay_p99_ms == pytest.approx(exact[98], rel=0.16)


def test_rate_counts_ticks_of_the_last_minute() -> None:
    statistics = TradeStatistics()
    for now in range(MINUTE, MINUTE + 120_000, 1000):
        statistics.observe(batch(now, ticks=5), now)
        if now >= MINUTE + 5000:
            assert statistics.of(BTC, now).ticks_per_second == pytest.approx(5.0, rel=0.2)
    assert statistics.of(ETH, MINUTE) == NO_TICKS


def test_first_ticks_have_no_absurd_rate() -> None:
    statistics = TradeStatistics()
    statistics.observe(batch(MINUTE), MINUTE)
    assert statistics.of(BTC, MINUTE).ticks_per_second == 1.0


def test_rate_falls_to_zero_when_no_ticks_come() -> None:
    statistics = TradeStatistics()
    for now in range(MINUTE, MINUTE + 60_000, 1000):
        statistics.observe(batch(now, 20), now)
    rates = [statistics.of(BTC, MINUTE + 60_000 + after).ticks_per_second for after in range(0, 70_000, 10_000)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0.0
    assert statistics.of(BTC, MINUTE + 60_000 + 2 * PERIOD_MS) == NO_TICKS


@pytest.mark.parametrize(("pause", "delay"), [(PERIOD_MS, 20), (2 * PERIOD_MS, 900), (10 * PERIOD_MS, 900)])
def test_delays_of_before_are_forgotten(pause: int, delay: int) -> None:
    statistics = TradeStatistics()
    statistics.observe(batch(MINUTE, 20), MINUTE)
    statistics.observe(batch(MINUTE, 20), MINUTE)
    later = MINUTE + pause
    statistics.observe(batch(later, 900), later)
    assert statistics.of(BTC, later).delay_p50_ms == pytest.approx(delay, rel=0.16)


def test_clock_of_exchange_ahead_means_no_delay() -> None:
    statistics = TradeStatistics()
    statistics.observe(batch(MINUTE, -400), MINUTE)
    assert statistics.of(BTC, MINUTE)[1:] == (0.0, 0.0)


def test_delay_above_all_bounds_is_the_last_bound() -> None:
    statistics = TradeStatistics()
    statistics.observe(batch(MINUTE, 10_000_000), MINUTE)
    assert statistics.of(BTC, MINUTE).delay_p99_ms == BOUNDS_MS[-1]


def test_clock_set_back_starts_a_new_period() -> None:
    statistics = TradeStatistics()
    for now in (MINUTE, MINUTE - 3_600_000, MINUTE - 3_599_000):
        statistics.observe(batch(now, 20), now)
    assert 0 <= statistics.of(BTC, MINUTE - 3_599_000).ticks_per_second <= 2.0


def test_histogram_of_an_exchange_counts_one_sample_a_batch() -> None:
    statistics = TradeStatistics()
    for number in range(10):
        now = MINUTE + 100 * number
        statistics.observe(batch(now, 20) | batch(now, 20, series=BTC._replace(symbol="ETHUSDT")), now)
    assert sum(statistics.delays_of("exchange1").counts) == 10
    assert statistics.delays_of("exchange1").total == pytest.approx(0.2)
    assert sum(statistics.delays_of("nowhere").counts) == 0


def test_statistics_of_fifteen_thousand_series_stay_small() -> None:
    statistics = TradeStatistics()
    series = [Series(Mode.LIVE, f"exchange{n % 5}", f"SYMBOL{n}") for n in range(15_000)]
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for now in (MINUTE, MINUTE + PERIOD_MS, MINUTE + 2 * PERIOD_MS):
        for one in series:
            statistics.observe(batch(now, 20, series=one), now)
    used = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert used < 25e6
