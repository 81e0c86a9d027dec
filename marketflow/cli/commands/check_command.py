"""`marketflow check`: health checks of everything that the settings name."""

from pathlib import Path
from typing import Any

import click

from marketflow.cli.command import Command
from marketflow.cli.exit_codes import FAILED
from marketflow.cli.options import Choice, option, settings_given, settings_options


@click.command(
    "check",
    cls=Command,
    short_help="Check Redis, PostgreSQL, exchanges, port and data folder.",
    epilog="Exit code 0: MarketFlow would run well, 1: a check failed, 2: an argument or a setting is wrong. The"
    " options are those of marketflow.",
)
@settings_options
@option("--format", type=Choice(("table", "json")), default="table", help="Output format.  [table]")
def command(config: Path | None, format: str, **flags: Any) -> int:
    """Check everything the settings name: Redis, PostgreSQL, exchanges, the port of the API and the data folder.

    Prints what is wrong and what to do about it. Changes nothing, starts nothing, and takes a few seconds.
    """
    from marketflow import logs, settings

    loaded = settings.load(config, settings_given(**flags))
    logs.setup("CRITICAL", loaded.log.format)  # the report says in fewer words what libraries would log

    from marketflow.cli import check
    from marketflow.cli.check import report
    from marketflow.cli.stdout import readable_output

    results = check.run_checks(loaded)
    with readable_output():
        (report.print_json if format == "json" else report.print_report)(results)
    return 0 if report.is_well(results) else FAILED
