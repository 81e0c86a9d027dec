"""Exports rows: reads series by series and writes them in a format to a file or stdout."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from marketflow.api.queries.boundaries import INTERVALS
from marketflow.cli.export.candle_reader import has_days, on_grid, read_candle_blocks
from marketflow.cli.export.columns import TABLE, Column, chosen_columns
from marketflow.cli.export.formats import open_format, require
from marketflow.cli.export.output import complete_file, standard_output
from marketflow.cli.export.progress import RowCounter, progress_counter
from marketflow.cli.export.row_reader import (
    ReadConnection,
    RowFilter,
    SeriesRows,
    find_series,
    read_blocks,
    snapshot,
    stored,
)
from marketflow.cli.export.server_start import running_postgres
from marketflow.errors import SettingsError
from marketflow.settings import Settings


@dataclass(frozen=True)
class Export:
    """What to export, and where to.

    Args:
        rows: which rows, or which candles: those that open in its time range.
        format: one of FORMATS.
        output: the file; None is stdout.
        force: whether an existing file is replaced.
        interval: of candles; "" for the rows of the table as they are.
        columns: names of the columns of candles; all, if none are given.
    """

    rows: RowFilter
    format: str = "csv"
    output: Path | None = None
    force: bool = False
    interval: str = ""
    columns: tuple[str, ...] = ()


class Exported(NamedTuple):
    """The number of rows, and, if there are none, what is stored in words."""

    rows: int
    stored: list[str]


def export(settings: Settings, request: Export) -> Exported:
    """Write the rows, and return their number.

    Raises:
        SettingsError: an argument is wrong, or a package is missing.
        StartError: there is no database to export from, or a file cannot be written.
        Unavailable: PostgreSQL is unreachable or refuses.
        BrokenPipeError: the reader of stdout has closed it.
    """
    require(request.format)
    columns = chosen_columns(request.columns) if request.interval else TABLE
    begin, end = request.rows.from_ms, request.rows.to_ms
    if begin is not None and end is not None and begin > end:
        raise SettingsError("argument --from: must not be after --to")
    if request.output is None and request.format != "csv" and sys.stdout is not None and sys.stdout.isatty():
        raise SettingsError(
            f"argument --format: {request.format} is binary, and stdout is a terminal; set --output FILE"
        )
    with (
        _output(request) as file,
        running_postgres(settings) as keywords,
        snapshot(keywords) as connection,
        progress_counter() as counted,
    ):
        _write(settings, connection, request, columns, file, counted)
        return Exported(counted.rows, [] if counted.rows else stored(connection))


def _write(
    settings: Settings,
    connection: ReadConnection,
    request: Export,
    columns: Sequence[Column],
    file: IO[bytes],
    counted: RowCounter,
) -> None:
    exchanges = (exchange.name for exchange in settings.exchanges)
    interval = request.interval
    rows = on_grid(request.rows, interval) if interval else request.rows
    series = find_series(connection, rows, settings.symbols, exchanges, bool(interval) and has_days(interval))
    if interval:
        _check_identified(series, columns)
    expected = [each.rows(INTERVALS[interval].length_ms if interval else settings.flow.minute_ms) for each in series]
    with open_format(request.format, file, columns) as written:
        for number, each in enumerate(series):
            counted.expect(sum(expected[number:]))  # the number of missing rows is known once a series is complete
            blocks = (
                read_candle_blocks(connection, rows, each, interval, columns, written.name)
                if interval
                else read_blocks(connection, rows, each, written.name)
            )
            with closing(blocks):
                for block, count in blocks:
                    written.write(block, count)
                    counted.count(count)


def _check_identified(series: Sequence[SeriesRows], columns: Sequence[Column]) -> None:
    """Check that each row shows whose it is.

    Raises:
        SettingsError: there are several exchanges or symbols, and no column for them.
    """
    names = {column.name for column in columns}
    for name, values in (
        ("exchange", {each.exchange for each in series}),
        ("symbol", {each.symbol for each in series}),
    ):
        if len(values) > 1 and name not in names:
            several = ", ".join(sorted(values))
            raise SettingsError(
                f"argument --columns: rows of several {name}s ({several}) need the column {name},"
                f" as in --columns exchange,symbol,ohlcv; or choose one by --{name}"
            )


def _output(request: Export) -> AbstractContextManager[IO[bytes]]:
    return standard_output() if request.output is None else complete_file(request.output, request.force)
