"""Price queries: the newest price, and summaries of a period, from the cache and the archive.

A request fixes its series, and with them the mode, before the first await, and reads the clock once: all its queries
cover the same data and the same period.

While one store is unavailable the other answers what it can; `since` and `until` say what was covered. An empty result
is `NoData` only if every store that was needed has answered, otherwise `Unavailable`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import horizon, oldest_kept_minute, split_between
from marketflow.api.queries.candles import CandleRequest, CandleRows, Combine, QueryTime, query_candles
from marketflow.api.queries.derived.filled_candles import filled_candles
from marketflow.api.queries.either_store import both, unless_unavailable
from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, SECOND_MS, Candle, Series, Tick, merge_all, minute_start
from marketflow.reference_price import FRESH_MS, ReferencePrice, reference_price
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.candle_window import merged
from marketflow.stores.ports import ArchiveReader, CacheReader


class ObservedPrice(NamedTuple):
    """A price, its series and its event time (Unix ms)."""

    series: Series
    price: float
    at: int


class PeriodSummary(NamedTuple):
    """Candles of the series with ticks from `since` to `until` (Unix ms), one a series; never empty."""

    candles: dict[Series, Candle]
    since: int
    until: int

    def highest(self) -> ObservedPrice:
        """Return the highest price; the earliest of several, the first series of several at once."""
        series, candle = max(self.candles.items(), key=lambda item: (item[1].high, -item[1].high_at))
        return ObservedPrice(series, candle.high, candle.high_at)

    def lowest(self) -> ObservedPrice:
        """Return the lowest price; the earliest of several, the first series of several at once."""
        series, candle = min(self.candles.items(), key=lambda item: (item[1].low, item[1].low_at))
        return ObservedPrice(series, candle.low, candle.low_at)

    def whole(self) -> Candle:
        """Return one candle of all series."""
        candle = merged(self.candles.values())
        assert candle is not None, "a summary holds at least one candle"
        return candle


class PriceQueries(msgspec.Struct, frozen=True):
    """Queries of series in `cache` and `archive`; stateless.

    Clocks of exchanges may be ahead by `ahead_ms`; from `closed_after_ms` after the end of a candle on, no tick that
    would be accepted can change it.
    """

    cache: CacheReader
    archive: ArchiveReader
    clock: Clock
    ahead_ms: int = MINUTE_MS
    closed_after_ms: int = 5_500

    async def latest(self, series: Sequence[Series]) -> ObservedPrice:
        """Return the newest tick of all series by event time, at most the time of receipt, then by arrival.

        Once the ticks have expired it is the close of the newest minute.

        Raises:
            NoData: there is no tick on record.
            Unavailable: no tick was found, and a store that was needed is unavailable.
        """
        cached = True
        try:
            found = newest_of(series, await self.cache.newest(series))
        except Unavailable:
            cached, found = False, None
        if found is None:
            found = newest_of(series, await self.archive.last(series))
        if found is None:
            raise _nothing(complete=cached)
        return found

    async def reference(self, series: Sequence[Series]) -> ReferencePrice:
        """Return the median of the fresh newest ticks, one a series.

        Raises:
            NoData: none of them is fresh.
            Unavailable: the newest ticks are unavailable.
        """
        found = reference_price(await self.cache.newest(series), milliseconds(self.clock()))
        if found is None:
            raise NoData(f"No exchange has had a price in the last {FRESH_MS // SECOND_MS} s.")
        return found

    async def summary(self, series: Sequence[Series], period: int | None) -> PeriodSummary:
        """Summarize the last `period` ms, or everything on record.

        Raises:
            NoData: there is no tick in the period.
            Unavailable: no tick was found, and a store that was needed is unavailable.
        """
        now = milliseconds(self.clock())
        if period is None:
            found = await self._long(series, 0, now)
            return found._replace(since=found.whole().first_at)
        if period > RECENT_MS:
            return await self._long(series, minute_start(now - period), now)
        return await self._recent(series, now - period, now)

    def candles_in_memory(self, series: Sequence[Series], period: int, now: int) -> list[Candle | None] | None:
        """Return the candles of which `summary` is made, from the memory of this process, for a period in the slices.

        None where it would query a store.
        """
        return self.cache.summary_in_memory(series, now - period, horizon(now, self.ahead_ms))

    async def candles(
        self, series: Sequence[Series], wanted: CandleRequest, combine: Combine = merge_all
    ) -> CandleRows:
        """Return candles of all series as one, see `query_candles` and `filled_candles`.

        Raises:
            Unavailable: no candle was found, and a store that was needed is unavailable.
        """
        now = milliseconds(self.clock())
        until = horizon(now, self.ahead_ms)
        at = QueryTime(now, until, now - self.closed_after_ms)

        async def run(request: CandleRequest) -> CandleRows:
            return await query_candles(self.cache, self.archive, series, request, at, combine)

        return await (filled_candles(run, wanted, until) if wanted.fill else run(wanted))

    async def _recent(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """Summarize a period that the slices cover: exact from the cache, whole minutes from the archive."""
        until = horizon(now, self.ahead_ms)
        cached = await unless_unavailable(self.cache.summary(series, since, until))
        if cached is not None:
            return summary_of(series, cached, since, now, complete=True)
        since = minute_start(since)
        rows = await self.archive.summary(series, since, until)
        return summary_of(series, rows, since, _end_of(rows, now), complete=False)

    async def _long(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """Summarize whole minutes from `since`: the older ones from the archive, the last ones from the cache."""
        split, until = split_between(now), horizon(now, self.ahead_ms)
        rows, cached = await both(
            unless_unavailable(self.archive.summary(series, since, split)),
            unless_unavailable(self.cache.summary(series, split, until)),
        )
        if rows is None:
            if cached is None:
                raise Unavailable("neither the cache nor the archive is available")
            return await self._from_closed_minutes(series, max(since, oldest_kept_minute(now)), now)
        if cached is not None:
            return summary_of(series, _pairwise(rows, cached), since, now, complete=True)
        rows = _pairwise(rows, await self.archive.summary(series, split, until))
        return summary_of(series, rows, since, _end_of(rows, now), complete=False)

    async def _from_closed_minutes(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """Summarize closed minutes of the cache while the archive is unavailable."""
        cached = await self.cache.summary(series, since, horizon(now, self.ahead_ms))
        found = summary_of(series, cached, since, now, complete=False)
        # Its reach is unknown: memory holds minutes, and the cache a day unless it was emptied.
        return found._replace(since=max(since, minute_start(found.whole().first_at)))


def summary_of(
    series: Sequence[Series], candles: Sequence[Candle | None], since: int, until: int, *, complete: bool
) -> PeriodSummary:
    """Return the summary of a period whose candles are these, `complete` if every store that was needed has answered.

    Raises:
        NoData: there is none.
        Unavailable: there is none, but not every store has answered.
    """
    found = {one: candle for one, candle in zip(series, candles, strict=True) if candle is not None}
    if not found:
        raise _nothing(complete=complete)
    # The clock of an exchange may be ahead of ours: the period must contain all that was counted.
    return PeriodSummary(found, since, max(until, *(candle.last_at for candle in found.values())))


def _nothing(*, complete: bool) -> Exception:
    """Return the error of an empty result; `complete` if every store that was needed has answered."""
    return NoData("There is no tick to answer with.") if complete else Unavailable("a store is unavailable")


def newest_of(series: Sequence[Series], ticks: Sequence[Tick | None]) -> ObservedPrice | None:
    """Return the newest of the newest ticks of each series, see `PriceQueries.latest`; None if there is none."""
    newest, newest_series = None, None
    for one, tick in zip(series, ticks, strict=True):
        if tick is not None and (newest is None or tick.order_of_receipt > newest.order_of_receipt):
            newest, newest_series = tick, one
    return ObservedPrice(newest_series, newest.price, newest.at) if newest and newest_series else None


def _pairwise(earlier: Sequence[Candle | None], later: Sequence[Candle | None]) -> list[Candle | None]:
    return [merged(pair) for pair in zip(earlier, later, strict=True)]


def _end_of(rows: Sequence[Candle | None], now: int) -> int:
    """Return the end of what minute rows cover: the end of the last one, at most now."""
    whole = merged(rows)
    return now if whole is None else min(now, minute_start(whole.last_at) + MINUTE_MS)
