"""Writes the archive in PostgreSQL: minute rows, upserted by the pipeline on one connection.

A commit whose answer is lost may have happened, so a write is absolute: the version with more ticks stays, and
repeating or reordering writes changes nothing. Many rows are written in several transactions, the oldest minutes first,
so that an outage or a stop costs only the last of them. The rows of each are sorted by their key, so that two writers
wait for each other instead of deadlocking. Rows of days that are rolled up lock the marks of their days as well,
statement by statement, in turns with rows: an advisory lock serializes the transactions that write such rows.

JSON and not COPY: 100,000 rows take 1.8 s on one connection (PostgreSQL 15 and 18, two cores), a hundredth of the time
in which 15,000 series make them.
"""

from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loguru import logger

from marketflow.errors import Unavailable
from marketflow.logs import RateLimit
from marketflow.model import Candle, Candles, Mode, Series, Slot
from marketflow.stores.ports import RowsWritten
from marketflow.stores.postgres.candle_sql import SUMMED, TOTAL_OF_ROW, VALID, time_of
from marketflow.stores.postgres.connections.reconnecting_connection import ReconnectingConnection
from marketflow.stores.postgres.rows import FIRST_PARTITION, candle_of_row, json_rows, reason, to_datetime, to_unix_ms

if TYPE_CHECKING:
    from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection

_Row = tuple[Slot, Candle]
_Rejected = tuple[Slot, Exception]


class _Outcome(NamedTuple):
    """What became of the rows of a transaction: which were rejected, which failed otherwise, which are not written."""

    rejected: list[_Rejected]
    unknown: list[_Rejected]
    pending: AbstractSet[Slot]


_COLUMNS = """
pair_name, exchange, mode, timestamp, average_price, min_price, max_price, open_price, close_price, tick_count,
open_at, close_at, min_at, max_at, version, volume, turnover, buy_volume, buy_turnover, source, verified, venue_values
"""


def _moment(column: str) -> str:
    """SQL of a time that is given in Unix ms; exact, as whole microseconds of an interval are.

    The cast leaves no choice of operators: one of a stranger that takes int8 would be found before the system's.
    """
    return f"timestamptz 'epoch' + {column}::float8 * interval '1 millisecond'"


# Of two versions with as many ticks that made of ticks replaces the venue's own ('ticks' < 'venue'), and one that is
# verified, or not, one of which that is unknown.
_UPSERT = f"""
insert into aggregates ({_COLUMNS})
select pair_name, exchange, mode, {_moment("timestamp")}, average_price, min_price, max_price, open_price, close_price,
       tick_count, {_moment("open_at")}, {_moment("close_at")}, {_moment("min_at")}, {_moment("max_at")}, version,
       volume, turnover, buy_volume, buy_turnover, source, verified, venue_values
from json_to_recordset(%s::json) as written (
    pair_name text, exchange text, mode text, timestamp int8, average_price float8, min_price float8, max_price float8,
    open_price float8, close_price float8, tick_count int8, open_at int8, close_at int8, min_at int8, max_at int8,
    version int4, volume float8, turnover float8, buy_volume float8, buy_turnover float8, source text, verified bool,
    venue_values float8[]
)
on conflict (exchange, pair_name, mode, timestamp) do update set
    average_price = excluded.average_price, min_price = excluded.min_price, max_price = excluded.max_price,
    open_price = excluded.open_price, close_price = excluded.close_price, tick_count = excluded.tick_count,
    open_at = excluded.open_at, close_at = excluded.close_at, min_at = excluded.min_at, max_at = excluded.max_at,
    version = greatest(aggregates.version, excluded.version), volume = excluded.volume, turnover = excluded.turnover,
    buy_volume = excluded.buy_volume, buy_turnover = excluded.buy_turnover, source = excluded.source,
    verified = excluded.verified, venue_values = excluded.venue_values
where coalesce(excluded.tick_count, int8 '0') > coalesce(aggregates.tick_count, int8 '0')
   or coalesce(excluded.tick_count, int8 '0') = coalesce(aggregates.tick_count, int8 '0') and (
      excluded.source < aggregates.source
      or excluded.source = aggregates.source and excluded.verified is not null
         and excluded.verified is distinct from aggregates.verified
   )
"""  # noqa: S608 - put together from constants

_VERSIONS_KEPT = "select pg_catalog.set_config('marketflow.versions', 'kept', true)"
"""Updates of the transaction keep the version of the written row (ddl/0007)."""

_BEGIN = f"""
{_VERSIONS_KEPT}, (
    select pg_catalog.pg_advisory_xact_lock(int8 '7364017242')
    from aggregates_rolled_until where rolled_until > %s::timestamptz
)
"""  # noqa: S608 - put together from constants
"""The same, and the transaction waits for others that may set marks. Given the time of its first row."""

_SERIES_A_READ = 1000

