"""Candle queries as SQL: the first candles of any length from a time on, or the last ones before a time.

Rows are merged in PostgreSQL, and no more of them are read than the requested candles need, whatever gaps there are.
Candles of less than an hour are made of minutes: an index scan finds where the limit is reached, then all rows up to
there are folded. Longer ones are made of hours or days (ddl/0003_aggregates_hourly.sql): a recursive scan goes from day
to day through aggregates_daily until there are enough, and reads the minutes of a day that is marked. A candle lies
within one day, so it is never put together from both.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

from marketflow.model import Candle, Series
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.candle_sql import SUMMED, SUMS, TOTAL_OF_ROW, VALID, VALID_SUM, time_of
from marketflow.stores.postgres.rows import DAY_MS, to_datetime, traded_of_row

_HOUR_MS = 60 * 60_000

_WANTED = """
select * from unnest(%(mode)s::text[], %(exchange)s::text[], %(symbol)s::text[]) with ordinality
    as wanted (mode, exchange, pair_name, number)
"""

_OF_WANTED = "exchange = wanted.exchange and pair_name = wanted.pair_name and mode = wanted.mode"

_VALID_OF = {"aggregates": VALID, "aggregates_hourly": VALID_SUM, "aggregates_daily": VALID_SUM}

_SLOT = "date_bin(%(length)s::interval, timestamp, timestamptz 'epoch')"

# Whole candles, joined with the rows they begin and end with: looking those up one by one would take most of the time.
_FOLDED = f"""
, whole as (
    select number, slot, sum(total) as total, coalesce(sum(tick_count), 0)::int8 as ticks, max(max_price) as high,
           min(min_price) as low, min(timestamp) as first, max(timestamp) as last, {SUMS},
           case when pg_catalog.count(*) = 1 then max(venue_values) end as venue_values
    from parts group by number, slot
)
select number, (date_part('epoch', slot) * float8 '1000')::int8, opening.open_price, high, low, closing.close_price,
       whole.total, ticks, (date_part('epoch', opening.open_at) * float8 '1000')::int8,
       (date_part('epoch', closing.close_at) * float8 '1000')::int8, {SUMMED}, venue_values
