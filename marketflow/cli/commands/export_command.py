"""`marketflow export`: stored minutes or candles as CSV, Parquet or Feather."""

import sys
from itertools import chain
from pathlib import Path
from typing import Any

import click

from marketflow.cli.command import Command
from marketflow.cli.options import (
    Choice,
    Columns,
    ExchangeNames,
    Interval,
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
    short_help="Export stored minutes or candles as CSV, Parquet or Feather.",
    epilog="A time is 2026-11-01T09:30:00Z, 2026-11-01 (its midnight, UTC), 1793525400000 (Unix milliseconds), now, or"
    " back from now: -24h, -1h30m. Columns of candles: exchange symbol time open high low close volume turnover vwap"
    " average ticks buy_volume buy_turnover version source verified. Rows"
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
@option("--interval", metavar="I", type=Interval(), help="Export candles: 1m, 1h, 1d.  [minutes, as stored]")
@option(
    "--columns",
    metavar="A,B",
    type=Columns(),
    help="Columns of candles, in this order; ohlcv stands for time,open,high,low,close,volume.  [all]",
)
@option(
    "--format",
    type=Choice(("csv", "parquet", "feather")),
    help="Output format.  [by the end of FILE: .parquet, .feather, .arrow; otherwise csv]",
)
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
    interval: str | None,
    columns: tuple[str, ...] | None,
    format: str | None,
    output: str | None,
    force: bool,
    data_dir: Path | None,
    config: Path | None,
) -> int:
    """Write the stored minutes as CSV, Parquet or Feather, in constant memory whatever their number.

    Rows are ordered by exchange, symbol and time. With --interval or --columns they are candles (of 1m without
    --interval) that open in the time range. The last one may be incomplete, as far as its minutes are stored.
    """
    from marketflow import logs, settings

    loaded = settings.load(config, settings_given(mode=mode, data_dir=data_dir))
    logs.setup("CRITICAL", loaded.log.format)  # an error is one line on stderr

    from marketflow.cli.export import Export, RowFilter, export
    from marketflow.cli.export.formats import SUFFIXES
    from marketflow.cli.stdout import readable_output
    from marketflow.text import visible

    file = None if output in (None, "-") else Path(str(output))
    by_name = SUFFIXES.get(file.suffix.lower(), "csv") if file is not None else "csv"
    of_candles = interval or ("1m" if columns else "")
    rows = RowFilter(
        loaded.mode, from_ms, to_ms, tuple(chain.from_iterable(symbols)), tuple(chain.from_iterable(exchanges))
    )
    with readable_output():
        done = export(loaded, Export(rows, format or by_name, file, force, of_candles, columns or ()))
        print(f"{done.rows} {'row' if done.rows == 1 else 'rows'} of {loaded.mode.value} mode", file=sys.stderr)
        for line in done.stored:
            print(visible(line), file=sys.stderr)
    return 0
