"""Candle queries: rows of the archive up to six minutes ago, minutes of the cache from there on, so that the running
candle has the newest tick.

A candle is identified by the time at which it opens, on the grid of its interval; it merges all minutes that begin
within it. Stores make candles of up to a day, of which longer ones are put together here. Candles without ticks are
absent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from marketflow.api.queries.boundaries import Grid, oldest_kept_minute, split_between
from marketflow.api.queries.either_store import both, unless_unavailable
from marketflow.errors import Unavailable
from marketflow.model import Candle, Series, merge_all
from marketflow.stores.ports import ArchiveReader, CacheReader, CandleRange

Combine = Callable[[Sequence[Mapping[int, Candle]]], dict[int, Candle]]
"""Makes one candle of those of several series that open at the same time."""

SETTLED_MS = 10 * 60_000
"""Time after its end from which a range counts as settled, so that a client may cache it for a moment.

Late ticks come within seconds, rows within seconds more or after a restart. Later only rows come that waited for
PostgreSQL, and changes by hand; so the time for which it may be cached is short.
"""


class CandleRequest(NamedTuple):
    """The candles of a request.

    Args:
        grid: where candles begin.
        since: the first `limit` candles that open at this time (Unix ms) or later; None: the last ones.
        until: they open before this time (Unix ms); None: now.
        limit: most candles.
        fill: whether candles without ticks are filled, see `filled_candles`.
    """

    grid: Grid
    since: int | None
    until: int | None
    limit: int
    fill: bool = False


class QueryTime(NamedTuple):
    """Times of a query (Unix ms): now, the end of the last minute with ticks, and the end of what is closed."""

    now: int
    horizon: int
    complete_until: int


class CandleRows(NamedTuple):
    """The result of a candle query.

    Args:
        grid: where candles begin.
        candles: by the time at which they open (Unix ms), in order.
        closed_until: a candle that ends later may still change.
        known_from: a candle that opens before may be incomplete.
        settled: whether the whole range is over, so that the same request has the same result for a while.
        filled: those without ticks, which are flat.
    """

    grid: Grid
    candles: dict[int, Candle]
    closed_until: int
    known_from: int
    settled: bool
    filled: frozenset[int] = frozenset()

    def closed(self, start: int) -> bool:
        """Return whether the candle that opens at `start` is closed."""
        return self.known_from <= start and self.grid.end_of(start) <= self.closed_until


async def query_candles(
    cache: CacheReader,
    archive: ArchiveReader,
    series: Sequence[Series],
    wanted: CandleRequest,
    at: QueryTime,
    combine: Combine = merge_all,
) -> CandleRows:
    """Return candles of all series as one.

    Args:
        cache: where the last minutes are read.
        archive: where older ones are.
        series: whose.
        wanted: which.
        at: when.
        combine: makes one candle of those of several series that open at the same time.

    Raises:
        Unavailable: no candle was found, and a store that was needed is unavailable.
    """
    grid, split = wanted.grid, split_between(at.now)
    # Beyond the horizon there is nothing, and far beyond it there are no months.
    since = grid.at_or_after(min(wanted.since or 0, at.horizon))
    wanted_until = at.horizon if wanted.until is None else grid.at_or_after(min(wanted.until, at.horizon))
    until = min(wanted_until, at.horizon)
    if since >= until:
        return CandleRows(grid, {}, at.complete_until, 0, settled=False)

    def part(begin: int, end: int) -> CandleRange:
        return CandleRange(grid.part_ms, begin, end, wanted.limit * grid.parts, newest=wanted.since is None)

    def rows_of(
        of_series: Sequence[Mapping[int, Candle]], closed_until: int, known_from: int = 0, complete: bool = False
    ) -> CandleRows:
        candles = combine(of_series)
        if not candles and not complete:
            raise Unavailable("a store is unavailable")
        starts = sorted(candles)
        starts = starts[-wanted.limit :] if wanted.since is None else starts[: wanted.limit]
        over = wanted.since is not None and wanted_until + SETTLED_MS <= at.now
        chosen = {start: candles[start] for start in starts}
        return CandleRows(grid, chosen, closed_until, known_from, settled=complete and over)

    old, recent = part(since, min(until, split)), max(since, split)
    rows, cached = await both(
        unless_unavailable(_archived(archive, series, old, grid)) if since < split else _nothing(series),
        unless_unavailable(cache.by_minute(series, recent, until)) if until > split else _nothing(series),
    )
    if rows is None:
        oldest = oldest_kept_minute(at.now)
        since = max(since, grid.at_or_after(oldest))
        if cached is None or since >= until or (wanted.since or oldest) < oldest:
            raise Unavailable("neither the cache nor the archive is available")
        # Its reach is unknown: memory holds minutes, and the cache a day unless it was emptied.
        cached = await cache.by_minute(series, since, until)
        known_from = min((start for each in cached for start in each), default=0)
        return rows_of(folded(cached, grid), closed_until=at.complete_until, known_from=known_from)
    if cached is None:
        # The last rows may not be written yet.
        return rows_of(await _archived(archive, series, part(since, until), grid), closed_until=split)
    whole = [merge_all(parts) for parts in zip(rows, folded(cached, grid), strict=True)]
    return rows_of(whole, closed_until=at.complete_until, complete=True)


async def _archived(
    archive: ArchiveReader, series: Sequence[Series], wanted: CandleRange, grid: Grid
) -> Sequence[Mapping[int, Candle]]:
    found = await archive.candles(series, wanted)
    return found if grid.parts == 1 else folded(found, grid)


async def _nothing(series: Sequence[Series]) -> list[dict[int, Candle]]:
    return [{} for _ in series]


def folded(parts: Sequence[Mapping[int, Candle]], grid: Grid) -> list[dict[int, Candle]]:
    """Minutes or days of each series as candles."""
    return [merge_all({grid.start_of(start): candle} for start, candle in of_series.items()) for of_series in parts]
