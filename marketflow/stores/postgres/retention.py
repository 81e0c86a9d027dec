"""Retention: deletes old minutes from the archive, and later their hours and days.

A minute is deleted when its day is rolled up and as old as `archive.keep_minutes`, and holes with it; its day and hours
when they are as old as `archive.keep_days`. `kept_from` (ddl/0004_trigger_rights.sql) is moved first, so that the
triggers do not take the deletion for a change of the day, and never past a day that is not rolled up. Rows are deleted
in batches along the primary key, so no writer waits. In a partitioned table a ctid is not unique: the condition on the
time protects the rows of other partitions. Daily partitions (ddl/0012_partitions.sql) are dropped as soon as they lie
before `kept_from`; only rows of the first and of the default partition are deleted.

A clock that is set far ahead must not delete everything: days are counted back from the earliest of this machine's
clock, PostgreSQL's, and the end of the last day before today that has minutes.
"""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from marketflow.logs import RateLimit
from marketflow.model import Mode
from marketflow.stores.postgres.candle_sql import recursive_series
from marketflow.stores.postgres.partitioning.daily_partitions import PartitionInUse, drop_partition
from marketflow.stores.postgres.rows import DAY_MS, to_datetime, to_unix_ms

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

ROWS_A_STEP = 5_000
"""Rows that one transaction deletes at most."""

CLOCKS_APART = timedelta(hours=1)
"""Difference of the clocks above which it is logged."""

_NO_END = datetime.max.replace(tzinfo=UTC)

_CLOCK = "select now()"

# Of days, which are far fewer than minutes: before the retention runs, each day with minutes has a row.
_NEWEST = f"""
with {recursive_series("aggregates_daily")}
select max(day.timestamp) from series cross join lateral (
    select timestamp from aggregates_daily
    where exchange = series.exchange and pair_name = series.pair_name and mode = series.mode and timestamp < %s
    order by timestamp desc limit 1
) as day
"""  # noqa: S608 - put together from constants

# Changes of older minutes set marks: they wait for this lock, or the next statement sees their marks.
_LOCK = "select kept_from from aggregates_rolled_until for update"

_KEPT_FROM = "select kept_from, partitioned_from from aggregates_rolled_until"

_KEEP_FROM = """
update aggregates_rolled_until set kept_from = greatest(kept_from, least(rolled_until, %(before)s::timestamptz, (
    select min(timestamp) from aggregates_daily where not hourly and timestamp >= kept_from
)))
where kept_from < %(before)s::timestamptz
"""

_OLDEST = f"""
with {recursive_series(condition="timestamp < %(scanned)s::timestamptz")}
delete from aggregates where ctid = any (array(
    select minute.ctid from series cross join lateral (
        select ctid from aggregates
        where exchange = series.exchange and pair_name = series.pair_name and mode = series.mode
          and timestamp < %(ended)s::timestamptz
        order by timestamp limit {ROWS_A_STEP}
    ) as minute limit {ROWS_A_STEP}
)) and timestamp < %(ended)s::timestamptz
"""  # noqa: S608 - put together from constants

_ROLLED_UP = f"""
delete from {{table}} where ctid = any (array(
    select ctid from {{table}} where timestamp < %s limit {ROWS_A_STEP}
)) and timestamp < %s
"""  # noqa: S608


_HOLES = f"""
delete from holes where ctid = any (array(
    select ctid from holes where mode = any(%s) and from_time < %s and to_time < %s limit {ROWS_A_STEP}
))
"""  # noqa: S608


