"""Reads candles of an export as CSV, series by series: of any interval that the API has, by the API's own query.

Candles of an hour and more are made of hours and days, as in the API, so that they reach back further than minutes.
"""

import csv
from collections.abc import Callable, Generator, Sequence
from datetime import UTC
from io import StringIO
from itertools import pairwise

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.api.queries.candles import folded
from marketflow.cli.export.columns import Column
from marketflow.cli.export.row_reader import ReadConnection, RowFilter, SeriesRows
from marketflow.model import Amounts, Candle, Series, rounded
from marketflow.stores.ports import CandleRange
from marketflow.stores.postgres.candle_queries import candles_of, query
from marketflow.stores.postgres.rows import to_datetime, to_unix_ms
from marketflow.text import rfc3339

PAGE = 5_000
"""Candles of a query: some MB in memory."""

_HOUR_MS = 60 * 60_000

Cell = str | int | float | bool | None


def has_days(interval: str) -> bool:
    """Return whether candles of an interval are made of hours or days, which are kept longer than minutes."""
    return INTERVALS[interval].part_ms >= _HOUR_MS


def on_grid(selection: RowFilter, interval: str) -> RowFilter:
    """Return the filter of the rows whose candles open in the range of a filter, as `from` and `to` of the API."""
    grid = INTERVALS[interval]
    begin, end = (None if at is None else grid.at_or_after(at) for at in (selection.from_ms, selection.to_ms))
    return RowFilter(selection.mode, begin, end, selection.symbols, selection.exchanges)


def read_candle_blocks(
    connection: ReadConnection,
    selection: RowFilter,
    series: SeriesRows,
    interval: str,
    columns: Sequence[Column],
    written_as: Callable[[str], str] = str,
) -> Generator[tuple[bytes, int], None, None]:
    """Yield the candles of a series as CSV without a header: blocks of complete rows, and their number.

    Args:
        connection: see row_reader.snapshot.
        selection: which rows, on the grid of the interval.
        series: the series.
        interval: of the candles.
        columns: of CANDLE.
        written_as: converts a name from the database for the output.
    """
    grid = INTERVALS[interval]
    cells = [_cell(column.name, written_as(series.exchange), written_as(series.symbol)) for column in columns]
    whose = [Series(selection.mode, series.exchange, series.symbol)]
    connection.execute("set local jit = off")  # a statement is planned and run in less time than JIT takes
    first, end = grid.start_of(to_unix_ms(series.first)), grid.end_of(grid.start_of(to_unix_ms(series.last)))
    first = first if selection.from_ms is None else max(first, selection.from_ms)
    end = end if selection.to_ms is None else min(end, selection.to_ms)
    begins = grid.starts(first, end)[:: PAGE // grid.parts]
    for begin, until in pairwise([*begins, end]):
        statement, parameters = query(whose, CandleRange(grid.part_ms, begin, until, PAGE, newest=False))
        parts = candles_of(connection.execute(statement.encode(), parameters).fetchall(), 1)
        (candles,) = folded(parts, grid)
        if candles:
            out = StringIO()
            writer = csv.writer(out, lineterminator="\n")
            writer.writerows([_text(cell(start, candles[start])) for cell in cells] for start in sorted(candles))
            yield out.getvalue().encode(), len(candles)


def _cell(name: str, exchange: str, symbol: str) -> Callable[[int, Candle], Cell]:
    """Return the function that returns the value of a column from the start of a candle (Unix ms) and the candle."""
    match name:
        case "exchange" | "symbol":
            return lambda start, candle: exchange if name == "exchange" else symbol
        case "time":
            return lambda start, candle: rfc3339(to_datetime(start).astimezone(UTC))
        case "volume" | "turnover" | "buy_volume" | "buy_turnover":
            return lambda start, candle: _amount(candle.amounts, name)
        case "ticks":
            return lambda start, candle: candle.ticks or None
    return lambda start, candle: _value(candle, name)


def _value(candle: Candle, name: str) -> Cell:
    value: Cell = getattr(candle, name)
    return value


def _amount(amounts: Amounts | None, name: str) -> float | None:
    amount = None if amounts is None else getattr(amounts, name)
    return None if amount is None else rounded(amount)


def _text(value: Cell) -> Cell:
    return str(value).lower() if isinstance(value, bool) else value
