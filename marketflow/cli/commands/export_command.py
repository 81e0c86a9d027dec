"""`marketflow export`: stored minutes as CSV or Parquet."""

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

from marketflow.cli.command import Command
from marketflow.cli.options import (
    Choice,
    ExchangeNames,
    Moment,
    Symbols,
    config_option,
    data_dir_option,
    mode_option,
    option,
    settings_given,
)


@click.command(
    "export",
    cls=Command,
    short_help="Export stored minutes as CSV or Parquet.",
    epilog="A time is 2026-11-01T09:30:00Z, 2026-11-01 (its midnight, UTC), now, or back from now: -24h, -1h30m. Rows"
    " are read from the PostgreSQL of the settings; an embedded server that is not running is started, and stopped at"
    " the end. Exit code 0: all rows are written, 1: the export failed, 2: an argument or a setting is wrong, 130:"
    " interrupted.",
)
@option("--from", "from_ms", metavar="T", type=Moment(), help="First time, inclusive.  [that of the oldest row]")
@option("--to", "to_ms", metavar="T", type=Moment(), help="End of the range, exclusive.  [after the newest row]")
@option("--symbol", "symbols", metavar="S...", type=Symbols(), variadic=True, help="Symbols to export.  [all]")
@option(
    "--exchange", "exchanges", metavar="E...", type=ExchangeNames(), variadic=True, help="Exchanges to export.  [all]"
)
@mode_option("Mode whose rows are exported.  [the configured mode]")
@option("--format", type=Choice(("csv", "parquet")), help="Output format.  [csv; parquet where FILE ends in .parquet]")
@option(
    "--output",
    metavar="FILE",
    type=click.Path(),
    help="File to write, which appears once it is complete; - for stdout.  [stdout]",
)
@option("--force", is_flag=True, help="Replace FILE.")
@data_dir_option()
@config_option()
def command(
    from_ms: int | None,
    to_ms: int | None,
    symbols: tuple[tuple[str, ...], ...],
    exchanges: tuple[tuple[str, ...], ...],
    mode: Any,
    format: str | None,
    output: str | None,
    force: bool,
    data_dir: Path | None,
    config: Path | None,
) -> int:
    """Write the stored minutes as CSV or Parquet, in constant memory whatever their number.

    Rows are ordered by exchange, symbol and time.
    """
    from marketflow import logs, settings

    loaded = settings.load(config, settings_given(mode=mode, data_dir=data_dir))
    logs.setup("CRITICAL", loaded.log.format)  # an error is one line on stderr

    from marketflow.cli.export import Export, RowFilter, export
    from marketflow.cli.stdout import readable_output

    file = None if output in (None, "-") else Path(str(output))
    by_name = "parquet" if file is not None and file.suffix.lower() == ".parquet" else "csv"
    rows = RowFilter(
        loaded.mode, from_ms, to_ms, tuple(chain.from_iterable(symbols)), tuple(chain.from_iterable(exchanges))
    )
    with readable_output():
        count = export(loaded, Export(rows, format or by_name, file, force))
        print(f"{count} rows of {loaded.mode.value} mode", file=sys.stderr)
    return 0
