"""Candle queries: rows of the archive up to six minutes ago, minutes of the cache from there on, so that the running
candle has the newest tick.

A candle is identified by the time at which it opens, on a grid that begins in 1970; it merges all minutes that begin
within it. Candles without ticks are absent.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from marketflow.api.queries.boundaries import oldest_kept_minute, split_between
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
        length_ms: length of a candle, whole minutes.
        since: the first `limit` candles that open at this time (Unix ms) or later; None: the last ones.
        until: they open before this time (Unix ms); None: now.
        limit: most candles.
    """

    length_ms: int
    since: int | None
    until: int | None
    limit: int


class QueryTime(NamedTuple):
    """Times of a query (Unix ms): now, the end of the last minute with ticks, and the end of what is closed."""

    now: int
    horizon: int
    complete_until: int


class CandleRows(NamedTuple):
    """The result of a candle query.

    Args:
        candles: by the time at which they open (Unix ms), in order.
        closed_until: a candle that ends later may still change.
        known_from: a candle that opens before may be incomplete.
        settled: whether the whole range is over, so that the same request has the same result for a while.
    """

    candles: dict[int, Candle]
    closed_until: int
    known_from: int
    settled: bool

    def closed(self, start: int, length_ms: int) -> bool:
        """Return whether the candle that opens at `start` is closed."""
        return self.known_from <= start and start + length_ms <= self.closed_until


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
    length, split = wanted.length_ms, split_between(at.now)
    since = _next_on_grid(wanted.since or 0, length)
    wanted_until = at.horizon if wanted.until is None else _next_on_grid(wanted.until, length)
    until = min(wanted_until, at.horizon)
    if since >= until:
        return CandleRows({}, at.complete_until, 0, settled=False)

    def part(begin: int, end: int) -> CandleRange:
        return CandleRange(length, begin, end, wanted.limit, newest=wanted.since is None)

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
        return CandleRows(chosen, closed_until, known_from, settled=complete and over)

    old, recent = part(since, min(until, split)), max(since, split)
    rows, cached = await both(
        unless_unavailable(archive.candles(series, old)) if since < split else _nothing(series),
        unless_unavailable(cache.by_minute(series, recent, until)) if until > split else _nothing(series),
    )
    if rows is None:
        oldest = oldest_kept_minute(at.now)
        since = max(since, _next_on_grid(oldest, length))
        if cached is None or since >= until or (wanted.since or oldest) < oldest:
            raise Unavailable("neither the cache nor the archive is available")
        # Its reach is unknown: memory holds minutes, and the cache a day unless it was emptied.
        cached = await cache.by_minute(series, since, until)
        known_from = min((start for each in cached for start in each), default=0)
        folded = _folded(cached, length)
        return rows_of(folded, closed_until=at.complete_until, known_from=known_from)
    if cached is None:
        # The last rows may not be written yet.
        return rows_of(await archive.candles(series, part(since, until)), closed_until=split)
    whole = [merge_all(parts) for parts in zip(rows, _folded(cached, length), strict=True)]
    return rows_of(whole, closed_until=at.complete_until, complete=True)


async def _nothing(series: Sequence[Series]) -> list[dict[int, Candle]]:
    return [{} for _ in series]


def _next_on_grid(at: int, length_ms: int) -> int:
    """Return the first time at or after `at` at which a candle opens."""
    return -(-at // length_ms) * length_ms


def _folded(minutes: Sequence[Mapping[int, Candle]], length_ms: int) -> list[dict[int, Candle]]:
    """Minutes of each series as candles."""
    return [
        merge_all({start - start % length_ms: candle} for start, candle in of_series.items()) for of_series in minutes
    ]