BATCHES_AT_ONCE = 10
"""Batches that are sent before their answers are read: beside busy threads 15,000 rows take half the time. No more, for
all answers must come within the limit of one.
"""

ROWS_A_TRANSACTION = 2000
"""Rows of a transaction, unless a statement has more."""

MOST_SUSPECTS = 100
"""Rows that fail for an uncertain reason, after which one attempt ends."""

_RECENT = f"""
select mode, exchange, pair_name, timestamp, {TOTAL_OF_ROW}, coalesce(tick_count, int8 '0'), max_price, min_price,
       open_price, close_price, {time_of("open_at")}, {time_of("close_at")}, {time_of("max_at")}, {time_of("min_at")},
       {SUMMED}, venue_values
from unnest(%s::text[], %s::text[], %s::text[]) as wanted (mode, exchange, pair_name)
join aggregates using (mode, exchange, pair_name)
where timestamp >= %s and timestamp < timestamptz '2200-01-01 00:00:00+00' and {VALID}
"""  # noqa: S608 - put together from constants


class PostgresWriter:
    """Writes minute rows; for one thread at a time.

    Args:
        keywords: of the connection, see connection_keywords.
        ddl: folder of the migrations, applied on the first connection.
        batch_size: rows per statement.
    """

    def __init__(self, keywords: dict[str, Any], ddl: Path, batch_size: int) -> None:
        self._connection = ReconnectingConnection(keywords)
        self._ddl = ddl
        self._batch_size = batch_size
        self._ready = self._logged = self._reported = False
        self._limit = RateLimit(10.0)
        self._suspects: dict[Slot, None] = {}  # rows that failed, those of the last attempt first

    @property
    def available(self) -> bool:
        """Whether the last write succeeded."""
        return self._ready

    def write(self, minutes: Candles, on_written: RowsWritten | None = None) -> int:
        """Upsert rows in transactions of ROWS_A_TRANSACTION, those of the oldest minutes first.

        The more complete version of a row stays. Rows that PostgreSQL rejects are logged and dropped. Connects and
        brings the schema up to date where needed, without any rows as well.

        Args:
            minutes: the rows.
            on_written: called after each transaction.

        Returns:
            how many rows were rejected.

        Raises:
            Unavailable: PostgreSQL is down or did not confirm; write the rows again that `on_written` was not given.
        """
        total = 0
        unknown: list[_Rejected] = []
        with self._connected() as connection:
            for rows in self._transactions(minutes):
                rejected, failed, pending = self._upsert(connection, rows, MOST_SUSPECTS - len(unknown))
                unknown += failed
                if not unknown:
                    self._succeeded()
                for slot, error in rejected:
                    self._log_rejected(slot, error)
                total += len(rejected)
                if on_written is not None:
                    on_written({slot: candle for slot, candle in rows if slot not in pending}, len(rejected))
                if len(unknown) >= MOST_SUSPECTS:
                    break
            self._note_suspects(unknown, minutes)
        return total

    def recent(self, series: Iterable[Series], since: int) -> Candles:
        """The rows of these series whose minutes start at `since` (Unix ms) or later.

        Raises:
            Unavailable: PostgreSQL is down.
        """
        wanted = [[each.mode.value, each.exchange, each.symbol] for each in series]
        found: Candles = {}
        with self._connected() as connection, connection.pinned():
            # In batches: the rows of ten thousand series take longer than the limit of one answer.
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
    def _connected(self) -> "Iterator[BoundedConnection]":
        """The connection, with the schema up to date; any error closes it and becomes Unavailable."""
        from marketflow.stores.postgres.migrations import REPORT_SECONDS, apply_ddl  # with psycopg

        try:
            with self._connection.opened() as connection:
                if not self._ready:
                    # Only once: after an outage rows are pending.
                    apply_ddl(connection, self._ddl, 0 if self._reported else REPORT_SECONDS)
                    self._reported = True
                yield connection
        except Unavailable:
            self._ready = False  # the database may be another one after an outage
            self._logged = True  # the pipeline logs start and end of an outage
            raise

    def _transactions(self, minutes: Candles) -> Iterator[list[_Row]]:
        """The rows of each transaction, sorted by their key; one without rows if there are none."""
        size = max(ROWS_A_TRANSACTION, self._batch_size)
        # Rows that failed come last, so that they never block those behind them.
        rows = sorted(minutes.items(), key=lambda row: (row[0] in self._suspects, row[0].start))
        for begin in range(0, max(1, len(rows)), size):
            yield sorted(
                rows[begin : begin + size], key=lambda row: (row[0].series.exchange, row[0].series.symbol, *row[0])
            )

    def _succeeded(self) -> None:
        self._ready = True
        if not self._logged:
            self._logged = True
            logger.info("PostgreSQL is ready")

    def _note_suspects(self, unknown: list[_Rejected], minutes: Candles) -> None:
        """Note which rows failed for an uncertain reason.

        Raises:
            Unavailable: some did.
        """
        if not unknown:
            self._suspects.clear()
            return
        # Kept: the schema or a right may be wrong. The others are written by now.
        before = {slot: None for slot in self._suspects if slot in minutes}
        self._suspects = {slot: None for slot, _ in unknown} | before
        count = f"{len(unknown)}{' or more' if len(unknown) == MOST_SUSPECTS else ''} of {len(minutes)}"
        text = f"{count} rows cannot be written and are tried again: {reason(unknown[0][1])}"
        raise Unavailable(text) from unknown[0][1]

    def _upsert(self, connection: "BoundedConnection", rows: list[_Row], most_suspects: int) -> _Outcome:
        """Write rows in one transaction, batch by batch.

        A failing row does not block the others. Savepoints are used only after a failure: beside busy threads each
        round trip takes many milliseconds.
        """
        try:
            with _writing(connection, rows):
                self._upsert_all(connection, rows)
        except Exception as error:
            if _is_outage(error):
                raise
            with _writing(connection, rows):
                return self._isolate(connection, rows, most_suspects)
        return _Outcome([], [], frozenset())

    def _upsert_all(self, connection: "BoundedConnection", rows: list[_Row]) -> None:
        """Write rows, several batches at a time without waiting for the answer to each; the first error is raised."""
        batches = self._batches(rows)
        while some := list(islice(batches, BATCHES_AT_ONCE)):
            with connection.pipeline() if len(some) > 1 else nullcontext():
                for batch in some:
                    connection.execute(_UPSERT, [json_rows(batch)])

    def _isolate(self, connection: "BoundedConnection", rows: list[_Row], most_suspects: int) -> _Outcome:
        """Write what can be written, halving the batches that fail.

        After `most_suspects` rows that failed for an uncertain reason the rest is not tried: where every row fails,
        that takes minutes. They are tried last the next time, so that they never block the rows behind them.
        """
        rejected: list[_Rejected] = []
        unknown: list[_Rejected] = []
        last = {slot: number for number, slot in enumerate(reversed(self._suspects))}
        waiting = [*self._batches(sorted(rows, key=lambda row: last.get(row[0], -1)))]
        waiting.reverse()
        while waiting and len(unknown) < most_suspects:
            batch = waiting.pop()
            try:
                with connection.transaction():  # a savepoint
                    connection.execute(_UPSERT, [json_rows(batch)])
            except Exception as error:
                if _is_outage(error):
                    raise
                if len(batch) > 1:
                    half = len(batch) // 2
                    waiting += [batch[half:], batch[:half]]
                else:
                    (rejected if _is_rejection(error) else unknown).append((batch[0][0], error))
        pending = {slot for slot, _ in unknown} | {slot for batch in waiting for slot, _ in batch}
        return _Outcome(rejected, unknown, pending)

    def _batches(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        remaining = iter(rows)
        while batch := list(islice(remaining, self._batch_size)):
            yield batch

    def _log_rejected(self, slot: Slot, error: Exception) -> None:
        mode, exchange, symbol = slot.series
        import psycopg

        why = reason(error) if isinstance(error, psycopg.Error) else error
        place = f"{mode}:{exchange}:{symbol}, minute {slot.start} (Unix ms)"
        text = f"PostgreSQL refuses a row, which is dropped; Redis has it for a day: {place}: {why}"
        self._limit.log(slot.series, "ERROR", text, exchange=exchange)


@contextmanager
def _writing(connection: "BoundedConnection", rows: list[_Row]) -> Iterator[None]:
    """Run a transaction that writes rows."""
    with connection.pinned():
        if rows:
            connection.execute(_BEGIN, [to_datetime(min(slot.start for slot, _ in rows))])
        else:  # there may be no tables yet
            connection.execute(_VERSIONS_KEPT)
        yield


def _is_rejection(error: Exception) -> bool:
    """Whether an error is certainly caused by the row; any other is the row's if other rows are accepted.

    It breaks a constraint or trigger that the owner of the table may have added, or its candle fits no row at all.
    """
    from psycopg import DataError, IntegrityError, errors

    of_owner = errors.RaiseException, errors.WithCheckOptionViolation
    if isinstance(error, errors.CheckViolation) and error.diag.constraint_name == FIRST_PARTITION:
        return False  # left by a conversion that was killed: the row is right
    return isinstance(error, (DataError, IntegrityError, *of_owner, ValueError, ArithmeticError))


def _is_outage(error: Exception) -> bool:
    """Whether server or connection failed, so that trying rows one by one is useless."""
    import psycopg

    too_large = isinstance(error, psycopg.errors.ProgramLimitExceeded)  # a row, in an index say
    return isinstance(error, (psycopg.OperationalError, psycopg.InterfaceError)) and not too_large
