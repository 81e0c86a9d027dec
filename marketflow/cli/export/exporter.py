"""Puts the parts of an export together."""

import sys
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from marketflow.cli.export.export_rows import Reading, Selection, blocks, parts, snapshot
from marketflow.cli.export.formats import open_format, require
from marketflow.cli.export.output import standard_output, whole_file
from marketflow.cli.export.progress import Counter, counter
from marketflow.cli.export.source import archive
from marketflow.errors import SettingsError
from marketflow.settings import Settings


@dataclass(frozen=True)
class Export:
    """Which rows, as what (`csv` or `parquet`), and where to: a file, which `force` may replace, or None for stdout."""

    selection: Selection
    format: str = "csv"
    output: Path | None = None
    force: bool = False


def export(settings: Settings, wanted: Export) -> int:
    """Write the rows and give their number.

    Raises:
        SettingsError: an argument is wrong, or a package is missing.
        StartError: there is nothing to export from, or a file cannot be written.
        Unavailable: PostgreSQL is away or refuses.
        BrokenPipeError: nobody reads stdout on.
    """
    require(wanted.format)
    begin, end = wanted.selection.from_ms, wanted.selection.to_ms
    if begin is not None and end is not None and begin > end:
        raise SettingsError("argument --from: must not be after --to")
    if wanted.output is None and wanted.format == "parquet" and sys.stdout is not None and sys.stdout.isatty():
        raise SettingsError("argument --format: parquet is nothing for a terminal; set --output FILE")
    with _output(wanted) as file, archive(settings) as keywords, snapshot(keywords) as connection, counter() as counted:
        _write(settings, connection, wanted, file, counted)
    return counted.rows


def _write(settings: Settings, connection: Reading, wanted: Export, file: IO[bytes], counted: Counter) -> None:
    exchanges = (exchange.name for exchange in settings.exchanges)
    found = parts(connection, wanted.selection, settings.symbols, exchanges)
    expected = [part.rows(settings.flow.minute_ms) for part in found]
    with open_format(wanted.format, file) as written:
        for number, part in enumerate(found):
            counted.expect(sum(expected[number:]))  # minutes that are missing are known once their series is through
            with closing(blocks(connection, wanted.selection, part, written.name)) as copied:
                for block, rows in copied:
                    written.write(block, rows)
                    counted.count(rows)


def _output(wanted: Export) -> AbstractContextManager[IO[bytes]]:
    return standard_output() if wanted.output is None else whole_file(wanted.output, wanted.force)