from whole
join (select number, timestamp as first, open_price, open_at from parts) as opening using (number, first)
join (select number, timestamp as last, close_price, close_at from parts) as closing using (number, last)
"""  # noqa: S608 - put together from constants


def _parts(table: str, span: str) -> str:
    """The rows of a series from `since` until `until` of a span, with their slots."""
    venue_values = "venue_values" if table == "aggregates" else "null::float8[]"
    # Offset 0 keeps the planner from joining the whole table instead of scanning each span.
    return f"""
        cross join lateral (
            select {_SLOT} as slot, timestamp, open_price, close_price, {time_of("open_at")} as open_at,
                   {time_of("close_at")} as close_at, max_price, min_price,
                   {TOTAL_OF_ROW} as total, tick_count, {SUMMED}, {venue_values} as venue_values
            from {table} where {_OF_WANTED} and timestamp >= {span}.since and timestamp < {span}.until
              and {_VALID_OF[table]}
            offset 0
        ) as part
    """  # noqa: S608 - put together from constants


def _of_minutes(newest: bool) -> str:
    """A query that scans minutes."""
    order = "desc" if newest else "asc"
    last_slot = f"""
        select slot from (
            select timestamp, {_SLOT} as slot, pg_catalog.lag({_SLOT}) over (order by timestamp {order}) as before
            from aggregates where {_OF_WANTED} and timestamp >= %(since)s and timestamp < %(until)s and {VALID}
        ) as scanned
        where before is distinct from slot order by timestamp {order} offset %(limit)s - 1 limit 1
    """  # noqa: S608
    since = f"coalesce(({last_slot}), %(since)s)" if newest else "%(since)s"
    until = "%(until)s" if newest else f"least(({last_slot}) + %(length)s::interval, %(until)s)"
    return f"""
        with wanted as ({_WANTED}), parts as materialized (
            select number, part.* from wanted
            cross join lateral (select {since} as since, {until} as until) as span {_parts("aggregates", "span")}
        ) {_FOLDED}
    """  # noqa: S608


def _of_days(newest: bool, table: str, made: str) -> str:
    """A query that scans days, with the minutes that are not yet rolled up at its beginning or end.

    Args:
        newest: whether to scan backwards.
        table: the table of the parts of a day.
        made: condition on the row of a day under which its parts are there.
    """
    order, beyond, start = ("desc", "<", "rolled.until") if newest else ("asc", ">=", "%(first_day)s")
    onward = "day" if newest else "day + interval '24 hours'"

    def slots(table: str, span: str) -> str:
        of_span = f"timestamp >= {span}.since and timestamp < {span}.until"
        condition = f"{_OF_WANTED} and {of_span} and {_VALID_OF[table]}"
        return f"(select pg_catalog.count(distinct {_SLOT}) from {table} where {condition})"  # noqa: S608

    found_first = slots("aggregates", "rest") if newest else "0::int8"
    lacking = "(select max(reached) from scanned where number = wanted.number) < %(limit)s"
    return f"""
        with wanted as ({_WANTED}), rolled as (
            select greatest(%(since)s, least(%(last)s, coalesce(max(rolled_until), 'epoch'))) as until
            from aggregates_rolled_until
        ), rest as (
            select until as since, %(until)s as until from rolled
        ), scanned as materialized (
            select wanted.*, scan.since, scan.until, scan.made, scan.reached
            from wanted cross join rolled cross join rest cross join lateral (
                with recursive scan as (
                    select {start} as onward, null::timestamptz as since, null::timestamptz as until,
                           null::boolean as made, {found_first} as reached
                    union all
                    select {onward}, span.since, span.until, daily.made, reached + case
                        when daily.made then {slots(table, "span")} else {slots("aggregates", "span")}
                    end
                    from scan cross join lateral (
                        select timestamp as day, {made} as made from aggregates_daily
                        where {_OF_WANTED} and timestamp {beyond} scan.onward
                          and timestamp >= %(first_day)s and timestamp < rolled.until
                        order by timestamp {order} limit 1
                    ) as daily
                    cross join lateral (
                        select greatest(day, %(since)s) as since,
                               least(day + interval '24 hours', rolled.until) as until
                    ) as span
                    where reached < %(limit)s
                )
                select * from scan
            ) as scan
        ), parts as materialized (
            select number, part.* from scanned as wanted {_parts(table, "wanted")} where made
            union all
            select number, part.* from scanned as wanted {_parts("aggregates", "wanted")} where not made
            union all
            select number, part.* from wanted cross join rest {_parts("aggregates", "rest")}
            {"" if newest else f"where {lacking}"}
        ) {_FOLDED}
    """  # noqa: S608


_OF_MINUTES = {newest: _of_minutes(newest) for newest in (False, True)}
_OF_HOURS = {newest: _of_days(newest, "aggregates_hourly", "hourly") for newest in (False, True)}
_OF_DAYS = {newest: _of_days(newest, "aggregates_daily", "tick_count is not null") for newest in (False, True)}


def query(series: Sequence[Series], wanted: CandleRange) -> tuple[str, dict[str, Any]]:
    """The statement for a range of candles, and its parameters."""
    if wanted.length_ms < _HOUR_MS:
        statements, part_ms = _OF_MINUTES, wanted.length_ms
    elif wanted.length_ms < DAY_MS:
        statements, part_ms = _OF_HOURS, _HOUR_MS
    else:
        statements, part_ms = _OF_DAYS, DAY_MS
    return statements[wanted.newest], {
        "mode": [each.mode.value for each in series],
        "exchange": [each.exchange for each in series],
        "symbol": [each.symbol for each in series],
        "length": timedelta(milliseconds=wanted.length_ms),
        "since": to_datetime(wanted.since),
        "until": to_datetime(wanted.until),
        "limit": wanted.limit,
        "first_day": to_datetime(wanted.since // DAY_MS * DAY_MS),
        # Only a part that has ended is read as a whole.
        "last": to_datetime(wanted.until // part_ms * part_ms),
    }


def candles_of(rows: Iterable[tuple[Any, ...]], count: int) -> list[dict[int, Candle]]:
    """The candles of `count` series by their start, from the rows of such a statement."""
    found: list[dict[int, Candle]] = [{} for _ in range(count)]
    for number, start, opening, high, low, closing, total, ticks, first_at, last_at, version, *traded in rows:
        # Rows have no order of arrival, see candle_of_row.
        times = (first_at, last_at, start, start)
        found[number - 1][start] = Candle(
            opening, high, low, closing, total, ticks, *times, 0, 0, version, *traded_of_row(*traded)
        )
    return found
