"""The rows of an export, as PostgreSQL writes them: CSV, series by series, in the order of the primary key.

COPY of one series is one range of the index that is already in order. One statement for all would leave the planner
the choice of a sort, which for a year of many series is gigabytes on the server's disk.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg
from psycopg import sql, waiting
from psycopg.abc import PQGen

from marketflow.errors import SettingsError, Unavailable
from marketflow.model import Mode
from marketflow.stores.postgres.candle_sql import RECURSIVE_SERIES
from marketflow.stores.postgres.rows import END_MS, OLDEST_MS, reason, to_datetime
from marketflow.stores.postgres.session import connecting, pin, session_keywords

_T = TypeVar("_T")

SILENCE_SECONDS = 30.0
"""How long PostgreSQL may be silent in the middle of an export before it counts as away."""

BLOCK_BYTES = 256 * 1024
"""How much is handed on at once."""

TEXTS = ("pair_name", "exchange", "mode")
PRICES = ("average_price", "min_price", "max_price", "open_price", "close_price")
TICK_TIMES = ("open_at", "close_at", "min_at", "max_at")
COLUMNS = (*TEXTS, "timestamp", *PRICES, "tick_count", *TICK_TIMES, "version")
"""Those of the table, in its order."""

TIMES = ("timestamp", *TICK_TIMES)

_SERIES = """
with {series}
select series.exchange, series.pair_name, earliest.timestamp, latest.timestamp from series
left join lateral (
    select timestamp from aggregates where {condition} order by timestamp limit 1
) as earliest on true
left join lateral (
    select timestamp from aggregates where {condition} order by timestamp desc limit 1
) as latest on true
where series.mode = %(mode)s
order by series.exchange, series.pair_name
"""

_OF_SERIES = "exchange = series.exchange and pair_name = series.pair_name and mode = series.mode"
_COPY = (
    "copy (select {columns} from aggregates where exchange = %(exchange)s and pair_name = %(symbol)s"
    " and mode = %(mode)s and {range} order by timestamp) to stdout (format csv)"
)


@dataclass(frozen=True)
class Selection:
    """Which rows: of a mode, from a time on and before another (Unix ms), of some symbols and exchanges.

    None is no limit, and no name is all; names are matched without regard to case.
    """

    mode: Mode
    from_ms: int | None = None
    to_ms: int | None = None
    symbols: tuple[str, ...] = ()
    exchanges: tuple[str, ...] = ()

    @property
    def range(self) -> sql.Composable:
        """The times as a condition."""
        begin = OLDEST_MS if self.from_ms is None else self.from_ms
        end = END_MS if self.to_ms is None else self.to_ms
        bounds = [("timestamp >= {}", begin), ("timestamp < {}", end)]  # beyond it no time can be written
        return sql.SQL(" and ").join(sql.SQL(text).format(sql.Literal(to_datetime(ms))) for text, ms in bounds)


@dataclass(frozen=True)
class Part:
    """A series that has rows, and when the first and the last of them begin."""

    exchange: str
    symbol: str
    first: datetime
    last: datetime

    def rows(self, row_ms: int) -> int:
        """How many there are where none is missing, each of them standing for `row_ms`."""
        return int((self.last - self.first).total_seconds() * 1000) // row_ms + 1


class Reading(psycopg.Connection[Any]):
    """A connection whose waits have an end, and end at once when interrupted.

    On Ctrl+C psycopg asks the server to cancel and waits for its answer, however long; closing does as well.
    """

    def wait(self, gen: PQGen[_T], interval: float = 0.1, timeout: float | None = None) -> _T:
        """Wait for an answer, as all calls do.

        Raises:
            psycopg.OperationalError: there was none in time; the connection is good for nothing more.
        """
        try:
            return waiting.wait(gen, self.pgconn.socket, interval=interval, timeout=timeout or SILENCE_SECONDS)
        except psycopg.errors._WaitTimeout:
            raise psycopg.OperationalError(f"no answer within {SILENCE_SECONDS:g} s") from None


@contextmanager
def snapshot(keywords: dict[str, Any]) -> Iterator[Reading]:
    """A connection in a transaction that sees one state of the table, however long it is read.

    Raises:
        Unavailable: in place of any error of psycopg, also within.
    """
    try:
        # Without a timeout: who takes the rows may be slow, it can be a person who scrolls.
        with connecting():
            connection = Reading.connect(**session_keywords(keywords), autocommit=True)
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


def parts(
    connection: Reading, selection: Selection, symbols: Iterable[str] = (), exchanges: Iterable[str] = ()
) -> list[Part]:
    """What there is to export, in the order in which it will be.

    Args:
        connection: see snapshot.
        selection: which rows.
        symbols: those that are known although they may have no rows.
        exchanges: the same.

    Raises:
        SettingsError: a symbol or an exchange is neither known nor has it rows; names those that do.
        Unavailable: the database has no such table yet.
    """
    row = connection.execute("select to_regclass('aggregates') is not null").fetchone()
    if row is None or not row[0]:
        raise Unavailable("nothing to export: the database has no table aggregates yet")
    condition = sql.SQL(_OF_SERIES) + sql.SQL(" and ") + selection.range
    query = sql.SQL(_SERIES).format(series=sql.SQL(RECURSIVE_SERIES), condition=condition)
    found = connection.execute(query, {"mode": selection.mode.value}).fetchall()
    wanted_symbols = _wanted("symbol", selection.symbols, {*symbols, *(symbol for _, symbol, _, _ in found)})
    wanted_exchanges = _wanted("exchange", selection.exchanges, {*exchanges, *(name for name, _, _, _ in found)})
    return [
        Part(exchange, symbol, first, last)
        for exchange, symbol, first, last in found
        if first is not None and exchange in wanted_exchanges and symbol in wanted_symbols
    ]


def blocks(
    connection: Reading, selection: Selection, part: Part, written_as: Callable[[str], str] = str
) -> Generator[tuple[bytes, int], None, None]:
    """The rows of a part as CSV without a header: some whole rows, and how many they are.

    Args:
        connection: see snapshot.
        selection: which rows.
        part: the series.
        written_as: gives what stands for a name of the database.
    """
    query = sql.SQL(_COPY).format(columns=_columns(part, written_as), range=selection.range)
    names = {"exchange": part.exchange, "symbol": part.symbol, "mode": selection.mode.value}
    rows: list[memoryview | bytes | bytearray] = []
    size = 0
    with connection.cursor() as cursor, cursor.copy(query, names) as copy:
        try:
            for row in copy:  # one at a time, as the protocol has it
                rows.append(row)
                size += len(row)
                if size >= BLOCK_BYTES:
                    yield b"".join(rows), len(rows)
                    rows, size = [], 0
        except BaseException:
            connection.close()  # or the end of the block would wait for the server once more
            raise
    if rows:
        yield b"".join(rows), len(rows)


def _columns(part: Part, written_as: Callable[[str], str]) -> sql.Composable:
    """The columns, times in RFC 3339 as everywhere in MarketFlow."""
    rfc3339 = """case when {0} >= '1970-01-01Z' and {0} < '2200-01-01Z' then
        to_char({0} at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"') end"""
    forms: dict[str, sql.Composable] = {name: sql.SQL(rfc3339).format(sql.Identifier(name)) for name in TIMES}
    forms |= {"pair_name": sql.Literal(written_as(part.symbol)), "exchange": sql.Literal(written_as(part.exchange))}
    return sql.SQL(", ").join(forms.get(name, sql.Identifier(name)) for name in COLUMNS)


def _wanted(kind: str, names: Sequence[str], known: set[str]) -> set[str]:
    """The known names among those that were asked for; all, when none was."""
    asked = {name.lower() for name in names}
    unknown = asked - {name.lower() for name in known}
    for name in names:
        if name.lower() in unknown:
            raise SettingsError(f"argument --{kind}: no such {kind} {name}; there are {', '.join(sorted(known))}")
    return {name for name in known if not asked or name.lower() in asked}
