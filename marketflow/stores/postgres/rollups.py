"""Roll-ups: hourly and daily candles in PostgreSQL, made of minutes once their day is over.

ddl/0002_aggregates_daily.sql and 0003_aggregates_hourly.sql explain the tables. The work is done in small steps: moving
`rolled_until` marks the series that have minutes of one more day, then some marks at a time are replaced by candles.
The batch size follows the time that a step takes, which depends on the number of minutes and on whether they are in
memory. Every step is a transaction of its own that leaves all answers exact, so it may fail or be killed anywhere, and
several writers may do it at once.

It has a connection of its own: minute rows never wait for it.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from marketflow.logs import RateLimit
from marketflow.stores.postgres.candle_sql import (
    SUMMED,
    SUMS,
    TOTAL_OF_ROW,
    VALID,
    candle_select,
    recursive_series,
    time_of,
)
from marketflow.stores.postgres.connections.reconnecting_connection import ReconnectingConnection
from marketflow.stores.postgres.partitioning.daily_partitions import DailyPartitions
from marketflow.stores.postgres.retention import Retention
from marketflow.stores.postgres.rows import DAY_MS, reason, to_datetime

if TYPE_CHECKING:
    import psycopg

    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

LATE_MS = 10 * 60_000
"""How long after its end a day is rolled up; minutes written later mark it again, which costs a second roll-up."""

STEP_SECONDS = 0.1
"""Time after which a call ends with its running transaction; a transaction aims at half of it."""

MOST_DAYS = 64
"""Marks that one transaction replaces at most."""

REJECTED_SECONDS = 600.0
"""Time until a day that PostgreSQL rejected is tried again."""

_DAY = timedelta(days=1)

_ALWAYS = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

_Mark = tuple[str, str, str, datetime]

# A wait for a lock must not take longer than the work. A truncation locks the minutes first, so they are locked first.
# Not its partitions: each has to wait for the table as well.
_BEGIN = "set local lock_timeout = 200; lock table only aggregates in access share mode"

_TO_DO = """
select rolled_until, exists (select from aggregates_daily where not hourly and timestamp < '2200-01-01 00:00:00+00'),
       partitioned_from
from aggregates_rolled_until
"""

_ROLLED = "select rolled_until from aggregates_rolled_until for update"

# The newest first: they are queried most.
_MARKED = """
select exchange, pair_name, mode, timestamp from aggregates_daily
where not hourly and timestamp >= '1970-01-01 00:00:00+00' and timestamp < '2200-01-01 00:00:00+00'
  and (exchange, pair_name, mode, timestamp) not in (
    select * from unnest(%s::text[], %s::text[], %s::text[], %s::timestamptz[])
  )
