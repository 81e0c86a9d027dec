"""Exports rows: reads series by series and writes them in a format to a file or stdout."""

import sys
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from marketflow.cli.export.formats import open_format, require
from marketflow.cli.export.output import complete_file, standard_output
from marketflow.cli.export.progress import RowCounter, progress_counter
from marketflow.cli.export.row_reader import ReadConnection, RowFilter, find_series, read_blocks, snapshot
from marketflow.cli.export.server_start import running_postgres
from marketflow.errors import SettingsError
from marketflow.settings import Settings


@dataclass(frozen=True)
class Export:
    """Rows, format (`csv` or `parquet`) and file of an export. `force` may replace the file; None is stdout."""

    rows: RowFilter
    format: str = "csv"
    output: Path | None = None
    force: bool = False


def export(settings: Settings, request: Export) -> int:
    """Write the rows, and return their number.

    Raises:
        SettingsError: an argument is wrong, or a package is missing.
        StartError: there is no database to export from, or a file cannot be written.
        Unavailable: PostgreSQL is unreachable or refuses.
        BrokenPipeError: the reader of stdout has closed it.
    """
    require(request.format)
    begin, end = request.rows.from_ms, request.rows.to_ms
    if begin is not None and end is not None and begin > end:
        raise SettingsError("argument --from: must not be after --to")
    if request.output is None and request.format == "parquet" and sys.stdout is not None and sys.stdout.isatty():
        raise SettingsError("argument --format: parquet is binary, and stdout is a terminal; set --output FILE")
    with (
        _output(request) as file,
        running_postgres(settings) as keywords,
        snapshot(keywords) as connection,
        progress_counter() as counted,
    ):
        _write(settings, connection, request, file, counted)
    return counted.rows


def _write(
    settings: Settings, connection: ReadConnection, request: Export, file: IO[bytes], counted: RowCounter
) -> None:
    exchanges = (exchange.name for exchange in settings.exchanges)
    series = find_series(connection, request.rows, settings.symbols, exchanges)
    expected = [each.rows(settings.flow.minute_ms) for each in series]
    with open_format(request.format, file) as written:
        for number, each in enumerate(series):
            counted.expect(sum(expected[number:]))  # the number of missing minutes is known once a series is complete
            with closing(read_blocks(connection, request.rows, each, written.name)) as copied:
                for block, rows in copied:
                    written.write(block, rows)
                    counted.count(rows)


def _output(request: Export) -> AbstractContextManager[IO[bytes]]:
    return standard_output() if request.output is None else complete_file(request.output, request.force)
