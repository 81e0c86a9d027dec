"""The archive in PostgreSQL, as the flow writes it: minute rows, upserted on one connection.

A commit whose answer is lost may have happened, so a row is written absolutely: the version with more ticks stays,
and repeating or reordering writes changes nothing. Rows go in the order of their key; two writers then wait for each
other instead of deadlocking.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psycopg
from loguru import logger

from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Candle, Candles, Mode, Series, Slot
from marketflow.stores.postgres.bounded_connection import BoundedConnection, ReconnectingConnection
from marketflow.stores.postgres.candle_sql import VALID, time_of
from marketflow.stores.postgres.migrations import REPORT_SECONDS, apply_ddl
from marketflow.stores.postgres.rows import candle_of_row, columns, reason, to_datetime, to_unix_ms

# What is wrong with a row for certain, and not with PostgreSQL: it breaks a constraint or trigger that the owner of the
# table may have added, or its candle cannot become a row at all. Any other error is a row's when other rows pass.
_REFUSALS = (
    psycopg.DataError,
    psycopg.IntegrityError,
    psycopg.errors.RaiseException,
    psycopg.errors.WithCheckOptionViolation,
    ValueError,
    ArithmeticError,
)

_Row = tuple[Slot, Candle]
_Refused = tuple[Slot, Exception]

_UPSERT = """
insert into aggregates (
    pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price, close_price, tick_count,
    open_at, close_at, min_at, max_at, version
)
select * from unnest(
    %s::text[], %s::text[], %s::text[], %s::timestamptz[],
    %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::float8[], %s::int8[],
    %s::timestamptz[], %s::timestamptz[], %s::timestamptz[], %s::timestamptz[], %s::int4[]
)
on conflict (exchange, pair_name, mode, timestamp) do update set
    average_price = excluded.average_price, min_price = excluded.min_price, max_price = excluded.max_price,
    open_price = excluded.open_price, close_price = excluded.close_price, tick_count = excluded.tick_count,
    open_at = excluded.open_at, close_at = excluded.close_at, min_at = excluded.min_at, max_at = excluded.max_at,
    version = excluded.version
where excluded.tick_count > aggregates.tick_count
"""

_SERIES_A_READ = 1000

MOST_SUSPECTS = 100
"""How many rows one attempt may find that cannot be written for a reason that may not be theirs."""

_RECENT = f"""
select mode, exchange, pair_name, timestamp, average_price * tick_count::float8, tick_count, max_price, min_price,
       open_price, close_price, {time_of("open_at")}, {time_of("close_at")}, {time_of("max_at")}, {time_of("min_at")},
       version