order by timestamp desc, exchange, pair_name, mode limit %s for update skip locked
"""

_OF_SERIES = "exchange = marked.exchange and pair_name = marked.pair_name and mode = marked.mode"
_OF_DAY = f"{_OF_SERIES} and timestamp >= marked.day and timestamp < marked.day + interval '24 hours'"

# The days of all marks together, by which partitions are left out of the plan.
_OF_DAYS = "timestamp >= %(since)s::timestamptz and timestamp < %(until)s::timestamptz"

_MARKS = """
unnest(%(exchange)s::text[], %(pair_name)s::text[], %(mode)s::text[], %(day)s::timestamptz[])
as marked (exchange, pair_name, mode, day)
"""

_IS_MARKED = """
(daily.exchange, daily.pair_name, daily.mode, daily.timestamp)
= (marked.exchange, marked.pair_name, marked.mode, marked.day)
"""

# One by one: for all marks at once the planner chooses to read the whole table.
_FORGET_HOURS = """
delete from aggregates_hourly where exchange = %s and pair_name = %s and mode = %s
and timestamp >= %s::timestamptz and timestamp < %s::timestamptz + interval '24 hours'
"""


def _of_hour(column: str, at: str, start: str) -> str:
    """Join price and time of the minute that starts at `start`."""
    return f"""
        cross join lateral (
            select {column} as price, {time_of(at)} as at
            from aggregates where {_OF_SERIES} and timestamp = {start} and {_OF_DAYS} limit 1
        )
    """  # noqa: S608


def _average(low: str, high: str) -> str:
    """The mean of all ticks, limited to the extremes; null where the number of none of them is known."""
    return f"case when ticks > 0 then greatest({low}, least({high}, total / ticks::float8)) end"


# Two passes over all minutes of a day: hour by hour, as `candle_select` does it, takes five times as long.
_MAKE_HOURS = f"""
insert into aggregates_hourly (
    exchange, pair_name, mode, timestamp, average_price, min_price, max_price, open_price, close_price,
    tick_count, open_at, close_at, min_at, max_at, {SUMMED}
)
select exchange, pair_name, mode, hours.*
from {_MARKS} cross join lateral (
    with minutes as materialized (
        select timestamp, {TOTAL_OF_ROW} as total, min_price, max_price, tick_count, {SUMMED},
               date_bin(interval '1 hour', timestamp, marked.day) as hour
        from aggregates where {_OF_DAY} and {_OF_DAYS} and {VALID}
    ), whole as materialized (
        select hour, sum(total) as total, coalesce(sum(tick_count), 0)::int8 as ticks,
               min(min_price) as low, max(max_price) as high, min(timestamp) as first, max(timestamp) as last, {SUMS}
        from minutes group by hour
    ), extremes as materialized (
        select hour, min(timestamp) filter (where min_price = low) as lowest,
               min(timestamp) filter (where max_price = high) as highest
        from minutes join whole using (hour) group by hour
    )
    select hour, {_average("whole.low", "whole.high")}, low.price, high.price, opening.price, closing.price, ticks,
           opening.at, closing.at, low.at, high.at, {SUMMED}
    from whole join extremes using (hour)
    {_of_hour("open_price", "open_at", "first")} as opening
    {_of_hour("close_price", "close_at", "last")} as closing
    {_of_hour("min_price", "min_at", "lowest")} as low
    {_of_hour("max_price", "max_at", "highest")} as high
) as hours
"""  # noqa: S608

_REPLACE = f"""
update aggregates_daily as daily set
    average_price = {_average("low", "high")}, min_price = low, max_price = high,
    open_price = open, close_price = close,
    tick_count = ticks, open_at = first_at, close_at = last_at, min_at = low_at, max_at = high_at,
    ({SUMMED}) = ({", ".join(f"candle.{name}" for name in SUMMED.split(", "))}), hourly = true
