"""Candles of any length out of the archive, as SQL: the first so many from a time on, or the last before one.

Rows are merged where they are. A walk reads the rows of the candles that it gives, and no others: first it looks along
the index for the place where the limit is reached, which times without ticks do not change, then it folds all rows up
to there.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from marketflow.model import Candle, Series
from marketflow.stores.ports import Walk
from marketflow.stores.rows import to_datetime

_WANTED = """
select * from unnest(%(mode)s::text[], %(exchange)s::text[], %(symbol)s::text[]) with ordinality
    as wanted (mode, exchange, pair_name, number)
"""

_OF_WANTED = "exchange = wanted.exchange and pair_name = wanted.pair_name and mode = wanted.mode"

_LENGTH = "%(length)s::interval"


_SLOT = f"date_bin({_LENGTH}, timestamp, timestamptz 'epoch')"


def _folded(table: str, condition: str) -> str:
    """The candles of the rows under a condition, by their slot."""
    return f"""
        select slot, total, ticks, high, low, opening.price as open, closing.price as close,
               opening.at as first_at, closing.at as last_at
        from (
            select {_SLOT} as slot, sum(average_price * tick_count) as total,
                   sum(tick_count)::int8 as ticks, max(max_price) as high, min(min_price) as low,
                   min(timestamp) as first, max(timestamp) as last
            from {table} where {_OF_WANTED} and {condition} group by slot
        ) as whole
        cross join lateral (
            select open_price as price, coalesce(open_at, timestamp) as at from {table}
            where {_OF_WANTED} and timestamp = first limit 1
        ) as opening
        cross join lateral (
            select close_price as price, coalesce(close_at, timestamp) as at from {table}
            where {_OF_WANTED} and timestamp = last limit 1
        ) as closing
    """  # noqa: S608 - put together from constants


def _of_minutes(order: str) -> str:
    """A walk along the minutes; `order` is asc or desc."""
    reached = f"""
        select slot from (
            select timestamp, {_SLOT} as slot, lag({_SLOT}) over (order by timestamp {order}) as before
            from aggregates where {_OF_WANTED} and timestamp >= %(since)s and timestamp < %(until)s
        ) as walked
        where before is distinct from slot order by timestamp {order} offset %(limit)s - 1 limit 1
    """  # noqa: S608
    span = (
        f"coalesce(({reached}), %(since)s), %(until)s"
        if order == "desc"
        else f"%(since)s, coalesce(({reached}) + {_LENGTH}, %(until)s)"
    )
    within = "timestamp >= span.since and timestamp < least(span.until, %(until)s)"
    return f"""
        with wanted as ({_WANTED})
        select number, (date_part('epoch', slot) * 1000)::int8, open, high, low, close, total, ticks,
               (date_part('epoch', first_at) * 1000)::int8, (date_part('epoch', last_at) * 1000)::int8
        from wanted
        cross join lateral (select {span}) as span (since, until)
        cross join lateral ({_folded("aggregates", within)}) as candle
    """  # noqa: S608


_OF_MINUTES = {newest: _of_minutes("desc" if newest else "asc") for newest in (False, True)}


def query(series: Sequence[Series], walk: Walk) -> tuple[str, dict[str, Any]]:
    """The statement for a walk, and its parameters."""
    return _OF_MINUTES[walk.newest], {
        "mode": [each.mode.value for each in series],
        "exchange": [each.exchange for each in series],
        "symbol": [each.symbol for each in series],
        "length": timedelta(milliseconds=walk.length_ms),
        "since": to_datetime(walk.since),
        "until": to_datetime(walk.until),
        "limit": walk.limit,
    }


def candles_of(rows: Iterable[tuple[Any, ...]], count: int) -> list[dict[int, Candle]]:
    """The candles of `count` series by their start, from the rows of such a statement."""
    found: list[dict[int, Candle]] = [{} for _ in range(count)]
    for number, start, opening, high, low, closing, total, ticks, first_at, last_at in rows:
        # Rows have no order of arrival, see candle_of_row.
        found[number - 1][start] = Candle(
            opening, high, low, closing, total, ticks, first_at, last_at, start, start, 0, 0
        )
    return found
