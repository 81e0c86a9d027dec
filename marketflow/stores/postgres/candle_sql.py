"""SQL for the candle of some rows of one series, shared by queries and roll-ups.

In a schema where other roles may create objects, their operator or function is called where it fits the arguments
better than PostgreSQL's own, with the rights of the caller. So, in all statements of this package, operators get
exactly the types that pg_catalog defines them for, and polymorphic functions (count, array_agg) are qualified. `unnest`
of several arrays is always PostgreSQL's own.
"""


def recursive_series(table: str = "aggregates", condition: str = "true") -> str:
    """A common table expression of all series that have rows: one index scan for each, however many rows there are.

    Args:
        table: with the columns of a series.
        condition: on rows; it must be true of (nearly) all rows of the partitions that it selects, for the others are
            read one by one.
    """
    return f"""
    recursive series as (
        (select exchange, pair_name, mode from {table} where {condition} order by exchange, pair_name, mode limit 1)
        union all
        select following.* from series cross join lateral (
            select exchange, pair_name, mode from {table}
            where (exchange, pair_name, mode) > (series.exchange, series.pair_name, series.mode) and {condition}
            order by exchange, pair_name, mode limit 1
        ) as following
    )
    """  # noqa: S608 - put together from constants


_PRICES_VALID = """
min_price >= float8 '-1e100' and max_price <= float8 '1e100' and min_price <= open_price and min_price <= close_price
and max_price >= open_price and max_price >= close_price
"""

_AVERAGE_VALID = """(
    average_price between min_price and max_price
    or average_price between min_price - greatest(abs(min_price), float8 '1e-290') * float8 '1e-9'
                         and max_price + greatest(abs(max_price), float8 '1e-290') * float8 '1e-9'
)"""

VALID = f"""(
    tick_count between 1 and 1000000000000 and {_AVERAGE_VALID}
    or source = text 'venue' and tick_count is null and average_price is null
) and {_PRICES_VALID}"""
"""Condition of a valid minute; rows older than the constraint (ddl/0005) may break it."""

VALID_SUM = f"""(
    tick_count between 1 and 1000000000000000 and {_AVERAGE_VALID} or tick_count = 0 and average_price is null
) and {_PRICES_VALID}"""
"""The same of an hour or a day."""

AMOUNTS = ("volume", "turnover", "buy_volume", "buy_turnover")

TOTAL_OF_ROW = "coalesce(average_price * tick_count::float8, float8 '0')"
"""The sum of all prices of a row; zero where it is unknown."""


def _sum_if_known(column: str) -> str:
    return f"case when pg_catalog.count({column}) = pg_catalog.count(*) then sum({column}) end as {column}"


SUMS = f"""
coalesce(sum(version - 1), 0)::int8 + 1 as version, {", ".join(map(_sum_if_known, AMOUNTS))}, max(source) as source,
case when bool_or(verified is false) then false
     when pg_catalog.count(verified) = pg_catalog.count(*) then true end as verified
"""
"""What candles of several rows add up besides prices, as `model.merge` does."""

SUMMED = f"version, {', '.join(AMOUNTS)}, source, verified"
"""The columns that SUMS makes."""


def time_of(column: str) -> str:
    """The time of a price, or the start of the row where the time is missing or out of range."""
    within = f"{column} >= timestamptz '1970-01-01 00:00:00+00' and {column} < timestamptz '2200-01-01 00:00:00+00'"
    return f"case when {within} then {column} else timestamp end"


def candle_select(table: str, condition: str) -> str:
    """A query for the candle of some rows of a table: one row, or none where no row matches.

    The start of the first row with each extreme is selected as well, by which candles of several parts are merged. Rows
    without times of their own carry their start.

    Args:
        table: aggregates, aggregates_hourly or aggregates_daily.
        condition: names a series and a range of its rows, whose start is `timestamp`.
    """
    rows = f"from {table} where {condition} and {VALID if table == 'aggregates' else VALID_SUM}"
    return f"""
        select total, ticks, high, low, opening.price as open, closing.price as close,
               opening.at as first_at, closing.at as last_at, highest.at as high_at, lowest.at as low_at,
               first, last, highest.start as high_start, lowest.start as low_start, {SUMMED}
        from (
            select sum({TOTAL_OF_ROW}) as total, coalesce(sum(tick_count), 0)::int8 as ticks,
                   min(timestamp) as first, max(timestamp) as last, max(max_price) as high, min(min_price) as low,
                   {SUMS}
            {rows}
        ) as whole
        cross join lateral (
            select open_price as price, {time_of("open_at")} as at {rows} order by timestamp limit 1
        ) as opening
        cross join lateral (
            select close_price as price, {time_of("close_at")} as at {rows} order by timestamp desc limit 1
        ) as closing
        cross join lateral (
            select {time_of("max_at")} as at, timestamp as start {rows} and max_price = high
            order by timestamp limit 1
        ) as highest
        cross join lateral (
            select {time_of("min_at")} as at, timestamp as start {rows} and min_price = low
            order by timestamp limit 1
        ) as lowest
    """  # noqa: S608 - put together from constants