from {_MARKS} cross join lateral ({candle_select("aggregates_hourly", _OF_DAY)}) as candle
where {_IS_MARKED}
"""  # noqa: S608

_REMOVE = f"delete from aggregates_daily as daily using {_MARKS} where {_IS_MARKED} and not hourly"  # noqa: S608

# An index scan for each series, along the primary key: its first minute from `rolled_until` on.
_SCANNED = "timestamp >= %(first)s::timestamptz and timestamp < %(end)s::timestamptz"
_MOVE = f"""
with {recursive_series(condition=_SCANNED)}, upcoming as materialized (
    select series.*, date_trunc('day', minute.timestamp, 'UTC') as day from series cross join lateral (
        select timestamp from aggregates
        where exchange = series.exchange and pair_name = series.pair_name and mode = series.mode
          and timestamp >= %(rolled)s and timestamp < %(until)s
        order by timestamp limit 1
    ) as minute
), nearest as (
    select min(day) as day from upcoming
), marked as (
    insert into aggregates_daily (exchange, pair_name, mode, timestamp)
    select exchange, pair_name, mode, day from upcoming join nearest using (day)
    on conflict (exchange, pair_name, mode, timestamp) do update set tick_count = null, hourly = false
)
update aggregates_rolled_until set rolled_until = coalesce((select day + interval '24 hours' from nearest), %(until)s)
"""  # noqa: S608 - put together from constants


class PostgresRollups:
    """Makes hourly and daily candles; for one thread at a time.

    Args:
        keywords: of the connection, see connection_keywords.
        monotonic: measures the work, in seconds.
        retention: deletes what is rolled up and old; None keeps everything.
    """

    def __init__(
        self,
        keywords: dict[str, Any],
        monotonic: Callable[[], float] = time.monotonic,
        retention: Retention | None = None,
    ) -> None:
        self._connection = ReconnectingConnection(keywords)
        self._retention = retention or Retention()
        self._monotonic = monotonic
        self._batch = MOST_DAYS // 8
        self._rejected: dict[_Mark, float] = {}  # until when they are skipped (monotonic)
        self._limit = RateLimit(60.0)
        self._partitions = DailyPartitions(monotonic)

    def roll_up(self, now_ms: int) -> bool:
        """Work for STEP_SECONDS on the days that are over at `now_ms` (Unix ms); return whether more is to be done.

        Raises:
            Unavailable: PostgreSQL is down or rejects the work. Earlier steps are done, and every answer is exact.
        """
        until = to_datetime((now_ms - LATE_MS) // DAY_MS * DAY_MS)
        end = self._monotonic() + STEP_SECONDS
        with self._connection.opened() as connection:
            while (found := _to_do(connection)) is not None:
                rolled, marked, partitioned_from = found
                if partitioned_from is not None:
                    self._partitions.add(connection, now_ms)
                # Marks that are locked or were rejected do not block the rest.
                if marked and self._replace(connection):
                    pass
                elif rolled < until:
                    _move(connection, until, partitioned_from)
                elif not self._retention.step(connection, now_ms):
                    break
                if self._monotonic() >= end:
                    return True
        return False

    def close(self) -> None:
        """Close the connection; a running step is rolled back, and left to the next run."""
        self._connection.close()

    def _replace(self, connection: "BoundedConnection") -> int:
        """Replace some marks by candles, or remove them where no minute is left; return how many."""
        began, batch = self._monotonic(), self._batch
        self._batch = max(1, batch // 2)  # for the case that this one takes too long and fails
        for mark in [mark for mark, until in self._rejected.items() if until <= began]:
            del self._rejected[mark]
        rejected = [[mark[n] for mark in self._rejected] for n in range(4)]
        with connection.pinned():
            connection.execute(_BEGIN)
            marked = connection.execute(_MARKED, [*rejected, batch], binary=True).fetchall()
            if marked:
                self._make(connection, marked)
        quick = self._monotonic() - began < STEP_SECONDS / 4
        slow = self._monotonic() - began > STEP_SECONDS / 2
        self._batch = min(MOST_DAYS, batch * 2) if quick else max(1, batch // 2) if slow else batch
        return len(marked)

    def _make(self, connection: "BoundedConnection", marked: list[_Mark]) -> None:
        """Roll up the days of marks; one by one after a rejection, so that one day does not block the others."""
        import psycopg

        try:
            with connection.transaction():  # a savepoint
                make(connection, marked)
            return
        except psycopg.Error as error:
            if isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)):
                raise
            if len(marked) == 1:
                self._refuse(marked[0], error)
                return
        for mark in marked:
            self._make(connection, [mark])

    def _refuse(self, mark: _Mark, error: "psycopg.Error") -> None:
        """Skip a mark for a while; queries of its day read the minutes."""
        exchange, symbol, mode, day = mark
        self._rejected[mark] = self._monotonic() + REJECTED_SECONDS
        text = (
            f"PostgreSQL refuses to roll up {mode}:{exchange}:{symbol} of {day:%Y-%m-%d}, tried again: {reason(error)}"
        )
        self._limit.log((exchange, symbol, mode), "ERROR", text, exchange=exchange)


def _to_do(connection: "BoundedConnection") -> tuple[datetime, bool, datetime | None] | None:
    """Until when minutes are rolled up, whether there are marks, and from when on there are daily partitions, if any.

    None before the tables exist.
    """
    with connection.pinned():
        return connection.execute(_TO_DO, binary=True).fetchone()


def make(connection: "psycopg.Connection[Any]", marked: list[_Mark]) -> None:
    """Make the hours and days of locked marks, or remove the marks where no minute is left.

    Separate statements after the locking one: each sees all that was committed before the marks were locked.
    """
    connection.cursor().executemany(_FORGET_HOURS, [(*mark, mark[-1]) for mark in marked])
    columns = dict(zip(("exchange", "pair_name", "mode", "day"), map(list, zip(*marked, strict=True)), strict=True))
    days = [day for *_, day in marked]
    wanted = {**columns, "since": min(days), "until": max(days) + _DAY}
    for statement in (_MAKE_HOURS, _REPLACE, _REMOVE):
        connection.execute(statement, wanted)


def _move(connection: "BoundedConnection", until: datetime, partitioned_from: datetime | None) -> None:
    """Move `rolled_until` past the next day that has minutes, marking its series, or to `until`.

    Where there are daily partitions no further than to the end of one: to look for the series in many at once takes
    seconds.
    """
    with connection.pinned():
        connection.execute(_BEGIN)
        # Another writer may have moved it while this one waited.
        (rolled,) = connection.execute(_ROLLED, binary=True).fetchone() or (until,)
        if rolled < until:
            first, end = _ALWAYS
            if partitioned_from is not None:
                first, end = (first, partitioned_from) if rolled < partitioned_from else (rolled, rolled + _DAY)
            bounds = {"rolled": rolled, "until": min(until, end), "first": first, "end": end}
            connection.execute(_MOVE, bounds)