from unnest(%s::text[], %s::text[], %s::text[]) as wanted (mode, exchange, pair_name)
join aggregates using (mode, exchange, pair_name)
where timestamp >= %s and timestamp < timestamptz '2200-01-01 00:00:00+00' and {VALID}
"""  # noqa: S608 - put together from constants


class PostgresWriter:
    """Writes minute rows; for one thread at a time.

    Args:
        keywords: of the connection, see connection_keywords.
        ddl: folder of the schema, applied on the first connection.
        batch_size: rows a statement.
    """

    def __init__(self, keywords: dict[str, Any], ddl: Path, batch_size: int) -> None:
        self._connection = ReconnectingConnection(keywords)
        self._ddl = ddl
        self._batch_size = batch_size
        self._ready = self._logged = self._reported = False
        self._limit = RateLimit(10.0)
        self._suspects: dict[Slot, None] = {}  # rows that could not be written, those of the last attempt first

    @property
    def available(self) -> bool:
        """Whether the last write got through."""
        return self._ready

    def write(self, minutes: Candles) -> int:
        """Upsert rows in one transaction; the more complete version of a row stays.

        A row that PostgreSQL refuses is told and given up; gives how many were. Connects and brings the schema up to
        date when that is needed, without any rows as well.

        Raises:
            Unavailable: PostgreSQL is away or did not confirm. Writing the same rows again is right.
        """
        rows = sorted(minutes.items(), key=lambda item: (item[0].series.exchange, item[0].series.symbol, *item[0]))
        with self._connected() as connection:
            refused = self._upsert(connection, rows)
        self._ready = True
        if not self._logged:
            self._logged = True
            logger.info("PostgreSQL is ready")
        for slot, error in refused:
            self._tell_refused(slot, error)
        return len(refused)

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """The rows of these series whose minutes start at `since` (Unix ms) or later.

        Raises:
            Unavailable: PostgreSQL is away.
        """
        wanted = [[each.mode.value, each.exchange, each.symbol] for each in series]
        found: Candles = {}
        with self._connected() as connection, connection.pinned():
            # A few at a time: what ten thousand series have takes longer than an answer may.
            for begin in range(0, len(wanted), _SERIES_A_READ):
                names = [list(column) for column in zip(*wanted[begin : begin + _SERIES_A_READ], strict=True)]
                rows = connection.execute(_RECENT, [*names, to_datetime(since)], binary=True)
                for mode, exchange, symbol, minute, *amounts in rows:
                    slot = Slot(Series(Mode(mode), exchange, symbol), to_unix_ms(minute))
                    found[slot] = candle_of_row((*amounts,))
        return found

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    @contextmanager
    def _connected(self) -> Iterator[BoundedConnection]:
        """The connection, with the schema up to date; any error of psycopg ends it and becomes Unavailable."""
        try:
            with self._connection.opened() as connection:
                if not self._ready:
                    # Once: after an outage rows are waiting.
                    apply_ddl(connection, self._ddl, 0 if self._reported else REPORT_SECONDS)
                    self._reported = True
                yield connection
        except Unavailable:
            self._ready = False  # the database may come back as another one
            self._logged = True  # the flow logs the beginning of an outage and its end
            raise

    def _upsert(self, connection: BoundedConnection, rows: list[_Row]) -> list[_Refused]:
        """Write rows, batch by batch; gives those that were refused, each with the reason.

        Rows are written whatever is wrong with others.

        With savepoints only where that finds one: beside busy threads each round trip takes many milliseconds.
        """
        try:
            with _versions_kept(connection):
                for batch in self._batches(rows):
                    connection.execute(_UPSERT, columns(batch))
        except Exception as error:
            if _is_outage(error):
                raise
            with _versions_kept(connection):
                refused, unknown = self._isolate(connection, rows)
            if unknown:
                # Not given up: it may be the schema or a right that is wrong. The others are written by now.
                waiting = {slot for slot, _ in rows}
                before = {slot: None for slot in self._suspects if slot in waiting}
                self._suspects = {slot: None for slot, _ in unknown} | before
                count = f"{len(unknown)}{' or more' if len(unknown) == MOST_SUSPECTS else ''} of {len(rows)}"
                text = f"{count} rows cannot be written and are tried again: {reason(unknown[0][1])}"
                raise Unavailable(text) from unknown[0][1]
            return refused
        self._suspects.clear()
        return []

    def _isolate(self, connection: BoundedConnection, rows: list[_Row]) -> tuple[list[_Refused], list[_Refused]]:
        """Write what can be written, halving the batches that fail; gives rows refused for certain, and the others.

        After MOST_SUSPECTS of the latter the rest is not tried: where the fault is every row's, that takes minutes.
        They are the last to be tried the next time, so that no number of them holds up the rows behind them.
        """
        refused: list[_Refused] = []
        unknown: list[_Refused] = []
        last = {slot: number for number, slot in enumerate(reversed(self._suspects))}
        waiting = [*self._batches(sorted(rows, key=lambda row: last.get(row[0], -1)))]
        waiting.reverse()
        while waiting and len(unknown) < MOST_SUSPECTS:
            batch = waiting.pop()
            try:
                with connection.transaction():  # a savepoint
                    connection.execute(_UPSERT, columns(batch))
            except Exception as error:
                if _is_outage(error):
                    raise
                if len(batch) > 1:
                    half = len(batch) // 2
                    waiting += [batch[half:], batch[:half]]
                else:
                    (refused if isinstance(error, _REFUSALS) else unknown).append((batch[0][0], error))
        return refused, unknown

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        remaining = iter(rows)
        while batch := list(islice(remaining, self._batch_size)):
            yield batch

    def _tell_refused(self, slot: Slot, error: Exception) -> None:
        mode, exchange, symbol = slot.series
        why = reason(error) if isinstance(error, psycopg.Error) else error
        place = f"{mode}:{exchange}:{symbol}, minute {slot.start} (Unix ms)"
        text = f"PostgreSQL refuses a row, which is given up; Redis has it for a day: {place}: {why}"
        self._limit.log(slot.series, "ERROR", text, exchange=exchange)


@contextmanager
def _versions_kept(connection: BoundedConnection) -> Iterator[None]:
    """Run a transaction whose updates keep the version of the written row (ddl/0007)."""
    with connection.pinned():
        connection.execute("select pg_catalog.set_config('marketflow.versions', 'kept', true)")
        yield


def _is_outage(error: Exception) -> bool:
    """Whether the server or the connection is to blame, so that there is no use in trying rows one by one."""
    too_large = isinstance(error, psycopg.errors.ProgramLimitExceeded)  # a row, in an index say
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) and not too_large
