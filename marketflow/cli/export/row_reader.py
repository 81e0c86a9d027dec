"""Reads the rows of an export as CSV, series by series, in the order of the primary key.

COPY of one series reads one range of the index, which is in order. A single statement for all series could be planned
with a sort, which for a year of many series takes gigabytes on the server's disk.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
from psycopg import sql

from marketflow.cli.export.columns import TABLE, Kind
from marketflow.errors import SettingsError, Unavailable
from marketflow.model import Mode
from marketflow.stores.postgres.candle_sql import recursive_series
from marketflow.stores.postgres.connections.bounded_connection import BoundedConnection
from marketflow.stores.postgres.connections.session import connecting, pin, session_keywords
from marketflow.stores.postgres.rows import END_MS, OLDEST_MS, VENUE_VALUES, reason, to_datetime
from marketflow.text import rfc3339

READ_TIMEOUT_SECONDS = 30.0
"""Time without data after which PostgreSQL counts as unreachable."""

BLOCK_BYTES = 256 * 1024
"""Size of a block of rows."""

COLUMNS = tuple(column.name for column in TABLE)
TIMES = tuple(column.name for column in TABLE if column.kind is Kind.TIME)

_SERIES = """
with {series}
select series.exchange, series.pair_name, earliest.timestamp, latest.timestamp from series
left join lateral (
    select timestamp from {table} where {condition} order by timestamp limit 1
) as earliest on true
left join lateral (
    select timestamp from {table} where {condition} order by timestamp desc limit 1
) as latest on true
where series.mode = %(mode)s
order by series.exchange, series.pair_name
"""

_DAY = timedelta(days=1)

MOST_NAMES = 12
"""Names in a message about what is stored."""

_OF_SERIES = "exchange = series.exchange and pair_name = series.pair_name and mode = series.mode"
_COPY = (
    "copy (select {columns} from aggregates where exchange = %(exchange)s and pair_name = %(symbol)s"
    " and mode = %(mode)s and {range} order by timestamp) to stdout (format csv)"
)


@dataclass(frozen=True)
class RowFilter:
    """Rows to export: of a mode, a time range (Unix ms, end exclusive), and some symbols and exchanges.

    None means no limit, and empty means all; names match in any case.
    """

    mode: Mode
    from_ms: int | None = None
    to_ms: int | None = None
    symbols: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()

    @property
    def range(self) -> sql.Composable:
        """Return the time range as a condition."""
        begin = OLDEST_MS if self.from_ms is None else self.from_ms
        end = END_MS if self.to_ms is None else self.to_ms
        bounds = [("timestamp >= {}", begin), ("timestamp < {}", end)]  # the range of times that can be written
        return sql.SQL(" and ").join(sql.SQL(text).format(sql.Literal(to_datetime(ms))) for text, ms in bounds)


@dataclass(frozen=True)
class SeriesRows:
    """A series with rows, and the times of its first and last row."""

    exchange: str
    symbol: str
    first: datetime
    last: datetime

    def rows(self, row_ms: int) -> int:
        """Return the number of rows if none is missing; each covers `row_ms`."""
        return int((self.last - self.first).total_seconds() * 1000) // row_ms + 1


class ReadConnection(BoundedConnection):
    """A connection of an export, which Ctrl+C ends at once: a cancelled COPY may have much to send first."""

    answer_seconds = READ_TIMEOUT_SECONDS
    cancels_on_interrupt = False


@contextmanager
def snapshot(keywords: dict[str, Any]) -> Iterator[ReadConnection]:
    """Yield a connection in a transaction that reads one snapshot of the table.

    Raises:
        Unavailable: any error of psycopg, including those of the caller's block.
    """
    try:
        # No statement timeout: the reader may be slow, as a person who scrolls.
        with connecting():
            connection = ReadConnection.connect(**session_keywords(keywords), autocommit=True)
        with closing(connection):
            pinning = pin(connection, keywords)
            connection.autocommit = False
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            if pinning is not None:
                connection.execute(pinning)
            yield connection
    except (SettingsError, Unavailable, OSError):
        raise
    except Exception as error:
        raise Unavailable(f"PostgreSQL: {reason(error)}") from error


def find_series(
    connection: ReadConnection,
    selection: RowFilter,
    symbols: Iterable[str] = (),
    exchanges: Iterable[str] = (),
    with_days: bool = False,
) -> list[SeriesRows]:
    """Return the series to export, in order.

    Args:
        connection: see snapshot.
        selection: which rows.
        symbols: configured symbols, which are known even without rows.
        exchanges: configured exchanges.
        with_days: whether days count as well, which are kept longer than their minutes.

    Raises:
        SettingsError: a symbol or an exchange is unknown; the text names the known ones.
        Unavailable: the database has no such table yet.
    """
    row = connection.execute("select to_regclass('aggregates') is not null").fetchone()
    if row is None or not row[0]:
        raise Unavailable("nothing to export: the database has no table aggregates yet")
    spans = _spans(connection, selection, "aggregates")
    if with_days and connection.execute("select to_regclass('aggregates_daily') is not null").fetchone() == (True,):
        for series, (first, last) in _spans(connection, selection, "aggregates_daily").items():
            firsts, lasts = zip(spans.get(series, (None, None)), (first, last and last + _DAY), strict=True)
            spans[series] = min(filter(None, firsts), default=None), max(filter(None, lasts), default=None)
    wanted_symbols = _selected("symbol", selection.symbols, {*symbols, *(symbol for _, symbol in spans)})
    wanted_exchanges = _selected("exchange", selection.exchanges, {*exchanges, *(name for name, _ in spans)})
    return [
        SeriesRows(exchange, symbol, first, last)
        for (exchange, symbol), (first, last) in sorted(spans.items())
        if first is not None and last is not None and exchange in wanted_exchanges and symbol in wanted_symbols
    ]


def stored(connection: ReadConnection) -> list[str]:
    """Return what is stored, in words: for each mode the time range, and the number and names of its series."""
    lines = []
    for mode in Mode:
        if series := find_series(connection, RowFilter(mode), with_days=True):
            ends = min(each.first for each in series), max(each.last for each in series)
            first, last = (rfc3339(at.astimezone(UTC)) for at in ends)
            names = {each.exchange for each in series}, {each.symbol for each in series}
            exchanges, symbols = map(_some, names)
            lines.append(
                f"stored in {mode.value} mode: {first} to {last}, {len(series)} series"
                f" (exchange {exchanges}; symbol {symbols})"
            )
    return lines or ["nothing is stored yet"]


def _some(names: set[str]) -> str:
    """Return names for a message, at most a dozen."""
    shown = sorted(names)
    return ", ".join(shown if len(shown) <= MOST_NAMES else [*shown[:MOST_NAMES], "..."])


def _spans(
    connection: ReadConnection, selection: RowFilter, table: str
) -> dict[tuple[str, str], tuple[datetime | None, datetime | None]]:
    """Return the times of the first and last row in the range by exchange and symbol; None where there is none."""
    query = sql.SQL(_SERIES).format(
        series=sql.SQL(recursive_series(table)),
        table=sql.Identifier(table),
        condition=sql.SQL(_OF_SERIES) + sql.SQL(" and ") + selection.range,
    )
    found = connection.execute(query, {"mode": selection.mode.value}).fetchall()
    return {(exchange, symbol): (first, last) for exchange, symbol, first, last in found}


def read_blocks(
    connection: ReadConnection, selection: RowFilter, series: SeriesRows, written_as: Callable[[str], str] = str
) -> Generator[tuple[bytes, int], None, None]:
    """Yield the rows of a series as CSV without a header: blocks of complete rows, and their number.

    Args:
        connection: see snapshot.
        selection: which rows.
        series: the series.
        written_as: converts a name from the database for the output.
    """
    query = sql.SQL(_COPY).format(columns=_columns(series, written_as), range=selection.range)
    names = {"exchange": series.exchange, "symbol": series.symbol, "mode": selection.mode.value}
    rows: list[memoryview | bytes | bytearray] = []
    size = 0
    with connection.cursor() as cursor, cursor.copy(query, names) as copy:
        try:
            for row in copy:  # the protocol sends one row at a time
                rows.append(row)
                size += len(row)
                if size >= BLOCK_BYTES:
                    yield b"".join(rows), len(rows)
                    rows, size = [], 0
        except BaseException:
            connection.close()  # the end of the block would wait for the server again
            raise
    if rows:
        yield b"".join(rows), len(rows)


def _columns(series: SeriesRows, written_as: Callable[[str], str]) -> sql.Composable:
    """Return the columns as SQL; times in RFC 3339, as in the API, the venue's values as an array in JSON."""
    rfc3339 = """case when {0} >= '1970-01-01Z' and {0} < '2200-01-01Z' then
        to_char({0} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') end"""
    forms: dict[str, sql.Composable] = {name: sql.SQL(rfc3339).format(sql.Identifier(name)) for name in TIMES}
    forms |= {"pair_name": sql.Literal(written_as(series.symbol)), "exchange": sql.Literal(written_as(series.exchange))}
    forms["verified"] = sql.SQL("verified::text")
    forms["venue_values"] = sql.SQL(
        "case when array_ndims(venue_values) = 1 and cardinality(venue_values) = {} then to_json(venue_values) end"
    ).format(VENUE_VALUES)
    return sql.SQL(", ").join(forms.get(name, sql.Identifier(name)) for name in COLUMNS)


def _selected(kind: str, names: Sequence[str], known: set[str]) -> set[str]:
    """Return the known names that were requested; all, if none was."""
    requested = {name.lower() for name in names}
    unknown = requested - {name.lower() for name in known}
    for name in names:
        if name.lower() in unknown:
            raise SettingsError(f"argument --{kind}: no such {kind} {name}; there are {', '.join(sorted(known))}")
    return {name for name in known if not requested or name.lower() in requested}
