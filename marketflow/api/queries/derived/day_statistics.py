"""Statistics of the last 24 hours of all series, from one query for all clients.

Minutes of a day are many rows: 1,440 a series. So only the hours at both edges and the last minutes are read for each
answer, which is cached for a second; the hours between them, which hardly change, are read every HOURS_KEPT_SECONDS.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from marketflow.api.middleware.client_limits import ClientLimits
from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import DAY_MS, horizon, split_between
from marketflow.api.queries.prices import PeriodSummary, PriceQueries
from marketflow.clock import milliseconds
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Mode, Series, minute_start
from marketflow.reference_price import FRESH_MS, median_of
from marketflow.stores.candle_window import merged
from marketflow.stores.postgres.request_coalescing import CoalescedAnswers

HOURS_KEPT_SECONDS = 10.0

SERIES_AT_ONCE = 40
"""Series whose hours one query reads: 55,000 rows at most."""

ROWS_OF_SERIES = 260.0
"""Rows that are charged for a series: an hour at each edge, and a tenth of those between, see HOURS_KEPT_SECONDS."""

_HOUR_MS = 60 * MINUTE_MS


class SymbolDay(NamedTuple):
    """24 hours of a symbol over its exchanges.

    Args:
        whole: all candles as one.
        opening, last: medians of the exchanges that count, so that their difference is that of the market.
        exchanges: number of those: they had ticks when the period began and have fresh ones, if any has.
    """

    whole: Candle
    opening: float
    last: float
    exchanges: int


class DayStatistics:
    """Reads the statistics; for one event loop.

    Args:
        prices: where they are read.
        clients: charged for what is read.
        monotonic: the time, in seconds.
    """

    def __init__(
        self, prices: PriceQueries, clients: ClientLimits, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._prices = prices
        self._clients = clients
        self._days: CoalescedAnswers[PeriodSummary] = CoalescedAnswers(len(Mode), monotonic)
        self._hours: CoalescedAnswers[list[Candle | None]] = CoalescedAnswers(len(Mode), monotonic, HOURS_KEPT_SECONDS)

    async def read(self, series: Sequence[Series]) -> PeriodSummary:
        """Return the last 24 hours of all series, as of a second ago at most.

        Raises:
            NoData: there is no tick.
            Unavailable: no tick was found, and a store that was needed is unavailable.
            QuotaExceeded: the client of this task has used up its share.
        """
        rows = len(series) * ROWS_OF_SERIES
        return await self._days.get(tuple(series), lambda: self._read(series), lambda: self._clients.charge(rows))

    async def _read(self, series: Sequence[Series]) -> PeriodSummary:
        self._clients.exempt()
        now = milliseconds(self._prices.clock())
        try:
            candles = await self._parts(series, now)
        except Unavailable:
            return await self._prices.summary(series, DAY_MS)  # what one store alone can answer
        if not candles:
            raise NoData("There is no tick to answer with.")
        until = max(now, *(candle.last_at for candle in candles.values()))
        return PeriodSummary(candles, minute_start(now - DAY_MS), until)

    async def _parts(self, series: Sequence[Series], now: int) -> dict[Series, Candle]:
        since, split = minute_start(now - DAY_MS), split_between(now)
        first_hour, last_hour = -(-since // _HOUR_MS) * _HOUR_MS, split // _HOUR_MS * _HOUR_MS
        archive = self._prices.archive
        parts = [
            await archive.summary(series, since, first_hour),
            await self._hours.get(
                (tuple(series), first_hour, last_hour), lambda: self._read_hours(series, first_hour, last_hour)
            ),
            await archive.summary(series, last_hour, split),
            await self._prices.cache.summary(series, split, horizon(now, self._prices.ahead_ms)),
        ]
        days = zip(series, zip(*parts, strict=True), strict=True)
        return {one: candle for one, of_series in days if (candle := merged(of_series)) is not None}

    async def _read_hours(self, series: Sequence[Series], since: int, until: int) -> list[Candle | None]:
        found: list[Candle | None] = []
        for place in range(0, len(series), SERIES_AT_ONCE):
            found += await self._prices.archive.summary(series[place : place + SERIES_AT_ONCE], since, until)
        return found


def day_of_symbol(candles: Sequence[Candle], now_ms: int) -> SymbolDay:
    """Return the day of a symbol from the candles of its exchanges, at least one."""
    whole = merged(candles)
    assert whole is not None, "there is a candle"
    began = [candle for candle in candles if candle.first_at < whole.first_at + MINUTE_MS]
    lasting = [candle for candle in began if candle.last_at >= now_ms - FRESH_MS]
    counted = lasting or began
    opening, last = (median_of([getattr(each, name) for each in counted]) for name in ("open", "close"))
    return SymbolDay(whole, opening, last, len(counted))