class Retention:
    """Deletes rows by their age; for one thread at a time.

    Args:
        minutes_days: days for which minutes are kept; None is for ever.
        days_days: days for which hours and days are kept; None is for ever.
    """

    def __init__(self, minutes_days: int | None = None, days_days: int | None = None) -> None:
        self._minutes_ms = None if minutes_days is None else minutes_days * DAY_MS
        self._days_ms = None if days_days is None else days_days * DAY_MS
        self._done_until = 0  # midnight (Unix ms) up to which everything due is deleted
        self._counted_from = (0, 0)  # midnight by this machine's clock, and the confirmed one (Unix ms)
        self._limit = RateLimit(86_400.0)

    def step(self, connection: "BoundedConnection", now_ms: int) -> bool:
        """Delete a batch of rows; return whether there may be more. To be called when all days are rolled up.

        Raises:
            psycopg.Error: nothing was deleted by this step.
        """
        today = now_ms // DAY_MS * DAY_MS
        if today <= self._done_until or (self._minutes_ms is None and self._days_ms is None):
            return False
        if self._counted_from[0] != today:
            self._counted_from = today, self._confirmed_midnight(connection, now_ms)
        midnight = self._counted_from[1]
        more = False
        if self._minutes_ms is not None:
            before = to_datetime(midnight - self._minutes_ms)
            try:
                more = _delete_minutes(connection, before) or _delete_holes(connection, before)
            except PartitionInUse as error:
                self._limit.log("partition", "WARNING", f"an expired partition cannot be dropped yet: {error}")
                return False
        if self._days_ms is not None and not more:
            more = _delete_days(connection, to_datetime(midnight - self._days_ms))
        if not more:
            self._done_until = today
        return more

    def _confirmed_midnight(self, connection: "BoundedConnection", now_ms: int) -> int:
        """The latest midnight (Unix ms) by the earliest of this machine's clock, PostgreSQL's, and the stored minutes.

        Minutes of today do not count: this machine's clock has dated them.
        """
        now = to_datetime(now_ms)
        with connection.pinned():
            ((server,),) = connection.execute(_CLOCK, binary=True).fetchall()
            midnight = min(now_ms, to_unix_ms(server)) // DAY_MS * DAY_MS
            ((newest,),) = connection.execute(_NEWEST, [to_datetime(midnight)], binary=True).fetchall()
        if abs(server - now) > CLOCKS_APART:
            text = f"clocks differ, rows are kept by the earlier one: here {now:%FT%TZ}, PostgreSQL {server:%FT%TZ}"
            self._limit.log("clocks", "WARNING", text)
        return 0 if newest is None else min(midnight, to_unix_ms(newest) // DAY_MS * DAY_MS + DAY_MS)


def _delete_minutes(connection: "BoundedConnection", before: datetime) -> bool:
    kept_from, partitioned_from = _kept_from(connection)
    if kept_from < before:
        # A transaction of its own, as short as possible: writers of older minutes wait for it.
        with connection.pinned():
            connection.execute(_LOCK)
            connection.execute(_KEEP_FROM, {"before": before})
        kept_from, partitioned_from = _kept_from(connection)
    ended = min(before, kept_from)
    scanned = _NO_END
    if partitioned_from is not None:
        if drop_partition(connection):
            return True
        scanned = max(partitioned_from, ended)
    with connection.pinned():
        return connection.execute(_OLDEST, {"ended": ended, "scanned": scanned}).rowcount >= ROWS_A_STEP


def _kept_from(connection: "BoundedConnection") -> tuple[datetime, datetime | None]:
    """From when on minutes are kept, and from when on there are daily partitions, if any."""
    with connection.pinned():
        row = connection.execute(_KEPT_FROM, binary=True).fetchone()
    assert row is not None, "the table has one row"
    return row[0], row[1]


def _delete_holes(connection: "BoundedConnection", before: datetime) -> bool:
    """Delete holes whose minutes are deleted, open ones as well: nothing is left to be filled."""
    with connection.pinned():
        return connection.execute(_HOLES, [[mode.value for mode in Mode], before, before]).rowcount >= ROWS_A_STEP


def _delete_days(connection: "BoundedConnection", before: datetime) -> bool:
    with connection.pinned():
        deleted = [
            connection.execute(_ROLLED_UP.format(table=table), [before, before]).rowcount
            for table in ("aggregates_hourly", "aggregates_daily")
        ]
        return max(deleted) >= ROWS_A_STEP
