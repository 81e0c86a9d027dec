"""Prices for a request, put together from the cache and the archive.

A request fixes its series, and with them the mode, before the first await, and reads the clock once: whatever is
asked afterwards is about the same data and the same period.

Where one of the two stores is away the other answers as well as it can, and `since` and `until` say how far that was.
Nothing found is `NoData` only if every store that had to be asked did answer; otherwise nobody can know, and it is
`Unavailable`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from marketflow.api.problems import NoData
from marketflow.api.queries.boundaries import horizon, oldest_kept_minute, split_between
from marketflow.api.queries.candles import CandleRequest, CandleRows, QueryTime, query_candles
from marketflow.api.queries.either_store import both, unless_unavailable
from marketflow.clock import Clock, milliseconds
from marketflow.errors import Unavailable
from marketflow.model import MINUTE_MS, Candle, Series, Tick, minute_start
from marketflow.stores.cache_limits import RECENT_MS
from marketflow.stores.candle_window import merged
from marketflow.stores.ports import ArchiveReader, CacheReader


class ObservedPrice(NamedTuple):
    """A price, where it was paid and when (Unix ms, event time)."""

    series: Series
    price: float
    at: int


class PeriodSummary(NamedTuple):
    """What happened from `since` to `until` (Unix ms): one candle for each series that has any tick, never empty."""

    candles: dict[Series, Candle]
    since: int
    until: int

    def highest(self) -> ObservedPrice:
        """The highest price; the earliest of several, the first series of several at once."""
        series, candle = max(self.candles.items(), key=lambda item: (item[1].high, -item[1].high_at))
        return ObservedPrice(series, candle.high, candle.high_at)

    def lowest(self) -> ObservedPrice:
        """The lowest price; the earliest of several, the first series of several at once."""
        series, candle = min(self.candles.items(), key=lambda item: (item[1].low, item[1].low_at))
        return ObservedPrice(series, candle.low, candle.low_at)

    def whole(self) -> Candle:
        """One candle of all series."""
        candle = merged(self.candles.values())
        assert candle is not None, "a summary holds at least one candle"
        return candle


@dataclass(frozen=True)
class PriceQueries:
    """Answers questions about series from `cache` and `archive`; stateless.

    Exchanges' clocks may be ahead by `ahead_ms`; `closed_after_ms` after the end of a candle no tick that would be
    accepted can change it.
    """

    cache: CacheReader
    archive: ArchiveReader
    clock: Clock
    ahead_ms: int = MINUTE_MS
    closed_after_ms: int = 5_500

    async def latest(self, series: Sequence[Series]) -> ObservedPrice:
        """The newest tick of all series by event time, none later than its receipt, then by arrival.

        The close of a minute, once that is all there is.

        Raises:
            NoData: there is no tick on record.
            Unavailable: none was found and not everything could be asked.
        """
        cached = True
        try:
            found = _newest_of(series, await self.cache.newest(series))
        except Unavailable:
            cached, found = False, None
        if found is None:
            found = _newest_of(series, await self.archive.last(series))
        if found is None:
            raise _nothing(complete=cached)
        return found

    async def summary(self, series: Sequence[Series], period: int | None) -> PeriodSummary:
        """What the series did in the last `period` ms, or ever.

        Raises:
            NoData: there is no tick in the period.
            Unavailable: none was found and not everything could be asked.
        """
        now = milliseconds(self.clock())
        if period is None:
            found = await self._long(series, 0, now)
            return found._replace(since=found.whole().first_at)
        if period > RECENT_MS:
            return await self._long(series, minute_start(now - period), now)
        return await self._recent(series, now - period, now)

    async def candles(self, series: Sequence[Series], question: CandleRequest) -> CandleRows:
        """The candles of all series together.

        Raises:
            Unavailable: there are none that are known, and not everything could be asked.
        """
        now = milliseconds(self.clock())
        until = horizon(now, self.ahead_ms)
        return await query_candles(
            self.cache, self.archive, series, question, QueryTime(now, until, now - self.closed_after_ms)
        )

    async def _recent(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """A period that the slices cover: exact from the cache, whole minutes from the archive."""
        until = horizon(now, self.ahead_ms)
        remembered = await unless_unavailable(self.cache.summary(series, since, until))
        if remembered is not None:
            return _summary(series, remembered, since, now, complete=True)
        since = minute_start(since)
        rows = await self.archive.summary(series, since, until)
        return _summary(series, rows, since, _end_of(rows, now), complete=False)

    async def _long(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """A period of whole minutes from `since`, the older ones from the archive and the last ones from the cache."""
        split, until = split_between(now), horizon(now, self.ahead_ms)
        rows, remembered = await both(
            unless_unavailable(self.archive.summary(series, since, split)),
            unless_unavailable(self.cache.summary(series, split, until)),
        )
        if rows is None:
            if remembered is None:
                raise Unavailable("neither the cache nor the archive can be asked")
            return await self._remembered(series, max(since, oldest_kept_minute(now)), now)
        if remembered is not None:
            return _summary(series, _pairwise(rows, remembered), since, now, complete=True)
        rows = _pairwise(rows, await self.archive.summary(series, split, until))
        return _summary(series, rows, since, _end_of(rows, now), complete=False)

    async def _remembered(self, series: Sequence[Series], since: int, now: int) -> PeriodSummary:
        """The closed minutes of the cache in place of the archive's."""
        remembered = await self.cache.summary(series, since, horizon(now, self.ahead_ms))
        found = _summary(series, remembered, since, now, complete=False)
        # How far back it reaches nobody knows: memory holds minutes, and the cache a day unless it was emptied.
        return found._replace(since=max(since, minute_start(found.whole().first_at)))


def _summary(
    series: Sequence[Series], candles: Sequence[Candle | None], since: int, until: int, *, complete: bool
) -> PeriodSummary:
    found = {one: candle for one, candle in zip(series, candles, strict=True) if candle is not None}
    if not found:
        raise _nothing(complete=complete)
    # An exchange's clock may be ahead of ours: what counts lies within the period that is told.
    return PeriodSummary(found, since, max(until, *(candle.last_at for candle in found.values())))


def _nothing(*, complete: bool) -> Exception:
    """Why there is no answer: `complete` if all that there is was asked."""
    return NoData("There is no tick to answer with.") if complete else Unavailable("not everything could be asked")


def _newest_of(series: Sequence[Series], ticks: Sequence[Tick | None]) -> ObservedPrice | None:
    newest, whose = None, None
    for one, tick in zip(series, ticks, strict=True):
        if tick is not None and (newest is None or tick.order_of_receipt > newest.order_of_receipt):
            newest, whose = tick, one
    return ObservedPrice(whose, newest.price, newest.at) if newest and whose else None


def _pairwise(earlier: Sequence[Candle | None], later: Sequence[Candle | None]) -> list[Candle | None]:
    return [merged(pair) for pair in zip(earlier, later, strict=True)]


def _end_of(rows: Sequence[Candle | None], now: int) -> int:
    """Until when minute rows tell what happened: the end of the last of them, or now while it runs."""
    whole = merged(rows)
    return now if whole is None else min(now, minute_start(whole.last_at) + MINUTE_MS)
